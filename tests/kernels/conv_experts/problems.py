# SPDX-License-Identifier: Apache-2.0
"""Whole calls of a conv_experts path: windows with padding, forced experts, a balance's share."""

import dataclasses

import torch
from draws import drawing

from samfast import backends
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import reference

RESULTS = ("z", "z_pad", "dh", "dweight", "dbias", "dw_gate", "dw_noise")


def not_interpreted() -> str | None:
    """None when interpreted kernels run here, or the sentence that says why they do not."""
    if torch.cuda.is_available():
        return "kernels are compiled, not interpreted, beside a GPU"
    return backends.triton_missing(torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One forward and backward; tensors are drawn from a seed, in float64.

    index None routes samples in turn.
    """

    windows: Windows
    rank: int = 2
    ratios: tuple[int, ...] = (2, 3)
    depthwise: bool = False
    index: tuple[int, ...] | None = None
    residual: bool = True
    activation: str = "gelu"

    @property
    def id(self):
        name = "x".join(map(str, self.windows))
        name += f"-r{self.rank}-{''.join(map(str, self.ratios))}"
        return name + ("-depthwise" if self.depthwise else "")

    def choices(self):
        experts = len(self.ratios)
        index = self.index or tuple(n % experts for n in range(self.windows.samples))
        return torch.tensor(index, dtype=torch.int64)

    def tensors(self, dtype, weight_dtype):
        """h, weight, bias, dz, dz_pad and the balance (daux, dpool, dgate)."""
        draw = drawing(13, dtype, "cpu")
        windows, rank, experts = self.windows, self.rank, len(self.ratios)
        h, dz = draw(windows.tokens, rank), draw(windows.tokens, rank)
        dz_pad = draw(windows.batch * windows.pads, rank)
        weight = draw(experts, rank, 1 if self.depthwise else rank, 3, 3, dtype=torch.float64)
        weight = (0.4 * weight).to(weight_dtype)
        bias = draw(experts, rank, dtype=weight_dtype)
        balance = (draw(1)[0], draw(windows.samples, rank), draw(2, rank, experts))
        wide = torch.promote_types(dtype, torch.float32)
        return h, weight, bias, dz, dz_pad, tuple(t.to(wide) for t in balance)

    def run(self, path, dtype, weight_dtype=None):
        """RESULTS of a path's forward and backward."""
        tensors = self.tensors(dtype, weight_dtype or torch.promote_types(dtype, torch.float32))
        h, weight, bias, dz, dz_pad, balance = tensors
        inputs = (h, weight, bias, self.choices(), self.windows, self.ratios, self.residual)
        z, z_pad = path.forward(*inputs, self.activation)
        grads = path.backward(dz, dz_pad, *inputs, self.activation, balance, (True, True))
        return [z, z_pad, *grads]

    def literal(self, dtype, weight_dtype=None):
        """RESULTS of the specification's autograd, the balance written out as a loss."""
        tensors = self.tensors(dtype, weight_dtype or torch.promote_types(dtype, torch.float32))
        h, weight, bias, dz, dz_pad, (daux, dpool, dgate) = tensors
        leaves = [t.requires_grad_() for t in (h, weight, bias)]
        windows = self.windows
        z = reference.conv_experts(
            windows.cut(h), weight, bias, self.choices(), self.ratios, residual=self.residual,
            activation=self.activation, groups=self.rank if self.depthwise else 1,
        )  # fmt: skip
        z, z_pad = windows.paste(z)
        loss = (z * dz).sum() + (z_pad * dz_pad).sum()
        loss = loss + daux * (windows.cut(h).to(dpool.dtype).sum((1, 2)) * dpool).sum()
        grads = torch.autograd.grad(loss, leaves)
        return [z, z_pad, *grads, daux * dgate[0], daux * dgate[1]]
