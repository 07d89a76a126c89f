# SPDX-License-Identifier: Apache-2.0
"""The branch as the side of a fused block's operator."""

import dataclasses
from functools import partial

import pytest
import torch
from budgets import all_within_budget, assert_same_dtypes
from draws import DEVICE

from samfast import backends
from samfast.counters import counting
from samfast.kernels.adapt_former import reference
from samfast.kernels.sam_block import costs, sam_block
from samfast.kernels.sam_block.plan import SIDE, SidePlan, plan_of

from ..sam_block.cases import Case as BlockCase
from ..sam_block.cases import runnable

BOTTLENECK = 3
interpreted = not torch.cuda.is_available() and backends.triton_missing(DEVICE) is None
triton = pytest.mark.skipif(not interpreted, reason="the interpreter is not here")


@dataclasses.dataclass(frozen=True)
class Case(BlockCase):
    """A block with a branch beside its MLP. drop: the branch's own dropout"""

    drop: float = 0.0

    @property
    def plan(self):
        return super().plan._replace(side=SidePlan(1e-5, self.drop))

    @property
    def names(self):
        return [*super().names, *(f"side.{name}" for name in SIDE[:-1]), ""]

    def tensors(self, dtype, small=None):
        x, tensors, dy = BlockCase(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(BlockCase)}
        ).tensors(dtype, small)
        generator, dim = torch.Generator().manual_seed(9), self.dim
        shapes = ((dim,), (dim,), (BOTTLENECK, dim), (BOTTLENECK,), (dim, BOTTLENECK), (dim,))
        side = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
        side[2] /= 2 * dim**0.5
        side[3] = torch.tensor([1.2, -1.1, 1.0], dtype=torch.float64)  # few are near zero
        side = [t.to(DEVICE, small or dtype).requires_grad_() for t in side]
        tensors += side
        return x, [*tensors, torch.tensor([77], device=DEVICE) if self.drop else None], dy

    def literal(self, x, tensors):
        """The block without, its norm2 caught, and the branch on what that gives."""
        plain = BlockCase(**{f.name: getattr(self, f.name) for f in dataclasses.fields(BlockCase)})
        caught, norm = [], torch.nn.functional.layer_norm

        def catching(*args):
            caught.append(norm(*args))
            return caught[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.nn.functional.layer_norm", catching)
            y, losses = plain.literal(x, tensors[: -len(SIDE)])
        *side, seed = tensors[-len(SIDE) :]
        return reference.adapt_former(caught[1], y, *side, dropout=self.drop, seed=seed), losses


SMALL = Case(batch=1, height=2, width=3, window=2, dim=16, heads=1, drop=0.3)
CASES = (
    Case(drop=0.3),
    Case(window=0, adapters=()),
    Case(batch=0, adapters=("lin2",)),
    Case(bias=False, adapters=("lin2",), dropout=0.2, drop=0.2),
    Case(window=14, sliced=True, adapters=("qkv",)),
)


@pytest.mark.slow_on_cpu("auto-torch.float16", "auto-torch.bfloat16", "torch-torch.float16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_budget(case, backend, dtype):
    stock, exact = (partial(case.run, t, "reference") for t in (dtype, torch.float64))
    ours = case.run(dtype, backend)
    assert any(name.startswith("side.") for name in ours)
    assert_same_dtypes(ours, all_within_budget(ours, stock, exact, dtype))


@triton
@pytest.mark.slow
def test_a_branch_takes_rows_as_they_are(monkeypatch):
    """Where lin1's product would else make its update, from rows with more columns."""
    from samfast.kernels.sam_block import triton_kernels

    monkeypatch.setattr(triton_kernels, "MOST_LEFT", 0)
    case = Case(batch=5, height=3, width=4, window=2, dim=16, heads=1)  # a size without a plan
    stock, exact = (partial(case.run, t, "reference") for t in (torch.float16, torch.float64))
    with counting() as counts:
        ours = case.run(torch.float16, "triton")
    all_within_budget(ours, stock, exact, torch.float16)
    assert counts.launches["joint_weight_kernel"] == 1  # qkv's


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_memory_modes_give_the_same_bits(backend):
    for dtype in (torch.float32, torch.bfloat16):
        kept = Case(dropout=0.3, drop=0.4).run(dtype, backend)
        for memory in ("balanced", "minimal"):
            again = Case(dropout=0.3, drop=0.4, memory=memory).run(dtype, backend)
            for name, value in kept.items():
                assert torch.equal(value, again[name]), f"{name}, {memory}, {dtype}"


@pytest.mark.parametrize("memory", ["fast", "balanced", "minimal"])
def test_only_the_wanted_gradients_are_made(memory):
    """Each alone, with the bits it has beside the others."""
    case = dataclasses.replace(SMALL, memory=memory)
    full = case.run(torch.float32, "torch")
    for wanted in ["dx", *(name for name in case.names if name)]:
        x, tensors, dy = case.tensors(torch.float32)
        for t, name in zip((x, *tensors), ("dx", *case.names), strict=True):
            if name:
                t.requires_grad_(name == wanted)
        leaf = dict(zip(("dx", *case.names), (x, *tensors), strict=True))[wanted]
        y, _ = case.call(x, tensors, "torch")
        (grad,) = torch.autograd.grad(y, leaf, dy)
        assert torch.equal(grad, full[wanted]), wanted


def test_gradcheck():
    x, tensors, _ = SMALL.tensors(torch.float64)
    places = [i for i, name in enumerate(SMALL.names) if name]

    def call(x, *leaves):
        changed = list(tensors)
        for i, t in zip(places, leaves, strict=True):
            changed[i] = t
        return SMALL.call(x, changed, "torch")[0]

    leaves = [x, *(tensors[i] for i in places)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.slow_on_cpu(but=["minimal"])
@pytest.mark.parametrize("memory", ["fast", "balanced", "minimal"])
def test_opcheck_of_the_two_halves(memory):
    case = dataclasses.replace(SMALL, memory=memory)
    x, tensors, dy = case.tensors(torch.float32)
    x, tensors = x.detach(), [t if t is None else t.detach() for t in tensors]
    checks = ("test_schema", "test_faketensor")
    arguments = (x, tensors, case.plan.key, case.plan.numbers, "torch")
    forward = torch.ops.samfast.sam_block_forward
    torch.library.opcheck(forward, arguments, test_utils=checks)
    _, aux, *kept = forward(*arguments)
    assert len(kept[-1]) == (memory != "minimal")
    for needs in (
        [True, *map(bool, case.names)],
        [False, *(name.startswith("side.") for name in case.names)],
    ):
        backward = torch.ops.samfast.sam_block_backward
        given = (dy, [None] * len(aux), *kept, *arguments, needs)
        torch.library.opcheck(backward, given, test_utils=checks)


@pytest.mark.slow_on_cpu("fast")
@pytest.mark.parametrize("memory", ["fast", pytest.param("minimal", marks=pytest.mark.slow)])
def test_compile_fullgraph(memory):
    case = dataclasses.replace(SMALL, memory=memory)
    x, tensors, dy = case.tensors(torch.float32)
    torch._dynamo.reset()
    plan = case.plan

    def eager(x, tensors):
        return sam_block(x, tensors, plan)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    leaves = [x, *(t for t, name in zip(tensors, case.names, strict=True) if name)]
    results = []
    for call in (eager, compiled):
        y, _ = call(x, tensors)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_plan_travels_as_a_string():
    for plan in (SMALL.plan, BlockCase().plan, Case(experts=True, dropout=0.1).plan):
        again = plan_of(plan.key, plan.numbers)
        assert (again.side, again.key, again.numbers) == (plan.side, plan.key, plan.numbers)
        assert again == plan


@pytest.mark.parametrize(
    ("place", "change", "sentence"),
    [
        (-5, lambda t: t.to("meta"), "down of side is on meta but x is on"),
        (-1, lambda t: t.to("meta"), "seed of side is on meta but x is on"),
        (-5, lambda t: t[:, 1:], r"down has shape \(3, 15\), but rows of 16 features need"),
        (-7, lambda t: t[1:], r"norm_weight has shape \(15,\), but 16 features and a bottleneck"),
        (-3, lambda t: t[:, 1:], r"up has shape \(16, 2\), but 16 features and a bottleneck of 3"),
        (-4, lambda t: t[1:], r"down_bias has shape \(2,\)"),
        (-2, lambda t: t[1:], r"up_bias has shape \(15,\)"),
    ],
)
def test_tensors_that_do_not_fit(place, change, sentence):
    x, tensors, _ = SMALL.tensors(torch.float32)
    tensors[place] = change(tensors[place].detach())
    with pytest.raises(ValueError, match=sentence):
        SMALL.call(x, tensors)


class Adapted:
    """Only adapters and the branch are trained; x wants a gradient."""

    def __init__(self, case, dtype):
        self.case, (self.x, self.tensors, self.dy) = case, case.tensors(dtype)
        self.names = [n if "lora" in n or n.startswith("side.") else "" for n in case.names]
        for t, name in zip(self.tensors, self.names, strict=True):
            if t is not None and not name:
                t.requires_grad_(False)

    def run(self, backend):
        x, tensors, dy = self.x, self.tensors, self.dy
        y, _ = self.case.call(x, tensors, backend)
        named = {n: t for n, t in zip(self.names, tensors, strict=True) if n}
        grads = torch.autograd.grad(y, [x, *named.values()], dy)
        return {"y": y.detach(), **dict(zip(("dx", *named), grads, strict=True))}


@pytest.mark.slow_on_cpu("0")
@triton
@pytest.mark.parametrize("rank", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_launches_of_a_block(rank):
    """Nine more than without, no cast, no copy, no sync; values in the budget."""
    case = dataclasses.replace(SMALL, adapters=SMALL.adapters if rank else (), drop=0.3)
    half = torch.float16
    block = Adapted(case, half)
    with counting() as counts:
        ours = block.run("triton")
    stock, exact = (partial(Adapted(case, t).run, "reference") for t in (half, torch.float64))
    all_within_budget(ours, stock, exact, half)
    design = costs.stages(case.windows, case.dim, case.heads, rank, half.itemsize)
    more = costs.side(case.windows, case.dim, BOTTLENECK, half.itemsize)
    assert sum(stage.launches for stage in more) == 9
    assert counts.total_launches == sum(stage.launches for stage in (*design, *more))
    assert counts.total_syncs == 0


@triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_whole_blocks_in_triton(dtype):
    stock, exact = (partial(SMALL.run, t, "reference") for t in (dtype, torch.float64))
    ours = SMALL.run(dtype, "triton")
    all_within_budget(ours, stock, exact, dtype)
    for memory in ("balanced", "minimal"):
        again = dataclasses.replace(SMALL, memory=memory).run(dtype, "triton")
        assert all(torch.equal(value, again[name]) for name, value in ours.items())


@pytest.mark.slow_on_cpu
@pytest.mark.gpu  # the interpreter has cases of its own
@pytest.mark.skipif(runnable("triton") is not None, reason=str(runnable("triton")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_triton(case, dtype):
    stock, exact = (partial(case.run, t, "reference") for t in (dtype, torch.float64))
    all_within_budget(case.run(dtype, "triton"), stock, exact, dtype)
