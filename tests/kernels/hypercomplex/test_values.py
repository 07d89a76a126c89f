# SPDX-License-Identifier: Apache-2.0
"""Every backend against Σ torch.kron in float64: result and each gradient, under the budget."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget, within_budget
from draws import DEVICE
from marks import CUDA

from samfast.functional import hypercomplex_linear, kronecker_weight

from .cases import NAMES, Case, runnable

BACKENDS = ("torch", "cpu", "triton", CUDA)
CASES = [
    Case(n=2, rows=7, columns=31),
    Case(n=3, rows=1, columns=5, bias=False),
    Case(n=4, rows=1, columns=1, tokens=(5,)),  # a head on a bottleneck of four
    Case(n=4, rows=4, columns=4, tokens=(1, 1)),  # of sixteen
    Case(n=8, rows=5, columns=18, scaling=0.5),
    Case(n=16, rows=3, columns=17),
    Case(n=4, terms=1, rows=6, columns=20, base=True, scaling=2.0),  # KronA
    Case(n=3, terms=5, rows=11, columns=13, base=True, tokens=()),
    Case(n=5, terms=16, rows=2, columns=70),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := runnable(request.param):
        pytest.skip(reason)
    return request.param


def literal(case, dtype, parameter_dtype=None):
    """Plain autograd through torch.kron and F.linear, all in the dtype of x."""
    leaves, dy = case.tensors(dtype, parameter_dtype)
    x, rules, weights, bias, base = leaves
    wide = torch.promote_types(dtype, torch.float32)
    h = sum(torch.kron(a, s) for a, s in zip(rules.to(wide), weights.to(wide), strict=True))
    h = case.scaling * h + (0 if base is None else base.to(wide))
    y = torch.nn.functional.linear(x, h.to(dtype), None if bias is None else bias.to(dtype))
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    return [y, *(y.new_empty(0) if t is None else next(grads) for t in leaves)]


def check(case, dtype, backend):
    """In the dtype throughout, and with parameters that stay float32 beside a narrow x."""
    exact = partial(literal, case, torch.float64)
    for parameters in {dtype, torch.float32}:
        ours = case.run(dtype, backend, parameters)
        assert [t.dtype for t in ours[:2]] == [dtype] * 2
        assert {t.dtype for t in ours[2:] if t.numel()} == {parameters}
        all_within_budget(ours, partial(literal, case, dtype, parameters), exact, dtype, NAMES)


@pytest.mark.gpu("triton")  # interpreted in a test of its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values(case, dtype, backend):
    check(case, dtype, backend)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (CASES[2], torch.float32),
        (CASES[6], torch.bfloat16),
        pytest.param(CASES[6], torch.float16, marks=pytest.mark.slow),
        (Case(n=3, rows=3, columns=15, terms=2), torch.float32),
        (Case(n=16, rows=1, columns=3, terms=2), torch.float32),
        pytest.param(CASES[0], torch.float32, marks=pytest.mark.slow),
        pytest.param(CASES[4], torch.float16, marks=pytest.mark.slow),
        pytest.param(CASES[5], torch.float16, marks=pytest.mark.slow),
        pytest.param(CASES[7], torch.float32, marks=pytest.mark.slow),
        pytest.param(CASES[8], torch.float32, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "id", str(value)),
)
def test_interpreted(case, dtype):
    """The Triton kernels where no GPU is."""
    if reason := runnable("triton"):
        pytest.skip(reason)
    check(case, dtype, "triton")


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_float64_equals_the_sum_of_kronecker_products(n):
    case = Case(n=n, rows=5, columns=3, whole=True)
    for ours, exact in zip(
        case.run(torch.float64, "torch"), literal(case, torch.float64), strict=True
    ):
        assert torch.equal(ours, exact)


@pytest.mark.slow_on_cpu("triton-16")
@pytest.mark.parametrize("n", [2, 4, 16])
def test_whole_numbers_are_exact(n, backend):
    case = Case(n=n, rows=6, columns=19, terms=3, whole=True, base=True)
    for ours, exact in zip(
        case.run(torch.float32, backend), literal(case, torch.float64), strict=True
    ):
        assert torch.equal(ours.double(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weight(dtype, backend):
    """kronecker_weight and its gradients, the matrix rounded once."""
    (_, rules, weights, _, _), _ = Case(n=3, rows=10, columns=7).tensors(dtype)
    dh = torch.randn(30, 21, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def run(name, kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in (rules, weights)]
        h = kronecker_weight(*leaves, scaling=0.5, backend=name)
        return [h, *torch.autograd.grad(h, leaves, dh.to(kind))]

    stock, exact = (partial(run, "reference", t) for t in (dtype, torch.float64))
    ours = run(backend, dtype)
    all_within_budget(ours, stock, exact, dtype, ("h", "drules", "dweights"))
    rounded_once = lambda: run("reference", torch.float32)[0].to(dtype)  # noqa: E731
    within_budget(ours[0], rounded_once, lambda: exact()[0], dtype)


@pytest.mark.parametrize(
    "signs",
    [[1, -1, -1, -1], [0.5, 2.0, -3.0, 1.0]],
)
def test_the_hamilton_product(signs):
    """With a quaternion's rules, one token of four numbers is multiplied as Hamilton wrote it."""
    # 1, i, j, k as matrices that act on (1, i, j, k) from the left
    rules = torch.zeros(4, 4, 4, dtype=torch.float64)
    table = {  # (factor, factor): (product, sign)
        (0, 0): (0, 1), (0, 1): (1, 1), (0, 2): (2, 1), (0, 3): (3, 1),
        (1, 0): (1, 1), (1, 1): (0, -1), (1, 2): (3, 1), (1, 3): (2, -1),
        (2, 0): (2, 1), (2, 1): (3, -1), (2, 2): (0, -1), (2, 3): (1, 1),
        (3, 0): (3, 1), (3, 1): (2, 1), (3, 2): (1, -1), (3, 3): (0, -1),
    }  # fmt: skip
    for (one, other), (product, sign) in table.items():
        rules[one, product, other] = sign
    q = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    p = torch.tensor(signs, dtype=torch.float64)
    y = hypercomplex_linear(p, rules, q.view(4, 1, 1), backend="torch")
    a1, b1, c1, d1 = q.tolist()
    a2, b2, c2, d2 = p.tolist()
    expected = [
        a1 * a2 - b1 * b2 - c1 * c2 - d1 * d2,
        a1 * b2 + b1 * a2 + c1 * d2 - d1 * c2,
        a1 * c2 - b1 * d2 + c1 * a2 + d1 * b2,
        a1 * d2 + b1 * c2 - c1 * b2 + d1 * a2,
    ]
    assert y.tolist() == expected


def test_many_positions(backend, monkeypatch):
    """More tiles than programs, so that a program has several."""
    if backend == "triton":
        from samfast.kernels.hypercomplex import triton_kernels

        monkeypatch.setattr(triton_kernels, "PROGRAMS", 3)
    case = Case(n=2, rows=11, columns=13, tokens=(40,))
    stock, exact = (partial(literal, case, t) for t in (torch.float32, torch.float64))
    all_within_budget(case.run(torch.float32, backend), stock, exact, torch.float32, NAMES)


def test_the_sum_over_many_positions_is_as_exact_as_torch(backend):
    """drules adds up as many products as a cell has positions; of one sign they show each loss."""
    size = 512 if backend != "triton" or DEVICE.type == "cuda" else 24
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(2, size, size, generator=generator).to(DEVICE).requires_grad_()
    rules = torch.rand(2, 2, 2, generator=generator).to(DEVICE).requires_grad_()
    dh = torch.rand(2 * size, 2 * size, generator=generator).to(DEVICE)

    def run(name, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (rules, weights)]
        return torch.autograd.grad(kronecker_weight(*leaves, backend=name), leaves, dh.to(dtype))

    stock, exact = (partial(run, "reference", t) for t in (torch.float32, torch.float64))
    ours = run(backend, torch.float32)
    all_within_budget(ours, stock, exact, torch.float32, ("drules", "dweights"))
