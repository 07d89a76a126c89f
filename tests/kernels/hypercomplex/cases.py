# SPDX-License-Identifier: Apache-2.0
"""Inputs for the products and the backends that run on this machine."""

import dataclasses

import torch
from draws import drawing

from samfast.functional import hypercomplex_linear, kronecker_weight
from samfast.kernels.hypercomplex import example, kronecker_factors

from ..operation import Operation, runnable_by

NAMES = ("y", "dx", "drules", "dweights", "dbias", "dbase")
FACTOR_NAMES = ("lora_a", "lora_b", "drules", "dleft", "dright")
runnable = runnable_by(example)


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
        draw, terms = drawing(5), self.terms or self.n
        inputs, outputs = self.n * self.columns, self.n * self.rows
        x = draw(*self.tokens, inputs)
        rules = draw(terms, self.n, self.n, divisor=self.n**0.5)
        weights = draw(terms, self.rows, self.columns, divisor=inputs**0.5)
        bias = draw(outputs) if self.bias else None
        base = draw(outputs, inputs, divisor=inputs**0.5) if self.base else None
        dy = draw(*self.tokens, outputs)
        leaves = [x, rules, weights, bias, base]
        if self.whole:
            *leaves, dy = (None if t is None else (3 * t).round() for t in (*leaves, dy))
        kinds = [dtype] + [parameter_dtype or dtype] * 4
        leaves = [
            None if t is None else t.to(kind).requires_grad_()
            for t, kind in zip(leaves, kinds, strict=True)
        ]
        return leaves, dy.to(dtype)

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
        draw, terms = drawing(6, dtype), self.terms or self.n
        sizes = [(terms, self.n, self.n), (terms, self.rows, self.rank)]
        sizes += [(terms, self.columns, self.rank)]
        width = terms * self.n * self.rank
        incoming = [(width, self.n * self.columns), (self.n * self.rows, width)]
        made = [draw(*size) for size in (*sizes, *incoming)]
        return [t.requires_grad_() for t in made[:3]], made[3:]

    def run(self, dtype, backend):
        leaves, incoming = self.tensors(dtype)
        made = kronecker_factors(*leaves, backend)
        return [*made, *torch.autograd.grad(made, leaves, incoming)]


def linear(case, way=""):
    """The tensors that the case has, in their order."""

    def call(tensors, backend):
        given = iter(tensors)
        there = (True, True, True, case.bias, case.base)
        return [case.call([next(given) if t else None for t in there], backend)]

    def kept(tensors, wanted):
        parts = {1, 2, 4} if case.bias else {1, 2, 3}
        return tensors[0].nbytes if wanted & parts else 0, 0

    return Operation(
        "hypercomplex_linear",
        way,
        lambda dtype: [t for t in case.tensors(dtype)[0] if t is not None],
        call,
        runnable,
        BACKENDS,
        kept,
        apart=tuple((i,) for i in range(3 + case.bias)),  # the base's is made for the parts'
        autocast="result",
    )


def weight(case, way=""):
    def call(tensors, backend):
        return [kronecker_weight(*tensors, scaling=case.scaling, backend=backend)]

    return Operation(
        "kronecker_weight",
        way,
        lambda dtype: case.tensors(dtype)[0][1:3],
        call,
        runnable,
        BACKENDS,
        kept=lambda tensors, wanted: (0, 0),
        activations=0,
    )


def factors(case):
    return Operation(
        "kronecker_factors",
        "",
        lambda dtype: case.tensors(dtype)[0],
        lambda tensors, backend: kronecker_factors(*tensors, backend),
        runnable,
        ("torch", "triton"),
        kept=lambda tensors, wanted: (0, 0),
        activations=0,
    )


BACKENDS = ("torch", "cpu", "triton", "cuda")
CASE = Case(n=3, rows=4, columns=5, base=True, scaling=0.5)
OPERATIONS = [
    linear(CASE),
    linear(Case(n=3, rows=4, columns=5, bias=False), "plain"),
    weight(CASE),
    factors(Factors(n=3, rows=2, columns=3, rank=2)),
]
FINITE = [factors(Factors(n=3, rows=2, columns=3, rank=2))]
for n in (2, 3, 4, 8, 16):
    small = Case(n, 1, 1, min(n, 3) if n < 16 else 1, tokens=(2,), base=n == 3, scaling=0.5)
    FINITE += [linear(small, f"n{n}"), weight(small, f"n{n}")]
