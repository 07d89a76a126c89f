# SPDX-License-Identifier: Apache-2.0
"""Each moment of a step belongs to one operation, phase and block; made-up events."""

import pytest

from samfast.profiling.counted import Call
from samfast.profiling.names import row_of_call, row_of_node
from samfast.profiling.tables import _products_apart, _within
from samfast.profiling.timeline import MARK, Event, timeline

LEAVES = {"aten::addmm", "aten::add", "aten::_foreach_norm"}


def spent(events, by, leaves=LEAVES, of_sequence=lambda _: None):
    """ns by what ``by`` says of an owner, of all steps."""
    found = {}
    for piece in timeline(events, of_sequence, leaves).pieces:
        key = by(piece.owner)
        found[key] = found.get(key, 0) + piece.end - piece.start
    return found


def marks(*moments):
    return [Event(MARK, moment, moment) for moment in moments]


STEP = [
    *marks(0, 100),
    Event("samfast/block/blocks.0", 5, 40, scope=7),
    Event("samfast::sam_block", 10, 30),
    Event("SamBlockFunction", 11, 29),
    Event("samfast::sam_block_forward", 12, 28),
    Event("aten::empty", 13, 14),
    Event("aten::addmm", 14, 20),
    Event("aten::copy_", 15, 16),
    Event("samfast_native::lora_down", 21, 22),
    Event("aten::linear", 32, 36),
    Event("aten::addmm", 33, 35),
    Event("autograd::engine::evaluate_function: AddmmBackward0", 50, 60, sequence=7),
    Event("AddmmBackward0", 51, 59, sequence=7, scope=1),
    Event("aten::add", 52, 58),
    Event("aten::_foreach_norm", 70, 75),
    Event("aten::linalg_vector_norm", 71, 74),
    Event("Optimizer.step#AdamW.step", 80, 90, scope=7),
]


def test_rows_have_their_own_time():
    assert spent(STEP, lambda owner: owner.row) == {
        None: 5 + 5 + 2 + 4 + 10 + 10 + 5 + 10,
        "samfast::sam_block": 20 - 6,  # its product is a row, what it calls else is not
        "aten::addmm": 6 + 2,
        "aten::linear": 2,
        "autograd engine": 4,
        "aten::add": 6,
        "aten::_foreach_norm": 5,
        "Optimizer.step": 10,
    }


def test_phases_and_blocks():
    """Clipping comes after the backward and belongs to the optimizer."""
    phases = spent(STEP, lambda owner: owner.phase)
    assert phases == {"forward": 20 + 4, "backward": 10, "optimizer": 15, "host gap": 51}
    blocks = spent(STEP, lambda owner: owner.block, of_sequence={7: "blocks.0"}.get)
    assert blocks == {"blocks.0": 35 + 10, None: 55}


def test_a_step_ends_where_the_next_begins():
    events = [*marks(0, 20, 50), Event("aten::add", 10, 30)]
    found = timeline(events, lambda _: None, LEAVES)
    assert found.walls == [20, 30]
    pieces = [(p.start, p.end, p.step, p.owner.row) for p in found.pieces]
    assert pieces == [
        (0, 10, 0, None),
        (10, 20, 0, "aten::add"),
        (20, 30, 1, "aten::add"),
        (30, 50, 1, None),
    ]


def test_kernels_of_a_gpu_and_its_gap():
    """A kernel belongs to what launched it; where none runs, the device waits."""
    events = [
        *marks(0, 100),
        Event("samfast::sam_block", 0, 10, key=1),
        Event("aten::addmm", 2, 4, key=2),
        Event("autograd::engine::evaluate_function: X", 20, 30, thread=2, key=3, sequence=1),
        Event("aten::add", 22, 24, thread=2, key=4),
        Event("flash", 10, 30, device=True, by=1),
        Event("gemm", 25, 50, device=True, by=2),  # on another stream
        Event("add", 60, 70, device=True, by=4),
        Event("memset", 80, 85, device=True, by=99),
        Event("aten::_foreach_norm", 40, 42, key=5),
        Event("Optimizer.step#AdamW.step", 43, 50, scope=7, key=6),
        Event("aten::add", 44, 46, key=7),
        Event("norm", 86, 88, device=True, by=5),
        Event("adam", 88, 91, device=True, by=7),
    ]
    found = timeline(events, lambda _: "blocks.1", LEAVES)
    assert found.on_device
    assert spent(events, lambda owner: owner.row) == {
        "samfast::sam_block": 20,
        "aten::addmm": 20,
        "aten::add": 10 + 3,
        "aten::_foreach_norm": 2,
        "memset": 5,
        None: 40,
    }
    phases = spent(events, lambda owner: owner.phase)
    assert phases == {"forward": 40, "backward": 10, "optimizer": 5 + 2 + 3, "host gap": 40}


def test_two_marks_are_needed():
    with pytest.raises(ValueError, match="expected two marks of a step or more, got 1"):
        timeline(marks(3), lambda _: None)


def test_names_of_rows():
    block = "samfast::sam_block"
    timed = {(block, "aten::mm")}
    assert row_of_call(block, "aten::mm", timed) == "aten::mm"
    assert row_of_call(block, "aten::bmm", timed) == block  # of another path than the one timed
    assert row_of_call(block, "aten::copy_", timed) == block
    assert row_of_call(None, "aten::copy_", timed) == "aten::copy_"
    assert row_of_call(block, "samfast::lora_linear_backward", timed) == "samfast::lora_linear"
    assert row_of_node("AddmmBackward0") == "aten::addmm"
    assert row_of_node("NativeLayerNormBackward0") == "aten::native_layer_norm"
    assert row_of_node("SamBlockFunctionBackward") == block
    assert row_of_node("MyOwnBackward") == "MyOwn"


def test_products_that_a_native_operator_runs_otherwise():
    """It has their time where not as many were counted; alike they have rows of their own."""
    block, found = "samfast::sam_block", timeline(STEP, lambda _: None, LEAVES)
    outer = Call(None, "aten::addmm", "forward", None, 1, 0, 0, 0)
    alike = [outer, outer._replace(inside=block)]
    assert (block, "aten::addmm") in _products_apart(found, alike)
    apart = _products_apart(found, [*alike, outer._replace(inside=block, name="aten::mm")])
    assert apart == {(None, "aten::addmm")}
    owners = [_within(piece, apart).owner for piece in found.pieces]
    of_block = {owner.called for owner in owners if owner.row == block}
    assert len(of_block) == 1  # call of the operation
    assert len({owner.called for owner in owners if owner.row == "aten::addmm"}) == 1
