# SPDX-License-Identifier: Apache-2.0
"""Inputs for lora_linear and the backends that run on this machine."""

import dataclasses

import torch
from draws import DEVICE

from samfast.functional import lora_linear
from samfast.kernels.lora_linear import example

from ..operation import Operation, runnable_by

NAMES = ("y", "dx", "dweight", "dbias", "dlora_a", "dlora_b")
runnable = runnable_by(example)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes and options; tensors are drawn from a seed, in float64."""

    shape: tuple[int, ...] = (3, 7, 33)
    out: int = 48
    rank: int = 4
    slices: tuple | None = None
    shared: bool = False
    dropout: float = 0.0
    bias: bool = True
    scaling: float = 0.7
    whole: bool = False  # whole numbers from -8 to 8 in place of normal ones

    @property
    def id(self):
        name = f"{'x'.join(map(str, self.shape))}-to-{self.out}-r{self.rank}"
        name += f"-{len(self.slices)}slices" if self.slices else ""
        name += "-shared" if self.shared else ""
        name += "-dropout" if self.dropout else ""
        return name + ("" if self.bias else "-nobias")

    def tensors(self, dtype, adapter_dtype=None, device=DEVICE):
        """x, weight, bias, lora_a, lora_b as leaves that want gradients, and dy."""
        generator = torch.Generator().manual_seed(5)

        def draw(*shape, divisor=1.0):
            if self.whole:
                return torch.randint(-8, 9, shape, generator=generator).double()
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / divisor

        n = len(self.slices) if self.slices else 1
        length = self.slices[0][1] - self.slices[0][0] if self.slices else self.out
        features = self.shape[-1]
        root = features**0.5
        x, weight = draw(*self.shape), draw(self.out, features, divisor=root)
        bias = draw(self.out) if self.bias else None
        a = draw(self.rank if self.shared else n * self.rank, features, divisor=root)
        b, dy = draw(n * length, self.rank), draw(*self.shape[:-1], self.out)
        adapter = adapter_dtype or dtype
        base = [t if t is None else t.to(device, dtype) for t in (x, weight, bias)]
        base += [t.to(device, adapter) for t in (a, b)]
        return [t if t is None else t.requires_grad_() for t in base], dy.to(device, dtype)

    def run(self, dtype, backend, adapter_dtype=None):
        """[y, dx, dweight, dbias, dlora_a, dlora_b]; without a bias its gradient is empty."""
        leaves, dy = self.tensors(dtype, adapter_dtype)
        seed = torch.tensor([0x1234_5678_9ABC_DEF], device=DEVICE)
        y = lora_linear(
            *leaves,
            self.scaling,
            dropout=self.dropout,
            seed=seed,
            slices=self.slices,
            backend=backend,
        )
        wanted = [t for t in leaves if t is not None]
        grads = list(torch.autograd.grad(y, wanted, dy))
        if not self.bias:
            grads.insert(2, y.new_empty(0))
        return [y, *grads]


def operation(case, way):
    """A seed is drawn in every call that needs one."""

    def call(tensors, backend):
        y = lora_linear(
            *tensors, case.scaling, dropout=case.dropout, slices=case.slices, backend=backend
        )
        return [y]

    def kept(tensors, wanted):
        """x for a gradient of a matrix of its width, h for lora_b's, and a seed."""
        x, a = tensors[0], tensors[3]
        h = x.nbytes // x.shape[-1] * a.shape[0] if 4 in wanted else 0
        return x.nbytes if wanted & {1, 3} else 0, h + (8 if case.dropout else 0)

    return Operation(
        "lora_linear",
        way,
        lambda dtype: case.tensors(dtype)[0],
        call,
        runnable,
        ("torch", "cpu", "triton"),
        kept,
        autocast="result",
    )


SLICES = ((0, 6), (12, 18))
OPERATIONS = [
    operation(Case(shape=(3, 5, 12), out=18, rank=2, scaling=0.5), ""),
    operation(Case((3, 5, 12), 18, rank=2, slices=SLICES, dropout=0.3, scaling=0.5), "slices"),
]
FINITE = [
    operation(Case(shape=(2, 3, 6), out=9, rank=2), ""),
    operation(Case(shape=(2, 6), out=9, rank=2, slices=((0, 3), (6, 9)), dropout=0.3), "slices"),
    operation(Case(shape=(2, 6), out=9, rank=2, slices=((0, 3), (6, 9)), shared=True), "shared"),
]
