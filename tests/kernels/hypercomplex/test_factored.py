# SPDX-License-Identifier: Apache-2.0
"""Weights of low rank, (left_i right_iᵀ), given as a pair; and one term alone, KronA."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budgets import all_within_budget, assert_same_dtypes, keep
from draws import DEVICE, drawing
from marks import CUDA

from samfast.counters import count, saved_bytes
from samfast.functional import hypercomplex_linear, kronecker_weight
from samfast.kernels._common.budget import Budget
from samfast.kernels.hypercomplex import costs
from samfast.kernels.hypercomplex.factored import by_factors

from .cases import runnable

BACKENDS = ("torch", "cpu", "triton", CUDA)
NAMES = ("y", "dx", "drules", "dleft", "dright", "dbias", "dbase")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A call with factored weights; base: None, "frozen" or "trained"."""

    n: int
    rows: int
    columns: int
    rank: int
    products: bool  # by LoRA's products
    base: str | None = None
    terms: int | None = None

    @property
    def id(self):
        beside = f"-{self.base}-base" if self.base else ""
        return f"n{self.n}-{self.rows}x{self.columns}-k{self.rank}{beside}"

    def tensors(self, dtype, parameters=None):
        """x, rules, left, right, bias, base, and dy."""
        draw, terms = drawing(4), self.terms or self.n
        inputs, outputs = self.n * self.columns, self.n * self.rows
        made = [
            draw(3, 7, inputs),
            draw(terms, self.n, self.n, divisor=self.n**0.5),
            draw(terms, self.rows, self.rank, divisor=self.rank**0.5),
            draw(terms, self.columns, self.rank, divisor=inputs**0.5),
            draw(outputs),
            draw(outputs, inputs, divisor=inputs**0.5),
        ]
        kinds = [dtype, *[parameters or dtype] * 4, dtype]
        made = [
            t.to(DEVICE, parameters or dtype).to(kind).requires_grad_()
            for t, kind in zip(made, kinds, strict=True)
        ]
        made[5] = None if self.base is None else made[5].requires_grad_(self.base == "trained")
        return made, draw(3, 7, outputs).to(DEVICE, dtype)

    def call(self, made, backend):
        x, rules, left, right, bias, base = made
        return hypercomplex_linear(
            x, rules, (left, right), bias, base=base, scaling=0.5, backend=backend
        )

    def run(self, dtype, backend, parameters=None):
        made, dy = self.tensors(dtype, parameters)
        if backend != "literal":
            y = self.call(made, backend)
        else:
            x, rules, left, right, bias, base = made
            wide = torch.promote_types(dtype, torch.float32)
            parts = zip(rules.to(wide), left.to(wide), right.to(wide), strict=True)
            h = 0.5 * sum(torch.kron(a, u @ v.mT) for a, u, v in parts)
            h = h if base is None else base.to(wide) + h
            y = F.linear(x, h.to(dtype), bias.to(dtype))
        wanted = [t for t in made if t is not None and t.requires_grad]
        return [y, *torch.autograd.grad(y, wanted, dy)]


CASES = [
    Pair(4, 12, 10, 1, True),
    Pair(3, 1, 5, 1, False),
    Pair(2, 9, 7, 5, False),
    Pair(2, 16, 24, 1, True, "frozen"),
    Pair(2, 6, 5, 2, False, "frozen"),
    Pair(2, 9, 14, 1, False, "trained"),
    Pair(3, 40, 30, 2, True, terms=2),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := runnable(request.param):
        pytest.skip(reason)
    return request.param


@pytest.mark.slow_on_cpu(*(f"triton-{case.id}" for i, case in enumerate(CASES) if i not in (1, 3)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values(case, dtype, backend):
    """Of all gradients, with parameters of x's dtype and float32 ones beside a narrow x."""
    for parameters in {dtype, torch.float32}:
        exact = partial(case.run, torch.float64, "literal")
        stock = partial(case.run, dtype, "literal", parameters)
        ours = case.run(dtype, backend, parameters)
        budget = all_within_budget(ours, stock, exact, dtype, NAMES[: len(ours)])
        assert_same_dtypes(ours, budget)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_which_way_is_taken(case):
    """By what is counted, and the same with and without autograd."""
    made, _ = case.tensors(torch.float32)
    rules, left, right, base = *made[1:4], made[5]
    assert by_factors(rules, left, right, base) == case.products
    with torch.no_grad():
        y = case.call(made, "torch")
    assert torch.equal(y, case.call(made, "torch"))
    sizes = case.n * case.columns, case.n * case.rows, case.n, case.terms or case.n, case.rank
    factored, built = costs.token(*sizes, None if base is None else base.requires_grad)
    assert (factored < built) == case.products


def test_products_make_no_matrix():
    """FLOP are the products', and nothing of a matrix's size is saved."""
    case = Pair(4, 48, 40, 1, True)
    (x, rules, left, right, _, _), dy = case.tensors(torch.float32)
    leaves = (x, rules, left, right)

    def step():
        y = hypercomplex_linear(x, rules, (left, right), backend="torch")
        torch.autograd.grad(y, leaves, dy)

    tokens, inputs, outputs = 21, 160, 192
    token, built = costs.token(inputs, outputs, 4, 4, 1)
    in_parameters = 4 * 16 * 4 * 48  # of the rules' gradient
    assert count(step).flops <= 2 * (tokens * token + in_parameters) < 2 * tokens * built
    saved = saved_bytes(
        lambda: hypercomplex_linear(x, rules, (left, right), backend="torch"), leaves
    )
    assert saved.hooks == saved.living == 4 * 16 * (tokens + inputs + outputs)


@pytest.mark.slow_on_cpu
def test_gradcheck():
    for case in (
        Pair(2, 6, 5, 1, True),
        Pair(2, 2, 3, 2, False),
        Pair(2, 6, 8, 1, True, "frozen", 1),
    ):
        made, _ = case.tensors(torch.float64)
        rules, left, right, base = *made[1:4], made[5]
        assert by_factors(rules, left, right, base) == case.products
        assert torch.autograd.gradcheck(
            lambda *t, b=base, c=case: c.call([*t, b], "torch"), made[:5]
        )
    assert torch.autograd.gradcheck(
        lambda a, u, v: kronecker_weight(a, (u, v), scaling=0.5, backend="torch"),
        (rules, left, right),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight(dtype, backend):
    """kronecker_weight of a pair and its gradients, of the widest dtype."""
    made, _ = Pair(2, 6, 5, 2, False).tensors(dtype)
    dh = torch.randn(12, 10, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def run(name, kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in made[1:4]]
        if name == "literal":
            wide = torch.promote_types(kind, torch.float32)
            parts = zip(*(t.to(wide) for t in leaves), strict=True)
            h = 0.5 * sum(torch.kron(a, u @ v.mT) for a, u, v in parts).to(kind)
        else:
            h = kronecker_weight(leaves[0], leaves[1:], scaling=0.5, backend=name)
        return [h, *torch.autograd.grad(h, leaves, dh.to(kind))]

    stock, exact = (partial(run, "literal", t) for t in (dtype, torch.float64))
    budget = Budget(stock, exact, dtype)
    for by in (backend, "reference"):
        ours = run(by, dtype)
        assert {t.dtype for t in ours} == {dtype}
        assert_same_dtypes(ours, budget)
        keep(budget, ours, ("h", "drules", "dleft", "dright"))


def test_krona(backend):
    """One rule and one weight beside a frozen base: y = x (W + s · A ⊗ B)ᵀ, from zero on."""
    draw = drawing(0)
    x, a, b, w, dy = (draw(*shape) for shape in ((5, 12), (3, 3), (6, 4), (18, 12), (5, 18)))

    def run(dtype, by):
        leaves = [t.to(dtype).requires_grad_() for t in (x, a, b)]
        if by == "kron":
            y = F.linear(leaves[0], w.to(dtype) + 2.0 * torch.kron(*leaves[1:]))
        else:
            rules, weights = (t[None] for t in leaves[1:])
            y = hypercomplex_linear(
                leaves[0], rules, weights, base=w.to(dtype), scaling=2.0, backend=by
            )
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    ours = run(torch.float32, backend)
    stock, exact = (partial(run, t, "kron") for t in (torch.float32, torch.float64))
    all_within_budget(ours, stock, exact, torch.float32, ("y", "dx", "da", "db"))
    start = [t.float() for t in (x, a[None], 0 * b[None], w)]
    y = hypercomplex_linear(*start[:3], base=start[3], backend=backend)
    assert torch.equal(y, F.linear(start[0], start[3]))


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (
            (torch.zeros(2, 3, 1),),
            r"weights is a tuple of 1, but must be a tensor or the pair \(le",
        ),
        ((torch.zeros(2, 3, 1), None), "weights is a tuple of 2, but must be a tensor or"),
        ((torch.zeros(2, 3, 1), torch.zeros(2, 4, 2)), r"right has shape \(2, 4, 2\), but 2 terms"),
        ((torch.zeros(3, 3, 1), torch.zeros(2, 4, 1)), r"left has shape \(3, 3, 1\), but 2 terms"),
        ((torch.zeros(2, 3, 1), torch.zeros(2, 5, 1)), "rules and weights take 10 inputs"),
    ],
)
def test_sentences(weights, sentence):
    rules = torch.zeros(2, 2, 2)
    with pytest.raises(ValueError, match=sentence):
        hypercomplex_linear(torch.zeros(1, 8), rules, weights)
    if "inputs" not in sentence:
        with pytest.raises(ValueError, match=sentence):
            kronecker_weight(rules, weights)
