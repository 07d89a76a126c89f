# SPDX-License-Identifier: Apache-2.0
"""The block's operators: their halves, what they save, what they make and never write to."""

import dataclasses

import pytest
import torch

from samfast.counters import saved_bytes
from samfast.kernels.sam_block.block import Block
from samfast.kernels.sam_block.plan import LAYERS

from .cases import BACKENDS, MAP, WINDOWS, Case

MEMORY = pytest.mark.parametrize("memory", ["fast", "balanced", "minimal"])


def leaves_of(case, x, tensors):
    return [x, *(t for t, name in zip(tensors, case.names, strict=True) if name)]


@pytest.mark.slow_on_cpu("windows-minimal")
@pytest.mark.parametrize(
    ("case", "memory", "backend"),
    [(WINDOWS, "fast", "auto"), (MAP, "balanced", "torch"), (WINDOWS, "minimal", "torch")],
    ids=["windows-fast", "map-balanced", "windows-minimal"],
)
def test_opcheck_of_the_two_halves(case, memory, backend):
    case = dataclasses.replace(case, memory=memory)
    x, tensors, dy = case.tensors(torch.float32)
    x, tensors = x.detach(), [t if t is None else t.detach() for t in tensors]
    checks, arguments = (
        ("test_schema", "test_faketensor"),
        (x, tensors, case.plan.key, case.plan.numbers, backend),
    )
    forward = torch.ops.samfast.sam_block_forward
    torch.library.opcheck(forward, arguments, test_utils=checks)
    _, aux, *kept = forward(*arguments)
    daux = [torch.ones_like(a) if a.numel() else None for a in aux]
    named = [True, *(bool(name) for name in case.names)]
    for needs in (named, [True] + [False] * len(tensors), [False, *named[1:]]):
        backward = torch.ops.samfast.sam_block_backward
        torch.library.opcheck(backward, (dy, daux, *kept, *arguments, needs), test_utils=checks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_backward_is_asked_for(backend, monkeypatch):
    """Gradients nobody wants are not computed: no product for them is even begun."""
    case = Case(adapters=("lin2",), window=0)
    x, tensors, dy = case.tensors(torch.float32)
    for t in leaves_of(case, x, tensors):
        t.requires_grad_(False)
    for t, name in zip(tensors, case.names, strict=True):
        if name.startswith("lin2.lora"):
            t.requires_grad_(True)
    y, _ = case.call(x, tensors, backend)

    def refuse(*_):
        raise AssertionError("a gradient of the base was made")

    monkeypatch.setattr(torch, "mm", refuse) if backend == "auto" else None
    monkeypatch.setattr("samfast.kernels.sam_block.torch_path.norm_backward", refuse)
    monkeypatch.setattr("samfast.kernels.sam_block.torch_path.gelu_backward", refuse)
    y.backward(dy)
    made = [
        name for t, name in zip(tensors, case.names, strict=True) if name and t.grad is not None
    ]
    assert made == ["lin2.lora_a", "lin2.lora_b"] and x.grad is None


def pieces(case, width):
    """Bytes of z of every layer and what Conv-LoRA keeps beside it, of layers that are kept."""
    tokens = case.batch * case.height * case.width
    saved = 0
    layers = LAYERS if case.memory == "fast" else ("proj", "lin2") * (case.memory == "balanced")
    for name in layers:
        if name not in case.adapters:
            continue
        columns = case.rank * (2 if name == "qkv" and case.sliced else 1)
        saved += tokens * columns * width
        if name == "qkv" and case.experts:
            windows, count = case.windows, 3
            saved += windows.batch * windows.pads * case.rank * width  # z of the padding
            saved += tokens * case.rank * width + 8 * windows.samples  # h, the choice
            saved += 4 * (windows.samples * case.rank + 2 * case.rank * count)  # of the gate
    return saved


@pytest.mark.slow_on_cpu("torch.bfloat16", "minimal-auto", "balanced-torch", "fast-auto")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@MEMORY
@pytest.mark.parametrize(
    "case",
    [
        Case(adapters=()),
        Case(dropout=0.2),
        Case(adapters=("qkv",), sliced=True),
        Case(experts=True),
    ],
    ids=lambda case: case.id,
)
def test_saved_bytes(case, memory, backend, dtype):
    """10 · D elements per token, lse and pieces of rank r; 3 · D and D in the other modes."""
    case = dataclasses.replace(case, memory=memory, dim=64, heads=4)
    x, tensors, _ = case.tensors(dtype, torch.float32)
    known = [t for t in tensors if t is not None]
    saved = saved_bytes(lambda: case.call(x, tensors, backend), known)
    width = dtype.itemsize
    tokens = case.batch * case.height * case.width
    # Of 10 · D, GELU's input has 4 · D where the MLP is four times as wide; here it has 2 · D.
    elements = {"fast": 10 - 2, "balanced": 3, "minimal": 1}[memory] * case.dim
    expected = tokens * elements * width + pieces(case, width)
    expected += 0 if memory == "minimal" else 4 * tokens * case.heads  # lse
    assert saved.hooks == expected
    assert saved.living == expected - x.nbytes


def test_without_gradients_nothing_is_kept_for_a_moment(monkeypatch):
    """Neither under no_grad nor of frozen tensors: the next stage meets no memory held."""
    case, kept = Case(adapters=()), []
    forward = Block.forward

    def noted(self, memory):
        result = forward(self, memory)
        kept.append(sum(t.nbytes for part in (result[2], *result[3]) for t in part))
        return result

    monkeypatch.setattr(Block, "forward", noted)
    x, tensors, _ = case.tensors(torch.float32)
    with torch.no_grad():
        case.call(x, tensors)
    case.call(x.detach(), [t if t is None else t.detach() for t in tensors])
    case.call(x, tensors)
    assert kept[:2] == [0, 0] and kept[2] > 0


@pytest.mark.parametrize("backend", BACKENDS)
@MEMORY
@pytest.mark.parametrize(
    "case", [Case(), Case(experts=True, dropout=0.2), Case(window=0)], ids=lambda case: case.id
)
def test_neither_inputs_nor_gradients_nor_what_is_saved_are_written(case, memory, backend):
    """Two backwards through one graph, which runs twice and whose result is used twice."""
    case = dataclasses.replace(case, memory=memory)
    x, tensors, dy = case.tensors(torch.float32)
    leaves = leaves_of(case, x, tensors)
    saved = []

    def pack(t):
        saved.append((t, t.detach().clone(), t._version))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        first, _ = case.call(x, tensors, backend)
        second, _ = case.call(x, tensors, backend)
    given = [(t, t.detach().clone(), t._version) for t in (dy, first, second)]
    alone = torch.autograd.grad(first, leaves, dy, retain_graph=True)
    for graph in (first, second, first):
        again = torch.autograd.grad(graph, leaves, dy, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
    twice = torch.autograd.grad([first, first], leaves, [dy, dy])
    assert all(torch.equal(2 * a, b) for a, b in zip(alone, twice, strict=True))
    for t, before, version in (*given, *saved):
        assert torch.equal(t, before) and t._version == version


def test_a_saved_input_that_was_changed_is_noticed():
    case = Case()
    x, tensors, dy = case.tensors(torch.float32)
    held = x.detach().clone().requires_grad_()
    changed = held * 1
    y, _ = case.call(changed, tensors)
    with torch.no_grad():
        changed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@MEMORY
def test_the_loss_alone(memory):
    """A backward that only the experts' balancing asks for."""
    case = Case(experts=True, memory=memory)
    results = []
    for backend in ("auto", "reference"):
        x, tensors, _ = case.tensors(torch.float64)
        _, (loss,) = case.call(x, tensors, "torch" if backend == "auto" else backend)
        leaves = leaves_of(case, x, tensors)
        results.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for ours, literal in zip(*results, strict=True):
        bound = 2**10 * torch.finfo(torch.float64).eps * literal.abs().max()
        assert (ours - literal).abs().max() <= bound


@pytest.mark.parametrize(
    ("place", "change", "sentence"),
    [
        (5, lambda t: t.to("meta"), "table_w of the block is on meta but x is on "),
        (8, lambda t: t.to("meta"), "lora_a of qkv is on meta but x is on "),
        (12, lambda t: t.to("meta"), "parameter 1 of qkv is on meta but x is on "),
        (8, lambda t: t[:, 1:], r"lora_a \(3, 31\) .* of qkv do not fit its weight \(96, 32\)"),
        (9, lambda t: t[1:], r"lora_b \(95, 3\) of qkv do not fit its weight \(96, 32\)"),
        (0, lambda t: t[1:], r"norm1_weight of the block has shape \(31,\), but must have \(32,\)"),
        (4, lambda t: t[1:], "table_h of the block has shape"),
        (6, lambda t: t[1:], r"the weight of qkv has shape \(95, 32\), but must have \(96, 32\)"),
    ],
)
def test_tensors_that_do_not_fit(place, change, sentence):
    x, tensors, _ = Case(experts=True).tensors(torch.float32)
    tensors[place] = change(tensors[place].detach())
    with pytest.raises(ValueError, match=sentence):
        Case(experts=True).call(x, tensors)
