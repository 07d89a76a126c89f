# SPDX-License-Identifier: Apache-2.0
"""``expert_gate``: backend choice, operator schemas, autograd and the public function."""

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.once import once_differentiable
from samfast.kernels._common.windows import Windows
from samfast.kernels.expert_gate import reference, torch_path


def supports(backend: str, h: Tensor, w_gate: Tensor) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not."""
    if backend in ("reference", "torch"):
        return None
    if backend in ("cpu", "cuda"):
        return "it has no native source; torch runs it on a CPU and triton on a GPU"
    if (missing := backends.triton_missing(h.device)) is not None:
        return missing
    if h.dtype == torch.float64:
        return "h is torch.float64, but the kernels take float32, float16 and bfloat16"
    from samfast.kernels.expert_gate import triton_kernels

    rank, experts = w_gate.shape
    if rank > triton_kernels.MAX_RANK:
        return f"rank {rank} is above {triton_kernels.MAX_RANK}, the widest tile"
    if experts > triton_kernels.MAX_EXPERTS:
        return f"{experts} experts are more than the {triton_kernels.MAX_EXPERTS} the kernels take"
    return None


def _path(backend, h, w_gate):
    name = backends.resolve("expert_gate", backend, h.device, lambda b: supports(b, h, w_gate))
    if name == "reference":
        raise RuntimeError("backend 'reference' is plain autograd; call expert_gate for it")
    if name == "triton":
        from samfast.kernels.expert_gate import triton_kernels

        return triton_kernels
    return torch_path


_INPUTS = "Tensor h, Tensor w_gate, Tensor w_noise, Tensor? noise, Tensor? index, SymInt[] windows"
_INPUTS += ", float coefficient, str backend"
torch.library.define("samfast::expert_gate", f"({_INPUTS}) -> (Tensor loss, Tensor index)")
torch.library.define(
    "samfast::expert_gate_forward", f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


@implement("samfast::expert_gate_forward")
def _forward_impl(h, w_gate, w_noise, noise, index, windows, coefficient, backend):
    path = _path(backend, h, w_gate)
    with without_autocast(h.device.type):
        return path.forward(h, w_gate, w_noise, noise, index, Windows(*windows), coefficient)


@torch.library.register_fake("samfast::expert_gate_forward")
def _forward_fake(h, w_gate, w_noise, noise, index, windows, coefficient, backend):
    samples = Windows(*windows).samples
    wide = torch.promote_types(h.dtype, torch.float32)
    return (
        h.new_empty(samples, dtype=torch.int64),
        h.new_empty((), dtype=wide),
        h.new_empty(samples, h.shape[1], dtype=wide),
        h.new_empty(2, *w_gate.shape, dtype=wide),
    )


@implement("samfast::expert_gate")
def _impl(*args):
    index, aux, _, _ = torch.ops.samfast.expert_gate_forward(*args)
    return aux, index


@torch.library.register_fake("samfast::expert_gate")
def _fake(*args):
    index, aux, _, _ = _forward_fake(*args)
    return aux, index


class ExpertGateFunction(torch.autograd.Function):
    """Saves the loss's gradient: r numbers a sample and 2·r·M for the weights."""

    @staticmethod
    def forward(ctx, h, w_gate, w_noise, noise, index, windows, coefficient, backend):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            index, aux, dpool, dgate = torch.ops.samfast.expert_gate_forward(
                h, w_gate, w_noise, noise, index, windows, coefficient, backend
            )
        ctx.save_for_backward(dpool, dgate)
        ctx.windows, ctx.dtypes = Windows(*windows), (h.dtype, w_gate.dtype, w_noise.dtype)
        ctx.mark_non_differentiable(index)
        return aux, index

    @staticmethod
    @once_differentiable
    def backward(ctx, daux, _):
        dpool, dgate = ctx.saved_tensors
        h_dtype, *weight_dtypes = ctx.dtypes
        need_h, *need_weights = ctx.needs_input_grad[:3]
        dh = None
        if need_h:
            windows = ctx.windows
            size = (windows.samples, windows.height, windows.width, dpool.shape[1])
            dh, _ = windows.paste((daux * dpool)[:, None, None, :].expand(size))
            dh = dh.to(h_dtype)
        dweights = [
            (daux * part).to(dtype) if need else None
            for part, dtype, need in zip(dgate.unbind(), weight_dtypes, need_weights, strict=True)
        ]
        return dh, *dweights, None, None, None, None, None


@torch.library.impl("samfast::expert_gate", "Autograd")
def _autograd(*args):
    return ExpertGateFunction.apply(*args)


def expert_gate(
    h: Tensor,
    w_gate: Tensor,
    w_noise: Tensor,
    *,
    noise: Tensor | None = None,
    training: bool = False,
    generator: torch.Generator | None = None,
    expert_index: Tensor | None = None,
    coefficient: float = 0.01,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Noisy top-1 choice of an expert per sample, and the loss that balances the choices.

    h: (N, H, W, r)   w_gate, w_noise: (r, M)
    expert_index: (N,) int64 = argmax(g w_gate + noise · (softplus(g w_noise) + 0.01)), g = mean of
        h over its pixels; without noise outside training
    loss: () = coefficient · (CV²(importance) + CV²(load)), CV² = unbiased variance / mean²

    noise: (N, M) standard normal; drawn with ``generator`` when training and None is given.
    expert_index: a choice made by the caller, returned as it is.
    All arithmetic is at least float32. The choice has no gradient, the loss has one in training.
    Saves the loss's gradient, N·r + 2·r·M numbers. Raises ValueError when shapes do not chain.
    """
    if h.dim() != 4 or 0 in h.shape[1:]:
        raise ValueError(f"h has shape {tuple(h.shape)}, but must be (N, H, W, rank) with pixels")
    check_gate(h.shape[0], h.shape[3], w_gate, w_noise, noise, expert_index)
    for name, t in {"w_gate": w_gate, "noise": noise, "expert_index": expert_index}.items():
        if t is not None and t.device != h.device:
            raise ValueError(f"{name} is on {t.device} but h is on {h.device}")
    if training and noise is None:
        noise = draw_noise(h, h.shape[0], w_gate.shape[1], generator)
    noise = usable_noise(noise, h)
    if backends.requested(backend) == "reference":
        forced = None if expert_index is None else expert_index[:, None]
        with without_autocast(h.device.type):
            index, _, loss = reference.expert_gate(h, w_gate, w_noise, noise, forced, coefficient)
        return index.squeeze(1), loss
    windows = Windows.whole(*h.shape[:3])
    loss, index = torch.ops.samfast.expert_gate(
        h.reshape(windows.tokens, h.shape[3]), w_gate, w_noise, noise, expert_index,
        list(windows), float(coefficient), backends.requested(backend),
    )  # fmt: skip
    return index, loss


def draw_noise(like: Tensor, samples: int, experts: int, generator=None) -> Tensor:
    """(samples, experts) standard normal, at least float32: one draw per layer and forward."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    given = {} if generator is None else {"generator": generator}  # not traceable with a size
    return torch.randn(samples, experts, dtype=dtype, device=like.device, **given)


def usable_noise(noise: Tensor | None, like: Tensor) -> Tensor | None:
    """The draw as the gate takes it: a constant, of the dtype of its arithmetic."""
    if noise is None:
        return None
    return noise.detach().to(torch.promote_types(like.dtype, torch.float32))


def check_gate(samples, rank, w_gate, w_noise, noise, expert_index) -> None:
    """Raise one sentence when the gate's sizes do not chain."""
    for name, t in (("w_gate", w_gate), ("w_noise", w_noise)):
        if t.dim() != 2 or t.shape[0] != rank or t.shape != w_gate.shape or t.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, but h of rank {rank} needs ({rank}, experts), "
                "the same for w_gate and w_noise"
            )
    if noise is not None and tuple(noise.shape) != (samples, w_gate.shape[1]):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, but {samples} samples and {w_gate.shape[1]} "
            f"experts need ({samples}, {w_gate.shape[1]})"
        )
    if expert_index is None:
        return
    if tuple(expert_index.shape) != (samples,) or expert_index.dtype != torch.int64:
        raise ValueError(
            f"expert_index must be int64 of shape ({samples},), one for each sample, but is "
            f"{expert_index.dtype} {tuple(expert_index.shape)}"
        )
