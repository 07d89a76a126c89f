# SPDX-License-Identifier: Apache-2.0
"""Ranges: each operation and each part of a block has one, and off they cost nothing."""

import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import samfast
from samfast.counters import counting
from samfast.functional import lora_linear
from samfast.kernels._common import ranges
from samfast.kernels._common.variables import switch
from samfast.kernels.sam_block.plan import MEMORY

from .adapt_former.test_side import SMALL as BESIDE
from .operation import PublicCalls
from .registry import FIRST, cases
from .sam_block.cases import Case

FORWARD = "norm1 qkv attention proj norm2 lin1 gelu lin2 add".split()
BACKWARD = "lin2 gelu lin1 norm2 proj attention qkv norm1".split()


@pytest.fixture(autouse=True)
def off(monkeypatch):
    monkeypatch.setattr(ranges, "_on", False)


class Dispatched(TorchDispatchMode):
    """Names of all operators that run, once the counters have opened those of ours."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def dispatched(call) -> list[str]:
    with Dispatched() as mode, counting():
        call()
    return mode.names


def profiled(call) -> list[str]:
    """The ranges of samfast among a profile's events, in order."""
    with profile(activities=[ProfilerActivity.CPU]) as made:
        call()
    events = [event for event in made.events() if event.name.startswith("samfast/")]
    assert all(event.is_user_annotation for event in events)
    return [e.name for e in sorted(events, key=lambda event: event.time_range.start)]


def step(operation, backend="torch"):
    return operation.run(operation.leaves(), backend)


def block(memory="fast", **options):
    """A step of a small block: its forward, and its backward."""
    case = Case(memory=memory, **options)
    x, tensors, dy = case.tensors(torch.float32)
    y, losses = case.call(x, tensors, "torch")
    torch.autograd.backward([y, *losses], [dy, *map(torch.ones_like, losses)])
    return x.grad


def in_order(names: list[str]) -> list[str]:
    """Without what follows itself, as the pieces of a part do."""
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]


def test_each_operation_has_a_forward_and_a_backward():
    def steps():
        for operation in FIRST.values():
            step(operation)

    with samfast.ranges(True):
        found = profiled(steps)
    expected = {f"samfast/{name}/{way}" for name in FIRST for way in ("forward", "backward")}
    assert expected <= set(found)


def test_off_a_profile_has_none():
    assert profiled(block) == []


@pytest.mark.parametrize("memory", MEMORY)
def test_a_block_shows_its_parts(memory):
    with samfast.ranges(True):
        found = profiled(lambda: block(memory))
    start = found.index("samfast/sam_block/backward")
    parts = [
        in_order([n.removeprefix("samfast/sam_block/") for n in half if "sam_block/" in n])
        for half in (found[:start], found[start:])
    ]
    assert parts[0] == ["forward", *FORWARD]
    again = {"fast": [], "balanced": ["norm2", "lin1"], "minimal": FORWARD[:-2]}[memory]
    assert parts[1][: 1 + len(again)] == ["backward", *again]
    first = list(dict.fromkeys(parts[1][1 + len(again) :]))
    if memory == "balanced":  # qkv is made again for the attention
        assert first[5:7] == ["norm1", "qkv"]
        assert set(first) == set(BACKWARD)
    else:
        assert first == BACKWARD
    inside = found[found.index("samfast/sam_block/attention") + 1]
    assert inside == "samfast/window_relpos_attention/forward"


def test_the_branch_beside_the_mlp_is_a_part():
    with samfast.ranges(True):
        found = profiled(lambda: BESIDE.run(torch.float32, "torch"))
    start = found.index("samfast/sam_block/backward")
    assert [half.count("samfast/sam_block/side") for half in (found[:start], found[start:])] == [
        2,
        2,
    ]


@cases(("torch",))
def test_off_nothing_more_is_dispatched_or_launched(operation, backend):
    if reason := operation.runnable(backend):
        pytest.skip(reason)

    def counted():
        with counting() as counts:
            step(operation)
        return counts

    step(operation)  # makes what is made once and kept
    usual, names = counted(), dispatched(lambda: step(operation))
    assert not any(name.startswith("profiler::") for name in names)
    with samfast.ranges(True):
        more = dispatched(lambda: step(operation))
        assert counted() == usual
    assert any(name.startswith("profiler::") for name in more)
    assert [name for name in more if not name.startswith("profiler::")] == names


def gradient(call, x, dy):
    return torch.autograd.grad(call(x), x, dy)[0]


def test_checkpoints_and_other_threads_give_the_same_bits():
    """The thread is of autograd's kind: it has not entered the switch itself."""
    case, found = Case(), []
    x, tensors, dy = case.tensors(torch.float32)

    def plain(x):
        return case.call(x, tensors, "torch")[0]

    def threaded():
        found.append(gradient(lambda x: checkpoint(plain, x, use_reentrant=False), x, dy))

    usual = gradient(plain, x, dy)
    with samfast.ranges(True):
        thread = threading.Thread(target=threaded)
        thread.start()
        thread.join()
    assert len(found) == 1 and torch.equal(found[0], usual)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_gives_the_same_bits_and_shows_its_ranges(backend):
    case = Case()
    x, tensors, dy = case.tensors(torch.float32)

    def plain(x):
        return case.call(x, tensors, "torch")[0]

    compiled = torch.compile(plain, fullgraph=True, backend=backend)
    with samfast.ranges(True):
        assert torch.equal(gradient(compiled, x, dy), gradient(plain, x, dy))
        names = profiled(lambda: gradient(compiled, x, dy))
    assert {"samfast/sam_block/backward", "samfast/sam_block/gelu"} <= set(names)


@pytest.mark.slow_on_cpu
def test_opcheck_with_ranges():
    operation = FIRST["task_core_product"]
    with samfast.ranges(True):
        with PublicCalls() as found:
            operation.results(operation.leaves(), "torch")
        operator, arguments = found.of(operation.name)
        leaf = partial(tree_map_only, torch.Tensor)
        arguments = leaf(lambda t: t.detach().requires_grad_(t.requires_grad), arguments)
        torch.library.opcheck(operator, arguments)


@pytest.mark.slow
def test_inside_a_compiled_function_nothing_is_lost_silently():
    """torch.compile would set the switch after the function. It leaves it to Python, or fails."""
    x, weight = torch.randn(3, 4), torch.randn(5, 4)

    def inside():
        with samfast.ranges(True):
            return lora_linear(x, weight, None, weight[:2], weight[:, :2], 1.0)

    assert profiled(torch.compile(inside, backend="eager")) == ["samfast/lora_linear/forward"]
    torch.compiler.reset()
    with pytest.raises(RuntimeError):
        torch.compile(inside, backend="eager", fullgraph=True)()
    assert not ranges._on


@pytest.mark.slow
def test_distributed_data_parallel_with_ranges(tmp_path):
    """Of one process, whose hooks run in the backward's thread."""
    layer = samfast.modules.LoraLinear(8, 6, rank=2)
    x, distributed = torch.randn(4, 8), torch.distributed
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(layer)
        with samfast.ranges(True):
            found = profiled(lambda: parallel(x).sum().backward())
    finally:
        distributed.destroy_process_group()
    assert found == [f"samfast/lora_linear/{way}" for way in ("forward", "backward")]
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def test_nvtx_ranges_where_cuda_is_in_use(monkeypatch):
    """Each is closed, also where what is inside fails."""
    open_, seen = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda n: (open_.append(n), seen.append(n)))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", open_.pop)
    block()
    assert not seen
    with samfast.ranges(True):
        assert seen == [] and block() is not None
        with pytest.raises(ZeroDivisionError), ranges.stage("lora_linear", "forward"):
            1 / 0  # noqa: B018
    assert not open_
    assert seen[0] == "samfast/sam_block/forward" and seen[-1] == "samfast/lora_linear/forward"


def test_the_switch():
    assert not ranges._on
    with samfast.ranges(True):
        with samfast.ranges(False):
            assert not ranges._on
        assert ranges._on
    assert not ranges._on
    samfast.ranges(True)  # at once, as torch.set_grad_enabled
    assert ranges._on
    again = samfast.ranges(False)
    assert not ranges._on
    with pytest.raises(ZeroDivisionError), again:
        1 / 0  # noqa: B018
    assert ranges._on
    with pytest.raises(ValueError, match=r"expected ranges\(True\) or ranges\(False\), got 1"):
        samfast.ranges(1)


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False), ("", False)])
def test_the_environment_switches_them_on(monkeypatch, value, wanted):
    monkeypatch.setenv("SAMFAST_RANGES", value)
    assert switch("SAMFAST_RANGES", False, "1 for ranges") is wanted
    monkeypatch.setenv("SAMFAST_RANGES", "yes")
    with pytest.raises(ValueError, match="SAMFAST_RANGES is 'yes'; set it to 1 for ranges"):
        switch("SAMFAST_RANGES", False, "1 for ranges")


@pytest.mark.slow
def test_a_process_starts_with_them():
    program = "from samfast.kernels._common import ranges; print(ranges._on)"
    environment = {**os.environ, "SAMFAST_RANGES": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.stdout.split() == [b"True"], done.stderr
