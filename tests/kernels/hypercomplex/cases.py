# SPDX-License-Identifier: Apache-2.0
"""Inputs for the products and the backends that run on this machine."""

import dataclasses

import torch

from samfast.functional import hypercomplex_linear
from samfast.kernels.hypercomplex import kronecker_factors
from samfast.kernels.hypercomplex.op import supports

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("y", "dx", "drules", "dweights", "dbias", "dbase")
FACTOR_NAMES = ("lora_a", "lora_b", "drules", "dleft", "dright")


def draw(generator, *shape, divisor=1.0):
    return torch.randn(*shape, generator=generator, dtype=torch.float64) / divisor


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes and options; tensors are drawn from a seed, in float64."""

    n: int = 4
    rows: int = 9  # P
    columns: int = 5  # Q
    terms: int | None = None  # n, if not given
    tokens: tuple[int, ...] = (3, 7)
    scaling: float = 1.0
    bias: bool = True
    base: bool = False
    whole: bool = False  # small whole numbers, so that every sum is exact

    @property
    def id(self):
        terms = "" if self.terms is None else f"-m{self.terms}"
        return f"n{self.n}{terms}-{self.rows}x{self.columns}" + ("-base" if self.base else "")

    def tensors(self, dtype, parameter_dtype=None):
        """x, rules, weights, bias, base as leaves that want gradients or None, and dy."""
        generator = torch.Generator().manual_seed(5)
        terms, inputs, outputs = self.terms or self.n, self.n * self.columns, self.n * self.rows
        x = draw(generator, *self.tokens, inputs)
        rules = draw(generator, terms, self.n, self.n, divisor=self.n**0.5)
        weights = draw(generator, terms, self.rows, self.columns, divisor=inputs**0.5)
        bias = draw(generator, outputs) if self.bias else None
        base = draw(generator, outputs, inputs, divisor=inputs**0.5) if self.base else None
        dy = draw(generator, *self.tokens, outputs)
        leaves = [x, rules, weights, bias, base]
        if self.whole:
            *leaves, dy = (None if t is None else (3 * t).round() for t in (*leaves, dy))
        kinds = [dtype] + [parameter_dtype or dtype] * 4
        leaves = [
            None if t is None else t.to(DEVICE, kind).requires_grad_()
            for t, kind in zip(leaves, kinds, strict=True)
        ]
        return leaves, dy.to(DEVICE, dtype)

    def call(self, leaves, backend):
        x, rules, weights, bias, base = leaves
        return hypercomplex_linear(
            x, rules, weights, bias, base=base, scaling=self.scaling, backend=backend
        )

    def run(self, dtype, backend, parameter_dtype=None):
        """y and all gradients, empty where there is no such tensor."""
        leaves, dy = self.tensors(dtype, parameter_dtype)
        y = self.call(leaves, backend)
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
        return [y, *(y.new_empty(0) if t is None else next(grads) for t in leaves)]


@dataclasses.dataclass(frozen=True)
class Factors:
    """One call of kronecker_factors and the gradients of both factors."""

    n: int = 4
    rows: int = 9
    columns: int = 5
    rank: int = 1
    terms: int | None = None

    @property
    def id(self):
        terms = "" if self.terms is None else f"-m{self.terms}"
        return f"n{self.n}{terms}-{self.rows}x{self.columns}-k{self.rank}"

    def tensors(self, dtype):
        generator, terms = torch.Generator().manual_seed(6), self.terms or self.n
        sizes = [(terms, self.n, self.n), (terms, self.rows, self.rank)]
        sizes += [(terms, self.columns, self.rank)]
        width = terms * self.n * self.rank
        incoming = [(width, self.n * self.columns), (self.n * self.rows, width)]
        made = [draw(generator, *size).to(DEVICE, dtype) for size in (*sizes, *incoming)]
        return [t.requires_grad_() for t in made[:3]], made[3:]

    def run(self, dtype, backend):
        leaves, incoming = self.tensors(dtype)
        made = kronecker_factors(*leaves, backend)
        return [*made, *torch.autograd.grad(made, leaves, incoming)]


def runnable(backend: str) -> str | None:
    """None when the backend runs on this machine's test device, else the sentence why not."""
    part = torch.empty(4, 4, 4, device=DEVICE)
    return supports(backend, DEVICE, torch.float32, part, part)
