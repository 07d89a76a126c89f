# SPDX-License-Identifier: Apache-2.0
"""``expert_gate``: backend choice, operator schemas, autograd and the public function."""

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import check_devices
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.operator import Operator
from samfast.kernels._common.table import Table
from samfast.kernels._common.windows import Windows
from samfast.kernels.expert_gate import reference

_ABSENT = "it has no native source; torch runs it on a CPU and triton on a GPU"
TABLE = Table("expert_gate", __package__, absent={"cpu": _ABSENT, "cuda": _ABSENT})


def supports(backend: str, h: Tensor, w_gate: Tensor) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not."""
    missing = TABLE.missing(backend, h.device, h=h.dtype)
    if missing is not None or backend != "triton":
        return missing
    from samfast.kernels.expert_gate import triton_kernels

    rank, experts = w_gate.shape
    if rank > triton_kernels.MAX_RANK:
        return f"rank {rank} is above {triton_kernels.MAX_RANK}, the widest tile"
    if experts > triton_kernels.MAX_EXPERTS:
        return f"{experts} experts are more than the {triton_kernels.MAX_EXPERTS} the kernels take"
    return None


class ExpertGate(Operator):
    """Saves the loss's gradient: r numbers a sample and 2·r·M for the weights."""

    name = "expert_gate"
    inputs = (
        "Tensor h, Tensor w_gate, Tensor w_noise, Tensor? noise, Tensor? index, SymInt[] windows, "
        "float coefficient, str backend"
    )
    makes = "Tensor chosen, Tensor loss, Tensor dpool, Tensor dgate"
    returns = "loss chosen"
    labels = "(Tensor loss, Tensor index)"
    backward_inputs = "Tensor dloss, Tensor dpool, Tensor dgate, SymInt[] windows, bool[] needs"
    gradients = casts = "h w_gate w_noise"
    has_backward = False  # it is three products, which torch makes

    @staticmethod
    def path(backend, h, w_gate, **_):
        return TABLE.path(backend, h.device, lambda b: supports(b, h, w_gate))

    @staticmethod
    def forward(path, h, w_gate, w_noise, noise, index, windows, coefficient):
        return path.forward(h, w_gate, w_noise, noise, index, Windows(*windows), coefficient)

    @staticmethod
    def backward(path, dloss, dpool, dgate, windows, needs):
        dh, windows = None, Windows(*windows)
        if needs[0]:
            size = (windows.samples, windows.height, windows.width, dpool.shape[1])
            dh, _ = windows.paste((dloss * dpool)[:, None, None, :].expand(size))
        pairs = zip(dgate.unbind(), needs[1:], strict=True)
        return [dh, *(dloss * part if need else None for part, need in pairs)]

    @staticmethod
    def fake(h, w_gate, w_noise, noise, index, windows, coefficient, backend):
        samples = Windows(*windows).samples
        wide = torch.promote_types(h.dtype, torch.float32)
        return (
            h.new_empty(samples, dtype=torch.int64),
            h.new_empty((), dtype=wide),
            h.new_empty(samples, h.shape[1], dtype=wide),
            h.new_empty(2, *w_gate.shape, dtype=wide),
        )


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

    noise: (N, M) standard normal; in training drawn with ``generator`` if None
    expert_index: a choice made by the caller, returned unchanged
    All arithmetic is at least float32. The choice has no gradient; the loss has one in training.
    Saves the loss's gradient, N·r + 2·r·M numbers. Raises ValueError when shapes do not fit, and
    RuntimeError when a backend asked for by name cannot run.

        expert_index, loss = expert_gate(h, w_gate, w_noise, training=True)

    >>> import torch
    >>> from samfast.functional import expert_gate
    >>> h, w_gate, w_noise = torch.randn(25, 14, 14, 3), torch.zeros(3, 8), torch.zeros(3, 8)
    >>> chosen, loss = expert_gate(h, w_gate, w_noise, training=True)
    >>> chosen.shape, loss.shape
    (torch.Size([25]), torch.Size([]))
    """
    if h.dim() != 4 or 0 in h.shape[1:]:
        raise ValueError(f"h has shape {tuple(h.shape)}, but must be (N, H, W, rank) with pixels")
    check_gate(h.shape[0], h.shape[3], w_gate, w_noise, noise, expert_index)
    check_devices({"h": h, "w_gate": w_gate, "noise": noise, "expert_index": expert_index})
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
    """Raise ValueError when the gate's sizes do not fit together."""
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
