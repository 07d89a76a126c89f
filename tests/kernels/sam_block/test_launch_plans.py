# SPDX-License-Identifier: Apache-2.0
"""Launch plans: the same bits as without, used where calls are alike and nowhere else."""

import dataclasses
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")
from samfast.counters import Living, counting
from samfast.kernels._common import launch_plan, planned, ranges
from samfast.kernels._common.recorder import record
from samfast.kernels._common.variables import switch
from samfast.kernels.sam_block.op import SamBlock

from . import test_kinds
from .cases import DEVICE, Case

TINY = Case(batch=1, height=3, width=2, window=2, dim=16, heads=1)
CASES = {
    "windows": TINY,
    "map": dataclasses.replace(TINY, window=0, sliced=True),
    "experts": dataclasses.replace(TINY, experts=True, adapters=("qkv", "lin2")),
    "dropout": dataclasses.replace(TINY, dropout=0.3, bias=False),
    "balanced": dataclasses.replace(TINY, memory="balanced"),
    "minimal": dataclasses.replace(TINY, window=0, memory="minimal", experts=True),
    "frozen": dataclasses.replace(TINY, adapters=()),
    "no images": dataclasses.replace(TINY, batch=0),
    "many rows": dataclasses.replace(TINY, batch=6),  # in 16 bits qkv's product makes its update
}
# "auto" is the C++ code here, which takes a hundredth of the interpreter's time.
RUNS = [
    *(pytest.param(name, "triton", marks=pytest.mark.slow) for name in ("windows", "experts")),
    *((name, "auto") for name in CASES),
]
FORWARD, BACKWARD = 1, 2  # of the operator's bodies; the first is the one that keeps nothing


@pytest.fixture(autouse=True)
def clean():
    planned.clear()
    yield
    planned.clear()


def made(way):
    """The plans of one body."""
    return [plan for known in SamBlock.bodies[way].known.values() if known for plan in known.plans]


def plans():
    return len(made(FORWARD)), len(made(BACKWARD))


def refused():
    return [why for body in SamBlock.bodies for why in body.refused]


def same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_bits(name, backend):
    """The first call runs as it is, the second is recorded, the third runs by the plan."""
    case = CASES[name]
    with planned.switched(False):
        expected = case.run(torch.float32, backend)
    assert plans() == (0, 0)
    for call in range(3):
        same(case.run(torch.float32, backend), expected)
        assert plans() == ((1, 1) if call else (0, 0)), refused()
    with torch.no_grad():
        x, tensors, _ = case.tensors(torch.float32)
        for _ in range(3):
            assert torch.equal(case.call(x, tensors, backend)[0], expected["y"])
    assert len(made(0)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bits_of_narrow_types_interpreted(case, dtype):
    with planned.switched(False):
        expected = case.run(dtype, "triton", torch.float32)
    for _ in range(4):
        same(case.run(dtype, "triton", torch.float32), expected)
    assert plans() == (1, 1)


@pytest.mark.parametrize("name", ["rope, three alike", "rope, packed", "plain, one adapted"])
def test_bits_of_other_attentions(name):
    case = test_kinds.CASES[name]

    def run():
        call = test_kinds.Call(case, torch.float32)
        return call.fused(backend="auto")

    with planned.switched(False):
        expected = run()
    for _ in range(3):
        same(run(), expected)
    assert plans() == (1, 1), refused()


def changed(tensors, which, change):
    """The tensors with another in place of one."""
    return [change(t) if i == which else t for i, t in enumerate(tensors)]


def odd(t):
    """The same values one element further in memory."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    return room[1:].view(t.shape).copy_(t.detach()).requires_grad_(t.requires_grad)


def turned(t):
    """The same values, the last axis first in memory."""
    turned = t.detach().movedim(-1, 0).contiguous().movedim(0, -1)
    return turned.requires_grad_(t.requires_grad)


LIN1 = 6 + 2 * 5  # where the tensors of lin1 begin
CHANGES = {
    "x at an odd place": lambda x, t, dy: (odd(x), t, dy),
    "x in other strides": lambda x, t, dy: (turned(x), t, dy),
    "dy in other strides": lambda x, t, dy: (x, t, turned(dy)),
    "dy a number": lambda x, t, dy: (x, t, torch.ones(()).expand(dy.shape)),
    "a weight at an odd place": lambda x, t, dy: (x, changed(t, LIN1, odd), dy),
    "a weight in other strides": lambda x, t, dy: (x, changed(t, LIN1, turned), dy),
    "lora_b in other strides": lambda x, t, dy: (x, changed(t, LIN1 + 3, turned), dy),
    "x wants no gradient": lambda x, t, dy: (x.detach(), t, dy),
    "a frozen lora_a": lambda x, t, dy: (x, changed(t, LIN1 + 2, torch.Tensor.detach), dy),
    "float16": lambda x, t, dy: (x.detach().half().requires_grad_(), t, dy.half()),
}


def run(case, x, tensors, dy):
    y, _ = case.call(x, tensors, "auto")
    leaves = [t for t in (x, *tensors) if t is not None and t.requires_grad]
    return {"y": y.detach(), **dict(enumerate(torch.autograd.grad(y, leaves, dy)))}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_calls_get_plans_of_their_own(change):
    """After a plan was made, other tensors; bits as without plans, and a plan at last."""
    case = TINY
    for _ in range(3):
        run(case, *case.tensors(torch.float32))
    assert plans() == (1, 1)
    with planned.switched(False):
        expected = run(case, *change(*case.tensors(torch.float32)))
    for _ in range(3):
        same(run(case, *change(*case.tensors(torch.float32))), expected)
    before = plans()
    places = change in (CHANGES["x at an odd place"], CHANGES["a weight at an odd place"])
    assert max(before) == (1 if places else 2), refused()  # the interpreter knows no alignment
    run(case, *case.tensors(torch.float32))
    assert plans() == before


def test_options_are_part_of_what_is_alike():
    """As many plans as kinds of calls, whatever the order."""
    calls = [
        TINY,
        CASES["balanced"],
        CASES["map"],
        dataclasses.replace(TINY, bias=False),
    ]
    with planned.switched(False):
        expected = [case.run(torch.float32, "auto") for case in calls]
    for _ in range(3):
        for case, values in zip(calls, expected, strict=True):
            same(case.run(torch.float32, "auto"), values)
    assert plans() == (4, 4)


class Looking(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_what_was_to_be_seen(monkeypatch):
    """A mode sees the operator; a profiler of Triton's, and the variable, turn plans off."""
    case = TINY
    for _ in range(3):
        case.run(torch.float32, "auto")
    ran = []
    for plan in (*made(FORWARD), *made(BACKWARD)):
        plain = plan.run
        plan.run = lambda *a, plain=plain: ran.append(plain) or plain(*a)
    case.run(torch.float32, "auto")
    assert len(ran) == 2
    with Looking() as looking:
        case.run(torch.float32, "auto")
    assert {"samfast::sam_block_forward", "samfast::sam_block_backward"} <= {*looking.seen}
    ran.clear()
    with counting() as counts:
        case.run(torch.float32, "auto")
    assert counts.launches["relpos_attention_backward"] == 1 and not ran
    monkeypatch.setattr(planned, "triton_listens", lambda: True)
    case.run(torch.float32, "auto")
    monkeypatch.undo()
    with planned.switched(False):
        case.run(torch.float32, "auto")
    assert not ran
    monkeypatch.setenv("SAMFAST_LAUNCH_PLANS", "2")
    with pytest.raises(ValueError, match="SAMFAST_LAUNCH_PLANS is '2'; set it to 0 for none"):
        switch("SAMFAST_LAUNCH_PLANS", True, "0 for none")


def test_under_autocast():
    """Under autocast nothing inside a plan is cast."""
    case = TINY
    with torch.autocast("cpu", torch.bfloat16):
        with planned.switched(False):
            expected = case.run(torch.float32, "auto")
        for _ in range(3):
            same(case.run(torch.float32, "auto"), expected)
    assert plans() == (1, 1)


def test_ranges_are_those_of_the_body(monkeypatch):
    """Where ranges are on and no profiler of torch's is, as for nsys."""
    seen = []

    class Noted(ranges.Range):
        def __enter__(self):
            seen.append(self.label)
            super().__enter__()

        def __exit__(self, *error):
            seen.append(f"end of {self.label}")
            super().__exit__(*error)

    monkeypatch.setattr(ranges, "Range", Noted)
    monkeypatch.setattr(launch_plan, "Range", Noted)

    def of_block():
        seen.clear()
        with ranges.ranges():
            TINY.run(torch.float32, "auto")
        return [label for label in seen if "samfast/sam_block/" in label]

    first = of_block()
    for _ in range(2):
        TINY.run(torch.float32, "auto")
    assert plans() == (1, 1)
    assert len(first) > 40 and of_block() == first
    ranged = [plan._ranged is not None for way in (FORWARD, BACKWARD) for plan in made(way)]
    assert ranged == [True, True]


def test_torch_s_profiler_sees_the_operators_inside():
    for _ in range(3):
        TINY.run(torch.float32, "auto")
    with torch.profiler.profile() as profile:
        TINY.run(torch.float32, "auto")
    names = {event.name for event in profile.events()}
    assert {"samfast::sam_block_forward", "samfast::window_relpos_attention_backward"} <= names


def test_what_is_made_is_dropped_as_early(monkeypatch):
    """A plan keeps no more bytes alive at once than the body."""
    case = Case(batch=2, height=8, width=8, window=4)
    with planned.switched(False):
        x, tensors, dy = case.tensors(torch.float32)
        living = Living([x, dy, *(t for t in tensors if t is not None)])
        with living, counting(), torch.no_grad():
            case.call(x, tensors, "auto")
    monkeypatch.setattr(launch_plan, "zeroed", True)
    with torch.no_grad():
        for _ in range(3):
            case.call(x, tensors, "auto")
    alive, peaks = [], []

    def noted(function):
        def call(*args, **kwargs):
            t = function(*args, **kwargs)
            if isinstance(t, torch.Tensor):
                alive.append(weakref.ref(t))
            there = {r().untyped_storage()._cdata: r().nbytes for r in alive if r() is not None}
            peaks.append(sum(there.values()))
            return t

        return call

    (plan,) = made(0)
    space = plan.run.__globals__
    for name, value in list(space.items()):
        if callable(value) and name not in ("plan", "Range", "leaves"):
            monkeypatch.setitem(space, name, noted(value))
    with torch.no_grad():
        case.call(x, tensors, "auto")
    assert 0.5 * living.peak() < max(peaks) <= living.peak()


def test_in_two_threads():
    case = TINY
    with planned.switched(False):
        expected = case.run(torch.float32, "auto")
    wrong = []

    def work():
        for _ in range(4):
            found = case.run(torch.float32, "auto")
            wrong.extend(n for n, t in expected.items() if not torch.equal(t, found[n]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and plans() == (1, 1)


def test_a_body_that_cannot_be_called_again_is_refused():
    """What reads values on the host, takes a tensor from elsewhere or takes an object."""
    constant = torch.ones(3, device=DEVICE)
    x = torch.arange(3.0, device=DEVICE)
    for body, sentence in (
        (lambda t: t * t.sum().item(), "reads values on the host"),
        (lambda t: t[t > 1], "reads values on the host"),
        (lambda t: t + constant, "it takes a tensor from elsewhere"),
        (lambda t: t + torch.rand(3, generator=torch.Generator()), "takes a Generator"),
    ):
        _, recording = record(body, [x], x)
        assert sentence in recording.problem, recording.problem
        with pytest.raises(ValueError, match=sentence):
            launch_plan.LaunchPlan(recording, [x])
    _, recording = record(lambda a, b: a * b, [x, x[1:2]], x, x[1:2])
    assert recording.problem == "it takes inputs that overlap"


@pytest.mark.slow_on_cpu
def test_tensors_with_functions_of_their_own(monkeypatch):
    """They see the operator, as they do without plans; a lazy sign is resolved."""
    x, tensors, _ = TINY.tensors(torch.float32)
    for _ in range(3):
        expected, _ = TINY.call(x, tensors, "triton")
    negative = torch._neg_view(-x.detach())
    assert torch.equal(TINY.call(negative, tensors, "triton")[0], expected)
    seen = []

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    with torch.no_grad():
        y, _ = TINY.call(x.detach().as_subclass(Own), tensors, "triton")
    assert torch.equal(y.as_subclass(torch.Tensor), expected)
    assert torch.ops.samfast.sam_block.default in seen or torch.ops.samfast.sam_block in seen
    with torch.inference_mode(), torch.enable_grad():
        assert torch.equal(TINY.call(x.detach(), tensors, "auto")[0], TINY.call(x, tensors)[0])


def test_one_tensor_twice():
    """What is one tensor at one call and two at another has two plans."""
    case = dataclasses.replace(TINY, adapters=())
    x, tensors, dy = case.tensors(torch.float32)
    tied = [tensors[0], tensors[1], tensors[0], tensors[1], *tensors[4:]]
    for given in (tied, tensors, tied):
        with planned.switched(False):
            expected = run(case, x, given, dy)
        for _ in range(3):
            same(run(case, x, given, dy), expected)
    assert plans() == (2, 2), refused()


def test_many_kinds(monkeypatch):
    """The oldest kinds are forgotten; what was called last stays at hand."""
    monkeypatch.setattr(planned, "MOST", 3)
    monkeypatch.setattr(planned, "LATEST", 1)
    for height in range(2, 7):
        for size in (height, 2):
            dataclasses.replace(TINY, height=size).run(torch.float32, "auto")
    for body in SamBlock.bodies[FORWARD:]:
        assert len(body.known) == 3
        assert [len(known.plans) for known in body.latest] == [1]


def test_a_plan_that_cannot_be_written_loses_nothing(monkeypatch):
    def broken(*_):
        raise TypeError("broken")

    with planned.switched(False):
        expected = TINY.run(torch.float32, "auto")
    monkeypatch.setattr(launch_plan, "_function", broken)
    for _ in range(planned.TRIES + 3):
        same(TINY.run(torch.float32, "auto"), expected)
    assert plans() == (0, 0)
    for body in SamBlock.bodies[1:]:
        assert body.refused == {"its plan could not be written: TypeError('broken')": planned.TRIES}


def test_parts_of_one_storage():
    """Inputs that lie apart in one storage, and later in two."""
    whole = torch.arange(12.0)
    a, b = whole[:6].view(2, 3), whole[6:].view(3, 2)

    def body(a, b):
        return [(a @ b).t(), a[1:].add(b.t()[:1])]

    _, recording = record(body, [a, b], a, b)
    plan = launch_plan.LaunchPlan(recording, [a, b])
    a, b = torch.randn(2, 3), torch.randn(3, 2)
    for found, expected in zip(plan([a, b]), body(a, b), strict=True):
        assert torch.equal(found, expected)
