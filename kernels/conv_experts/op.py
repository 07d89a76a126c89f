# SPDX-License-Identifier: Apache-2.0
"""``conv_experts``: backend choice, operator schemas, autograd and the public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import check_devices, check_dtypes
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.operator import Operator
from samfast.kernels._common.table import Table
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import reference

MAX_RATIO = 4096  # enlarged positions are int32 in the kernels
ACTIVATIONS = ("gelu", "none")
TABLE = Table("conv_experts", __package__, native="conv_experts_forward")


def supports(backend: str, h: Tensor, weight: Tensor) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not."""
    if backend == "cuda":
        from samfast.kernels.conv_experts import cuda_path

        return cuda_path.missing(h, weight)
    missing = TABLE.missing(backend, h.device, h=h.dtype)
    if missing is not None or backend != "triton":
        return missing
    from samfast.kernels.conv_experts import triton_kernels

    experts, rank = weight.shape[:2]
    if rank > triton_kernels.MAX_RANK:
        return f"rank {rank} is above {triton_kernels.MAX_RANK}, the widest tile"
    if experts > triton_kernels.MAX_EXPERTS:
        return f"{experts} experts are more than the {triton_kernels.MAX_EXPERTS} the kernels take"
    return None


_OPTIONS = "SymInt[] windows, int[] ratios, bool residual, str activation"


class ConvExperts(Operator):
    """Saves h and the choices; what the activation saw is computed again.

    h, dz: (tokens, r) in image order   z_pad, dz_pad: (batch · pads, r), see _common/windows.py
    daux, dpool, dgate: the loss's gradient with respect to h and the gate, of Conv-LoRA's layer
    """

    name = "conv_experts"
    inputs = f"Tensor h, Tensor weight, Tensor bias, Tensor index, {_OPTIONS}, str backend"
    makes = "Tensor z, Tensor z_pad"
    returns = "z"
    backward_inputs = (
        f"Tensor dz, Tensor? dz_pad, Tensor h, Tensor weight, Tensor bias, Tensor index, "
        f"{_OPTIONS}, Tensor? daux, Tensor? dpool, Tensor? dgate, bool[] needs, str backend"
    )
    gradients = "h weight+bias"

    @staticmethod
    def path(backend, h, weight, **_):
        return TABLE.path(backend, h.device, lambda b: supports(b, h, weight))

    @staticmethod
    def forward(path, h, weight, bias, index, windows, ratios, residual, activation):
        check_index(index, len(ratios))
        return path.forward(
            h, weight, bias, index, Windows(*windows), tuple(ratios), residual, activation
        )

    @staticmethod
    def backward(path, dz, dz_pad, h, weight, bias, index, *rest):
        windows, ratios, residual, activation, daux, dpool, dgate, needs = rest
        balance = None if daux is None else (daux, dpool, dgate)
        return list(
            path.backward(
                dz, dz_pad, h, weight, bias, index, Windows(*windows), tuple(ratios), residual,
                activation, balance, tuple(needs),
            )
        )  # fmt: skip

    @staticmethod
    def fake(h, weight, bias, index, windows, *_):
        windows = Windows(*windows)
        rows = windows.tokens, windows.batch * windows.pads
        return tuple(h.new_empty(count, h.shape[1]) for count in rows)

    @classmethod
    def fake_backward(cls, *inputs):
        made, dgate = super().fake_backward(*inputs), inputs[12]
        gates = [] if dgate is None else [dgate.new_empty(dgate.shape[1:]) for _ in range(2)]
        return made + gates


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
    """Send each sample through one convolution at one scale (Conv-LoRA, Zhong et al. 2024).

    h: (N, H, W, r)   weight: (M, r, r / groups, 3, 3)   bias: (M, r)
    expert_index: (N,) int64, the expert of each sample   ratios: M whole numbers of at least 1
    out: (N, H, W, r) = residual · h + shrink(act(conv3×3(enlarge(h; s)))) with s = ratios[expert];
        both resamples are torch's bicubic, the convolution pads with zeros, act is the erf GELU.

    groups: 1, or r for depthwise experts. activation: "gelu" or "none".
    The result has h's dtype; arithmetic is float32 (float64 for float64). The enlarged map never
    exists: only the points that the shrinking reads are computed.
    Saves h and expert_index. Raises ValueError when shapes, ratios or choices do not fit, and
    RuntimeError when a backend asked for by name cannot run. Choices on a GPU are not read back: a
    sample whose choice is out of range becomes NaN.

        z = conv_experts(h, weight, bias, expert_index, ratios=range(1, 9))

    >>> import torch
    >>> from samfast.functional import conv_experts
    >>> h, weight, bias = torch.randn(2, 14, 14, 3), torch.randn(8, 3, 3, 3, 3), torch.zeros(8, 3)
    >>> conv_experts(h, weight, bias, torch.tensor([0, 5]), range(1, 9)).shape
    torch.Size([2, 14, 14, 3])
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
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    check_devices({"h": h, "weight": weight, "bias": bias, "expert_index": expert_index})
    check_dtypes({"h": h})
    if 0 in h.shape[1:3]:
        raise ValueError(f"h has shape {tuple(h.shape)}, but H and W must be at least 1")
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
    """Raise ValueError when the experts' sizes do not fit together."""
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
            f"expected {experts} ratios, one for each expert of weight, got {len(ratios)}: "
            f"{tuple(ratios)}"
        )
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 1:
            raise ValueError(f"ratios has {ratio!r}, which is not a whole number of at least 1")
        if ratio > MAX_RATIO:
            raise ValueError(f"ratios has {ratio}, but the largest is {MAX_RATIO}")


def check_index(index: Tensor, experts: int) -> None:
    """Raise ValueError when a choice is not an expert; reads the values, so only on a CPU."""
    if index.numel() == 0 or index.device.type != "cpu":
        return
    values = index.detach().numpy()
    for value in (int(values.min()), int(values.max())):
        if not 0 <= value < experts:
            raise ValueError(f"expert_index has {value}, but there are experts 0 to {experts - 1}")
