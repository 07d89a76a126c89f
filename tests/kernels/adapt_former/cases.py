# SPDX-License-Identifier: Apache-2.0
"""Inputs of the branch, and the literal modules with the same tensors."""

import dataclasses

import torch
import torch.nn.functional as F
from draws import DEVICE, drawing

from samfast.functional import adapt_former
from samfast.kernels._common.philox import keep_mask
from samfast.kernels.adapt_former import example

from ..operation import Operation, runnable_by

NAMES = example.RESULTS
BACKENDS = ("torch", "auto")
runnable = runnable_by(example)


@dataclasses.dataclass(frozen=True)
class Case:
    """shape: of x   mean, spread: of x   tensors are drawn from a seed, in float64

    No element of the bottleneck is near zero, where rounding decides what the ReLU lets through and
    a gradient jumps: its bias puts every other one on, and the others off. The golden files mix.
    """

    shape: tuple[int, ...] = (3, 5, 7, 40)
    bottleneck: int = 16
    dropout: float = 0.0
    mean: float = 0.0
    spread: float = 1.0
    eps: float = 1e-5

    @property
    def id(self):
        name = f"{'x'.join(map(str, self.shape))}-v{self.bottleneck}"
        return name + (f"-drop{self.dropout}" if self.dropout else "")

    @property
    def seed(self):
        return torch.tensor([2**61 + 3], device=DEVICE) if self.dropout else None

    def tensors(self, dtype, small=None):
        """The eight leaves and dy. small: dtype of all but x, base and dy."""
        draw, width, bottleneck = drawing(7, small or dtype), self.shape[-1], self.bottleneck
        x = self.mean + self.spread * draw(*self.shape, dtype=torch.float64)
        leaves = [x.to(dtype), draw(*self.shape, dtype=dtype), draw(width), draw(width)]
        signs = 1.0 - 2.0 * (torch.arange(bottleneck, device=DEVICE) % 2)
        leaves += [draw(bottleneck, width, divisor=4 * width**0.5)]
        leaves += [(signs * (2 + draw(bottleneck, divisor=5).abs())).to(small or dtype)]
        leaves += [draw(width, bottleneck, divisor=bottleneck**0.5), draw(width)]
        return [t.requires_grad_() for t in leaves], draw(*self.shape, dtype=dtype)

    def call(self, leaves, backend="auto"):
        if backend == "literal":
            return self.literal(*leaves)
        return adapt_former(
            *leaves, eps=self.eps, dropout=self.dropout, seed=self.seed, backend=backend
        )

    def literal(self, x, base, norm_weight, norm_bias, down, down_bias, up, up_bias):
        """By torch's own functions; all tensors in x's dtype."""
        n = F.layer_norm(x, self.shape[-1:], norm_weight, norm_bias, self.eps)
        z = F.relu(F.linear(n, down, down_bias))
        if self.dropout:
            rows = z.shape[:-1].numel()
            keep = keep_mask(self.seed, rows, self.bottleneck, self.dropout).view(z.shape)
            z = z * keep / (1 - self.dropout)
        return base + F.linear(z, up, up_bias)

    def run(self, dtype, backend, small=None):
        """Result and gradients, in the order of NAMES."""
        leaves, dy = self.tensors(dtype, small)
        y = self.call(leaves, backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def kept(tensors, wanted):
    """x, where it is needed, and z."""
    x, down = tensors[0], tensors[4]
    low = wanted & {0, 2, 3, 4, 5}
    z = x.nbytes // down.shape[1] * down.shape[0]
    return x.nbytes if low else 0, z if low or 6 in wanted else 0


def operation(case, way):
    return Operation(
        "adapt_former",
        way,
        lambda dtype: case.tensors(dtype)[0],
        lambda tensors, backend: [case.call(tensors, backend)],
        runnable,
        ("torch", "auto", "triton"),
        kept,
        activations=2,
        apart=((0,), *((i,) for i in range(2, 8))),  # base's is the incoming one
        autocast="products",
    )


OPERATIONS = [operation(Case(dropout=0.2), "")]
FINITE = [operation(Case(shape=(2, 2, 8), bottleneck=3, dropout=0.2), "")]
