# SPDX-License-Identifier: Apache-2.0
"""The C++ path, and the CUDA blocks' code run on the CPU, against Σ torch.kron in float64.

``blocks`` runs what a GPU would run, item by item, in alternating order over poisoned memory.
"""

import re
import types
from functools import partial

import pytest
import torch
from budgets import all_within_budget

from samfast import backends
from samfast.functional import kronecker_weight
from samfast.kernels.hypercomplex import cpu_path, cuda_path

pytestmark = pytest.mark.skipif(
    backends.cpu_missing(torch.device("cpu"), torch.float32, "hypercomplex_build") is not None,
    reason="the native extension is not there",
)
NAMES = ("h", "drules", "dweights")


@pytest.fixture(params=["cpu", "blocks"])
def path(request, monkeypatch):
    if request.param == "blocks":
        native = torch.ops.samfast_native
        blocks = types.SimpleNamespace(
            hypercomplex_build=native.hypercomplex_blocks_build,
            hypercomplex_contract=native.hypercomplex_blocks_contract,
        )
        monkeypatch.setattr(cpu_path, "_native", blocks)
    return cpu_path


def problem(terms, n, rows, columns, dtype, whole=False):
    """rules, weights, base and dH; rules and weights float32."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        made = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (2 * made).round() if whole else made

    rules, weights = draw(terms, n, n).float(), draw(terms, rows, columns).float()
    height, width = n * rows, n * columns
    return rules, weights, draw(height, width).to(dtype), draw(height, width).to(dtype)


def literal(rules, weights, base, grad, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in (rules, weights)]
    h = kronecker_weight(*leaves, scaling=0.5, backend="reference")
    return [h + base.to(dtype), *torch.autograd.grad(h, leaves, grad.to(dtype))]


# terms, n, rows, columns
SIZES = [
    (4, 4, 1, 1), (4, 4, 4, 4), (2, 2, 3, 65), (3, 3, 50, 7), (1, 8, 9, 33), (16, 16, 3, 17),
    (16, 5, 5, 48), (5, 1, 70, 3), (4, 4, 37, 48),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_values(size, dtype, path):
    rules, weights, base, grad = problem(*size, dtype)
    made = path.contract(grad, rules, weights, 0.5, (True, True))
    ours = [path.build(rules, weights, base, 0.5, torch.float32), *made]
    stock, exact = (
        partial(literal, rules, weights, base, grad, d) for d in (torch.float32, torch.float64)
    )
    all_within_budget(ours, stock, exact, torch.float32, NAMES)
    # rounded once, of a sum in float32, whatever the dtype of the base
    for of_base in (torch.float32, dtype):
        narrow = path.build(rules, weights, base.to(of_base), 0.5, dtype)
        full = path.build(rules, weights, base.to(of_base), 0.5, torch.float32)
        assert narrow.dtype == dtype and torch.equal(narrow, full.to(dtype))


def test_blocks_that_have_several_tiles(path):
    """Of more positions than 1024 tiles hold; whole numbers, so that the sums are exact."""
    rules, weights, base, grad = problem(2, 2, 270, 251, torch.float32, whole=True)
    made = path.contract(grad, rules, weights, 0.5, (True, True))
    exact = literal(rules, weights, base, grad, torch.float64)
    assert torch.equal(path.build(rules, weights, base, 0.5, torch.float32).double(), exact[0])
    assert all(torch.equal(a.double(), b) for a, b in zip(made, exact[1:], strict=True))


def test_only_what_is_wanted(path):
    rules, weights, _, grad = problem(3, 3, 6, 20, torch.float32)
    both = path.contract(grad, rules, weights, 1.0, (True, True))
    drules, none = path.contract(grad, rules, weights, 1.0, (True, False))
    assert none is None and torch.equal(drules, both[0])
    none, dweights = path.contract(grad, rules, weights, 1.0, (False, True))
    assert none is None and torch.equal(dweights, both[1])
    assert path.contract(grad, rules, weights, 1.0, (False, False)) == [None, None]


def test_bits_do_not_depend_on_the_number_of_threads():
    rules, weights, base, grad = problem(4, 4, 100, 48, torch.bfloat16)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            made = cpu_path.contract(grad, rules, weights, 1.0, (True, True))
            runs.append([cpu_path.build(rules, weights, base, 1.0, torch.bfloat16), *made])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operators_refuse_what_does_not_fit():
    rules, weights, _, grad = problem(2, 2, 3, 4, torch.float32)
    native = torch.ops.samfast_native
    with pytest.raises(RuntimeError, match="h has 47 elements, not 48"):
        native.hypercomplex_build(rules, weights, None, 1.0, torch.empty(47))
    with pytest.raises(RuntimeError, match="weights has 24 elements, not 12"):
        native.hypercomplex_build(rules[:1], weights, None, 1.0, grad)
    with pytest.raises(RuntimeError, match="weights has another element type"):
        native.hypercomplex_contract(grad, rules, weights.double(), 1.0, None, None)
    with pytest.raises(RuntimeError, match="grad must be contiguous"):
        native.hypercomplex_contract(grad.t(), rules, weights, 1.0, rules.clone(), None)
    many = problem(17, 2, 3, 4, torch.float32)
    with pytest.raises(RuntimeError, match="17 terms are more than 16"):
        native.hypercomplex_blocks_contract(many[3], *many[:2], 1.0, None, None)


def test_limits_are_those_of_the_source():
    from benchmarks.offline import ROOT

    (terms,) = re.findall(r"kTerms = (\d+)", (ROOT / "csrc" / "hypercomplex_math.h").read_text())
    assert int(terms) == cuda_path.MAX_TERMS
