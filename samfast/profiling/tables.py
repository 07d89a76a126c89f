# SPDX-License-Identifier: Apache-2.0
"""Times, counts and ceilings of a recording, joined into one table."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from samfast.profiling.ceilings import Ceilings
from samfast.profiling.counted import CATEGORIES, Call, CountedStep
from samfast.profiling.names import GAP, OWN, is_product, row_of_call
from samfast.profiling.notes import above, largest_loss, notes_of
from samfast.profiling.recorder import Recorder
from samfast.profiling.timeline import (
    BACKWARD,
    DATA,
    FORWARD,
    OPTIMIZER,
    PHASES,
    Owner,
    Piece,
    Timeline,
    events_of,
    timeline,
)

REST = "rest of the model"
BETWEEN = "between blocks"  # the host gap, but for what blocks have of it inside
_NO_BLOCK = {OPTIMIZER: OPTIMIZER, DATA: DATA, GAP: BETWEEN}
_POINTS = 600  # of the memory's history


def result(
    recorder: Recorder,
    ceilings: Ceilings,
    known: dict[str, Any] | None = None,
    again: Callable[[Ceilings], Ceilings] = lambda ceilings: ceilings,
) -> dict[str, Any]:
    """All that is known of the steps, as JSON has it; times in ms, sizes in bytes.

    known: what the caller knows, such as settings and ``model_flop``
    again: measures the ceilings once more, where an operation is above its own
    """
    known = dict(known or {})
    events, leaves = events_of(recorder.profiler), recorder.counted.storages.names
    times = timeline(events, recorder.blocks.of_sequence, leaves, recorder.marks)
    calls = _with_optimizer(recorder.counted, bool(recorder.optimizers))
    alike = not recorder.other_shapes
    rows = _operations(times, calls, recorder.counted, ceilings if alike else None)
    if above(rows):
        ceilings = again(ceilings)
        rows = _operations(times, calls, recorder.counted, ceilings)
    wall = sum(times.walls) / 1e6
    count = len(times.walls)
    model_flop = known.pop("model_flop", None)
    flop = sum(call.flops for call in calls)
    totals = {
        "ms": wall / count,
        "outer_ms": 1e3 * sum(recorder.seconds) / count,
        "flop": flop,
        "model_flop": model_flop,
        "tflop_per_s": flop / (wall / count) / 1e9,
        "bytes": sum(call.bytes for call in calls),
        "launches": sum(call.launches for call in calls),
        "syncs": sum(call.syncs for call in calls),
        "saved_bytes": sum(kept.size for kept in recorder.counted.saved()),
        "peak_bytes": sum(recorder.counted.peak().values()),
        "peak": recorder.counted.peak(),
        "allocator_peak_bytes": recorder.allocator_peak,
    }
    return {
        "torch": torch.__version__,
        "machine": ceilings.machine,
        **known,
        "steps": _steps(recorder),
        "totals": totals,
        "operations": rows,
        "phases": _phases(times, calls, recorder.counted),
        "blocks": _blocks(times, calls, recorder.counted),
        "largest_loss": largest_loss(rows, times.on_device, totals["ms"]),
        "ceilings": ceilings._asdict(),
        "notes": notes_of(recorder, ceilings, rows),
        "memory_over_step": _thinned(recorder.counted.storages.history()),
    }


def _steps(recorder: Recorder) -> dict[str, Any]:
    timed = [1e3 * seconds for seconds in recorder.seconds]
    plain = [1e3 * seconds for seconds in recorder.plain]
    overhead = statistics.median(timed) / statistics.median(plain) - 1 if plain else None
    return {
        "timed": len(timed),
        "ms": statistics.median(timed),
        "least_ms": min(timed),
        "most_ms": max(timed),
        "plain_ms": statistics.median(plain) if plain else None,
        "profiler_overhead": overhead,
    }


def _with_optimizer(counted: CountedStep, steps: bool) -> list[Call]:
    """The calls, of which those after the last backward are the optimizer's, if there is one."""
    calls = counted.counts.calls
    last = max((i for i, call in enumerate(calls) if call.phase == BACKWARD), default=len(calls))
    after = OPTIMIZER if steps else FORWARD
    return [c._replace(phase=after) if i > last else c for i, c in enumerate(calls)]


def _operations(
    times: Timeline, calls: Sequence[Call], counted: CountedStep, ceilings: Ceilings | None
) -> list[dict[str, Any]]:
    """One row for each operation, the longest first.

    Rates are None where the calls of the timed steps are not those of the counted step, or where
    there are no ceilings, because shapes differ.
    """
    steps = len(times.walls)
    apart = _products_apart(times, calls)
    times = times._replace(pieces=[_within(piece, apart) for piece in times.pieces])
    spent = _by_step(times.pieces, steps, lambda owner: owner.row or GAP)
    made = Counter(row for _, row in _timed_calls(times.pieces))

    def row_of(call: Call) -> str:
        return row_of_call(call.inside, call.name, apart)

    seen = Counter(row_of(call) for call in calls if call.launches)
    seen.update({n: counted.counts.entered[n] - seen[n] for n in seen if n.startswith(OWN)})
    costs = _costs(calls, row_of)
    for kept in counted.saved():
        costs[kept.row]["saved_bytes"] += kept.size
    wall = sum(times.walls)
    rows = []
    for name in {*spent, *costs}:
        each = spent.get(name, [0] * steps)
        cost = costs[name]
        row = {
            "name": name,
            "calls": round(made[name] / steps),
            "timed_calls": made[name] / steps,
            "counted_calls": seen[name],
            "ms": statistics.median(each) / 1e6,
            "least_ms": min(each) / 1e6,
            "most_ms": max(each) / 1e6,
            "share": sum(each) / wall,
            **cost,
        }
        # What a library does in one call on a CPU is one launch there.
        launched = cost if times.on_device else cost | {"launches": round(made[name] / steps)}
        same = made[name] == seen[name] * steps
        rows.append(row | _bound(launched, sum(each) / steps / 1e9 if same else 0, ceilings))
    return sorted(rows, key=lambda row: (-row["share"], row["name"]))


def _products_apart(times: Timeline, calls: Iterable[Call]) -> set[tuple[str | None, str]]:
    """(samfast's operation, product) of the products that have rows of their own.

    Products inside an operation have none where a native operator runs others than are counted;
    the operation then has their time and their cost.
    """
    steps = len(times.walls)
    timed = Counter((o.inside, row) for o, row in _timed_calls(times.pieces) if is_product(row))
    counted = Counter((c.inside, c.name) for c in calls if c.launches and is_product(c.name))
    keys = {*timed, *counted}
    other = {
        inside for inside, name in keys if timed[inside, name] != steps * counted[inside, name]
    }
    return {key for key in keys if key[0] not in other}


def _within(piece: Piece, apart: set[tuple[str | None, str]]) -> Piece:
    """The piece as its operation's, unless it is of a product that has a row of its own."""
    owner = piece.owner
    product = owner.inside is not None and is_product(owner.row or "")
    if not product or (owner.inside, owner.row) in apart:
        return piece
    return piece._replace(owner=owner._replace(row=owner.inside, called=owner.entered))


def _timed_calls(pieces: Iterable[Piece]) -> list[tuple[Owner, str]]:
    """(owner, row), once for each call of all steps."""
    # Each thread numbers its calls itself; beside a GPU another thread makes the backward.
    found: dict[tuple[Any, ...], tuple[Owner, str]] = {}
    for piece in pieces:
        o = piece.owner
        if o.row is not None and o.called:
            found.setdefault((o.row, o.called, o.phase == BACKWARD), (o, o.row))
    return list(found.values())


def _bound(cost: dict[str, int], seconds: float, ceilings: Ceilings | None) -> dict[str, Any]:
    """Rates, and the ceiling that binds. seconds: 0 where they are not those of the cost"""
    if ceilings is None or not seconds or not (cost["flop"] or cost["bytes"]):
        return {"tflop_per_s": None, "gb_per_s": None, "ceiling": None, "reached": None}
    least = ceilings.least_seconds(cost["flop"], cost["bytes"], cost["launches"])
    binds = max(least, key=least.__getitem__)
    return {
        "tflop_per_s": cost["flop"] / seconds / 1e12,
        "gb_per_s": cost["bytes"] / seconds / 1e9,
        "ceiling": binds,
        "reached": least[binds] / seconds,
    }


def _phases(times: Timeline, calls: Sequence[Call], counted: CountedStep) -> list[dict[str, Any]]:
    costs = _costs(calls, lambda call: call.phase)
    costs[FORWARD]["saved_bytes"] = sum(kept.size for kept in counted.saved())
    rows = _groups(times, costs, lambda owner: owner.phase)
    order = {name: i for i, name in enumerate(PHASES)}
    return sorted(rows, key=lambda row: order[row["name"]])


def _blocks(times: Timeline, calls: Sequence[Call], counted: CountedStep) -> list[dict[str, Any]]:
    """In the order in which they first ran, what belongs to none last."""

    def block(owner: Owner | Call) -> str:
        return owner.block or _NO_BLOCK.get(owner.phase or "", REST)

    costs = _costs(calls, block)
    for kept in counted.saved():
        costs[kept.block or REST]["saved_bytes"] += kept.size
    rows = _groups(times, costs, block)
    order: dict[str, int] = {}
    for piece in times.pieces:
        order.setdefault(block(piece.owner), len(order))
    last = {name: i for i, name in enumerate((REST, OPTIMIZER, DATA, BETWEEN), 1)}
    return sorted(rows, key=lambda r: (last.get(r["name"], 0), order.get(r["name"], len(order))))


def _groups(
    times: Timeline, costs: dict[str, dict[str, int]], key: Callable[[Owner], Any]
) -> list[dict[str, Any]]:
    steps, wall = len(times.walls), sum(times.walls)
    spent = _by_step(times.pieces, steps, key)
    rows = []
    for name in {*spent, *costs}:
        each = spent.get(name, [0] * steps)
        row = {
            "name": name,
            "ms": statistics.median(each) / 1e6,
            "least_ms": min(each) / 1e6,
            "most_ms": max(each) / 1e6,
            "share": sum(each) / wall,
        }
        rows.append(row | costs[name])
    return rows


def _by_step(
    pieces: Iterable[Piece], steps: int, key: Callable[[Owner], Any]
) -> dict[str, list[int]]:
    """ns of each step, by what ``key`` makes of an owner."""
    spent: dict[Any, list[int]] = defaultdict(lambda: [0] * steps)
    for piece in pieces:
        spent[key(piece.owner)][piece.step] += piece.end - piece.start
    return dict(spent)


def _costs(calls: Iterable[Call], key: Callable[[Call], Any]) -> dict[Any, dict[str, int]]:
    names = ("flop", "bytes", "launches", "syncs", "saved_bytes")
    costs: dict[Any, dict[str, int]] = defaultdict(lambda: dict.fromkeys(names, 0))
    for call in calls:
        cost = costs[key(call)]
        cost["flop"] += call.flops
        cost["bytes"] += call.bytes
        cost["launches"] += call.launches
        cost["syncs"] += call.syncs
    return costs


def _thinned(history: Sequence[dict[str, int]]) -> dict[str, list[int]]:
    """By category, few enough points to draw, of which one is the peak."""
    stride = -(-len(history) // _POINTS)
    peak = max(range(len(history)), key=lambda i: sum(history[i].values()))
    at = sorted({*range(0, len(history), stride), peak, len(history) - 1})
    return {name: [history[i][name] for i in at] for name in CATEGORIES}
