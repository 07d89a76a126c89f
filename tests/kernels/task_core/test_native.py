# SPDX-License-Identifier: Apache-2.0
"""The C++ path, and the CUDA blocks' code run on the CPU.

``blocks`` runs what a GPU would run, item by item, in alternating order over poisoned memory.
"""

import re
import types
from functools import partial

import pytest
import torch
from budgets import all_within_budget

from samfast import backends
from samfast.kernels.task_core import cpu_path, cuda_path, torch_path

pytestmark = pytest.mark.skipif(
    backends.cpu_missing(torch.device("cpu"), torch.float32, "task_core_blocks_product")
    is not None,
    reason="the native extension is not there",
)
NAMES = ("z", "dh", "dm")


def blocks_of(monkeypatch):
    native = torch.ops.samfast_native
    names = ("product", "product_backward", "fold", "fold_backward")
    blocks = {f"task_core_{n}": getattr(native, f"task_core_blocks_{n}") for n in names}
    monkeypatch.setattr(cpu_path, "_native", types.SimpleNamespace(**blocks))
    return cpu_path


@pytest.fixture(params=["cpu", "blocks"])
def path(request, monkeypatch):
    return blocks_of(monkeypatch) if request.param == "blocks" else cpu_path


def problem(tokens, rows, columns, tasks, parts, task, dtype):
    """h, m, task and dz."""
    generator = torch.Generator().manual_seed(3)
    h, core, dz = (
        torch.randn(*size, generator=generator)
        for size in ((tokens, rows), (tasks, rows, columns), (tokens, columns))
    )
    m = (core / rows**0.5).expand(parts, -1, -1, -1)
    return h.to(dtype), m, torch.tensor(task, dtype=torch.int64), dz.to(dtype)


def run(path, h, m, task, dz):
    """dm as the sum of its parts."""
    dh, dm = path.product_backward(dz, h, m, task, (True, True))
    return [path.product(h, m, task), dh, dm.sum(0)]


# tokens, R1, R2, tasks, parts, task
PROBLEMS = [
    (0, 3, 2, 2, 3, []),
    (7, 1, 1, 1, 1, [0]),
    (90, 17, 5, 3, 4, [2, 0]),
    (66, 64, 64, 2, 32, [1, 1, 0]),
    (330, 32, 33, 4, 2, [3, 3, 1, 0, 3]),
    (12, 4, 16, 3, 32, [0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 2]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", PROBLEMS, ids=lambda p: "x".join(map(str, p[:5])))
def test_products(sizes, dtype, path):
    h, m, task, dz = problem(*sizes, dtype)
    exact = partial(run, torch_path, h.double(), m.double(), task, dz.double())
    stock = partial(run, torch_path, h, m, task, dz)
    ours = run(path, h, m, task, dz)
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32]
    all_within_budget(ours, stock, exact, dtype, NAMES)


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 9, 4, 3, 5), (3, 64, 32, 2, 17)], ids=str)
def test_cores(sizes, parts, path):
    layers, rows, columns, depth, tasks = sizes
    generator = torch.Generator().manual_seed(4)
    cores = torch.randn(layers, rows, columns, depth, generator=generator)
    factors = torch.randn(layers, tasks, depth, generator=generator)
    dm = torch.randn(layers, parts, tasks, rows, columns, generator=generator)

    def fold(which, dtype):
        g, u, d = (t.to(dtype) for t in (cores, factors, dm))
        return [which.fold(g, u), *which.fold_backward(d, g, u)]

    stock, exact = (partial(fold, torch_path, t) for t in (torch.float32, torch.float64))
    ours = fold(path, torch.float32)
    all_within_budget(ours, stock, exact, torch.float32, ("m", "dcores", "dfactors"))


def test_blocks_give_nan_for_a_task_that_is_not_there(monkeypatch):
    """A GPU's tasks are not read back; nor does such a task reach a core's gradient."""
    path = blocks_of(monkeypatch)
    h, m, task, dz = problem(12, 4, 3, 2, 2, [0, 2, -1], torch.float32)
    z, dh, dm = run(path, h, m, task, dz)
    assert z[4:].isnan().all() and dh[4:].isnan().all()
    good = run(path, h[:4], m, task[:1], dz[:4])
    assert torch.equal(z[:4], good[0]) and torch.equal(dh[:4], good[1])
    assert torch.equal(dm, good[2]) and not dm[1].any()


def test_only_what_is_wanted(path):
    given = problem(64, 8, 6, 2, 3, [1, 0], torch.float32)
    h, m, task, dz = given
    _, dh, _ = run(path, *given)
    alone, none = path.product_backward(dz, h, m, task, (True, False))
    assert none is None and torch.equal(alone, dh)
    none, dm = path.product_backward(dz, h, m, task, (False, True))
    both = path.product_backward(dz, h, m, task, (True, True))[1]
    assert none is None and torch.equal(dm, both)
    assert path.product_backward(dz, h, m, task, (False, False)) == (None, None)


def test_bits_do_not_depend_on_the_number_of_threads():
    given = problem(3000, 32, 20, 3, 1, [2, 0, 1], torch.bfloat16)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            runs.append(run(cpu_path, *given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operators_refuse_what_does_not_fit():
    h, m, task, _ = problem(12, 4, 3, 2, 1, [0, 1], torch.float32)
    native, z, core = torch.ops.samfast_native, torch.empty(12, 3), m[0]
    with pytest.raises(RuntimeError, match="z has 24 elements, not 36"):
        native.task_core_product(h, core, task, torch.empty(12, 2))
    with pytest.raises(RuntimeError, match="5 tasks do not divide the 12 rows"):
        native.task_core_product(h, core, torch.zeros(5, dtype=torch.int64), z)
    with pytest.raises(RuntimeError, match="task is 2, but there are tasks 0 to 1"):
        native.task_core_product(h, core, task + 1, z)
    with pytest.raises(RuntimeError, match="m has another element type"):
        native.task_core_product(h, core.double(), task, z)
    with pytest.raises(RuntimeError, match="h must be contiguous"):
        native.task_core_product(torch.empty(4, 12).t(), core, task, z)
    wide = problem(12, 65, 3, 2, 1, [0, 1], torch.float32)
    with pytest.raises(RuntimeError, match="a core of 65 x 3 is above rank 64"):
        native.task_core_blocks_product(wide[0], wide[1][0], task, z)


def test_limits_are_those_of_the_source():
    from benchmarks.offline import ROOT

    source = (ROOT / "csrc" / "task_core_math.h").read_text()
    (rank,) = re.findall(r"kMaxRank = (\d+)", source)
    assert int(rank) == cuda_path.MAX_RANK
