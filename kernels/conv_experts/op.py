# SPDX-License-Identifier: Apache-2.0
"""``conv_experts``: backend choice, operator schemas, autograd and the public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.once import once_differentiable
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import reference, torch_path

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_RATIO = 4096  # enlarged positions are int32 in the kernels
ACTIVATIONS = ("gelu", "none")


def supports(backend: str, h: Tensor, weight: Tensor) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not."""
    if backend in ("reference", "torch"):
        return None
    experts, rank = weight.shape[:2]
    if backend == "cpu":
        return backends.cpu_missing(h.device, h.dtype, "conv_experts_forward")
    if backend == "cuda":
        from samfast.kernels.conv_experts import cuda_path

        return cuda_path.missing(h, weight)
    if (missing := backends.triton_missing(h.device)) is not None:
        return missing
    if h.dtype == torch.float64:
        return "h is torch.float64, but the kernels take float32, float16 and bfloat16"
    from samfast.kernels.conv_experts import triton_kernels

    if rank > triton_kernels.MAX_RANK:
        return f"rank {rank} is above {triton_kernels.MAX_RANK}, the widest tile"
    if experts > triton_kernels.MAX_EXPERTS:
        return f"{experts} experts are more than the {triton_kernels.MAX_EXPERTS} the kernels take"
    return None


def _path(backend, h, weight):
    name = backends.resolve("conv_experts", backend, h.device, lambda b: supports(b, h, weight))
    if name == "reference":
        raise RuntimeError("backend 'reference' is plain autograd; call conv_experts for it")
    if name == "cpu":
        from samfast.kernels.conv_experts import cpu_path

        return cpu_path
    if name == "cuda":
        from samfast.kernels.conv_experts import cuda_path

        return cuda_path
    if name == "triton":
        from samfast.kernels.conv_experts import triton_kernels

        return triton_kernels
    return torch_path


# h, dz (tokens, r) in image order and z_pad, dz_pad (batch · pads, r): see _common/windows.py. The
# last three tensors of the backward are the loss's gradient with respect to h and the gate.
_OPTIONS = "SymInt[] windows, int[] ratios, bool residual, str activation"
_INPUTS = f"Tensor h, Tensor weight, Tensor bias, Tensor index, {_OPTIONS}"
torch.library.define("samfast::conv_experts", f"({_INPUTS}, str backend) -> Tensor")
torch.library.define(
    "samfast::conv_experts_forward", f"({_INPUTS}, str backend) -> (Tensor, Tensor)"
)
torch.library.define(
    "samfast::conv_experts_backward",
    f"(Tensor dz, Tensor? dz_pad, {_INPUTS}, Tensor? daux, Tensor? dpool, Tensor? dgate, "
    "bool[] needs, str backend) -> Tensor[]",
)


@implement("samfast::conv_experts_forward")
def _forward_impl(h, weight, bias, index, windows, ratios, residual, activation, backend):
    if index.device.type == "cpu":
        check_index(index, len(ratios))
    path = _path(backend, h, weight)
    with without_autocast(h.device.type):
        return path.forward(
            h, weight, bias, index, Windows(*windows), tuple(ratios), residual, activation
        )


@torch.library.register_fake("samfast::conv_experts_forward")
def _forward_fake(h, weight, bias, index, windows, *rest):
    windows = Windows(*windows)
    return (
        h.new_empty(windows.tokens, h.shape[1]),
        h.new_empty(windows.batch * windows.pads, h.shape[1]),
    )


@implement("samfast::conv_experts_backward")
def _backward_impl(
    dz, dz_pad, h, weight, bias, index, windows, ratios, residual, activation, daux, dpool, dgate,
    needs, backend,
):  # fmt: skip
    path = _path(backend, h, weight)
    balance = None if daux is None else (daux, dpool, dgate)
    with without_autocast(h.device.type):
        grads = path.backward(
            dz, dz_pad, h, weight, bias, index, Windows(*windows), tuple(ratios), residual,
            activation, balance, tuple(needs),
        )  # fmt: skip
    return [g for g in grads if g is not None]


@torch.library.register_fake("samfast::conv_experts_backward")
def _backward_fake(
    dz, dz_pad, h, weight, bias, index, windows, ratios, residual, activation, daux, dpool, dgate,
    needs, backend,
):  # fmt: skip
    need_h, need_weight = needs
    grads = [h.new_empty(h.shape)] if need_h else []
    if need_weight:
        grads += [weight.new_empty(weight.shape), bias.new_empty(bias.shape)]
    if daux is not None:
        grads += [dgate.new_empty(dgate.shape[1:]) for _ in range(2)]
    return grads


@implement("samfast::conv_experts")
def _impl(*args):
    z, _ = torch.ops.samfast.conv_experts_forward(*args)
    return z


@torch.library.register_fake("samfast::conv_experts")
def _fake(*args):
    return _forward_fake(*args)[0]


class ConvExpertsFunction(torch.autograd.Function):
    """Saves h and the choices; what the activation saw is computed again."""

    @staticmethod
    def forward(ctx, h, weight, bias, index, options, backend):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            z, _ = torch.ops.samfast.conv_experts_forward(h, weight, bias, index, *options, backend)
        ctx.save_for_backward(h, weight, bias, index)
        ctx.options, ctx.backend = options, backend
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        need_h, need_weight, need_bias = ctx.needs_input_grad[:3]
        needs = [need_h, need_weight or need_bias]
        saved = ctx.saved_tensors  # which a checkpoint makes again, with autograd
        with torch._C._AutoDispatchBelowADInplaceOrView():
            grads = torch.ops.samfast.conv_experts_backward(
                dz, None, *saved, *ctx.options, None, None, None, needs, ctx.backend
            )
        given = iter(grads)
        dh = next(given) if need_h else None
        dweight, dbias = (next(given), next(given)) if needs[1] else (None, None)
        return (
            dh,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            None,
            None,
        )


@torch.library.impl("samfast::conv_experts", "Autograd")
def _autograd(h, weight, bias, index, *rest):
    *options, backend = rest
    return ConvExpertsFunction.apply(h, weight, bias, index, tuple(options), backend)


def conv_experts(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_index: Tensor,
    ratios: Sequence[int],
    *,
    residual: bool = True,
    activation: str = "gelu",
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Each sample through one convolution at one scale (Conv-LoRA, Zhong et al. 2024).

    h: (N, H, W, r)   weight: (M, r, r / groups, 3, 3)   bias: (M, r)
    expert_index: (N,) int64, the expert of each sample   ratios: M whole numbers of at least 1
    out: (N, H, W, r) = residual · h + shrink(act(conv3×3(enlarge(h; s)))) with s = ratios[expert];
        both resamples are torch's bicubic, the convolution pads with zeros, act is the erf GELU.

    groups: 1, or r for depthwise experts. activation: "gelu" or "none".
    The result has h's dtype; arithmetic is float32 (float64 for float64). The enlarged map never
    exists: only the points that the shrinking reads are computed.
    Saves h and expert_index. Raises ValueError when shapes, ratios or choices do not fit (choices
    on a GPU are not read back: a sample with one out of range becomes NaN), RuntimeError when a
    backend asked for by name cannot run.
    """
    check_experts(h.shape[-1] if h.dim() else 0, weight, bias, ratios, groups)
    if h.dim() != 4:
        raise ValueError(f"h has shape {tuple(h.shape)}, but must be (N, H, W, rank)")
    if tuple(expert_index.shape) != h.shape[:1] or expert_index.dtype != torch.int64:
        raise ValueError(
            f"expert_index must be int64 of shape ({h.shape[0]},), one for each sample, but is "
            f"{expert_index.dtype} {tuple(expert_index.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
    for name, t in (("weight", weight), ("bias", bias), ("expert_index", expert_index)):
        if t.device != h.device:
            raise ValueError(f"{name} is on {t.device} but h is on {h.device}")
    if h.dtype not in DTYPES:
        raise ValueError(f"h is {h.dtype}, but must be float16, bfloat16, float32 or float64")
    if 0 in h.shape[1:3]:
        raise ValueError(f"h has shape {tuple(h.shape)}, a map without pixels")
    if backends.requested(backend) == "reference":
        check_index(expert_index, len(ratios))
        with without_autocast(h.device.type):
            return reference.conv_experts(
                h, weight, bias, expert_index, ratios, residual=residual, activation=activation,
                groups=groups,
            )  # fmt: skip
    windows = Windows.whole(*h.shape[:3])
    z = torch.ops.samfast.conv_experts(
        h.reshape(windows.tokens, h.shape[3]), weight, bias, expert_index, list(windows),
        list(ratios), residual, activation, backends.requested(backend),
    )  # fmt: skip
    return z.view(h.shape)


def check_experts(rank: int, weight: Tensor, bias: Tensor, ratios, groups: int) -> None:
    """Raise one sentence when the experts' sizes do not chain."""
    if groups not in (1, rank):
        raise ValueError(f"groups is {groups}, but must be 1 or the rank {rank}")
    if weight.dim() != 5 or tuple(weight.shape[1:]) != (rank, rank // max(groups, 1), 3, 3):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but rank {rank} with groups {groups} needs "
            f"(experts, {rank}, {rank // max(groups, 1)}, 3, 3)"
        )
    experts = weight.shape[0]
    if experts == 0 or tuple(bias.shape) != (experts, rank):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, but {experts} experts of rank {rank} need "
            f"({experts}, {rank})"
        )
    if len(ratios) != experts:
        raise ValueError(
            f"ratios {tuple(ratios)} are {len(ratios)} but weight has {experts} experts"
        )
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 1:
            raise ValueError(f"ratios has {ratio!r}, which is not a whole number of at least 1")
        if ratio > MAX_RATIO:
            raise ValueError(f"ratios has {ratio}, but the largest is {MAX_RATIO}")


def check_index(index: Tensor, experts: int) -> None:
    """Raise ValueError for a choice that is no expert; looks at the values, so on a CPU only."""
    if index.numel() == 0 or index.device.type != "cpu":
        return
    values = index.detach().numpy()
    for value in (int(values.min()), int(values.max())):
        if not 0 <= value < experts:
            raise ValueError(f"expert_index has {value}, but there are experts 0 to {experts - 1}")
