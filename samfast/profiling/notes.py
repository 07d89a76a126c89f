# SPDX-License-Identifier: Apache-2.0
"""Notes on a profile in sentences, and its largest loss."""

from collections.abc import Sequence
from typing import Any

from samfast.profiling.ceilings import Ceilings
from samfast.profiling.names import GAP
from samfast.profiling.recorder import Recorder
from samfast.profiling.timeline import COMPILED

ROWS = 24  # operations that are shown; the rest is one row
_SHARE = 0.01  # of the step, from which on a row is worth a sentence


def is_above(row: dict[str, Any]) -> bool:
    """Whether a row seems to be faster than this machine can be, in whole per cent."""
    return row["reached"] is not None and round(100 * row["reached"]) > 100


def above(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are above their ceilings, of those that are shown. rows: of all operations"""
    return list(filter(is_above, rows[:ROWS]))


def notes_of(recorder: Recorder, ceilings: Ceilings, rows: Sequence[dict]) -> list[str]:
    """The notes of a result. rows: of the operations"""
    notes = []
    if fast := above(rows):
        notes.append(_about_above(fast))
    if recorder.other_shapes:
        notes.append(_about_shapes(recorder))
    elif unknown := [r for r in rows if r["share"] > _SHARE and _is_unknown(r)]:
        notes.append(_about_unknown(unknown))
    if recorder.both:
        notes.append(
            "one step was timed and counted at once, so its times include the counting; run at "
            "least two steps for times without it"
        )
    if any(r["name"] == COMPILED and r["calls"] for r in rows):
        notes.append(
            "torch.compile fuses operations: the row of the compiled graph has their time, but no "
            "FLOP and no bytes; these are in the rows of the operations, counted as the program is "
            "written"
        )
    if recorder.compiled:
        notes.append(
            "torch.compile compiled during the timed steps, so their times include that; run more "
            "steps with the same shapes"
        )
    elif recorder.left_out:
        notes.append(
            f"torch.compile compiled in the first {recorder.left_out} of the timed steps, which "
            "do not count"
        )
    if hidden := sorted(recorder.counted.hidden):
        notes.append(
            f"the program's own hooks save tensors for backward as {_listed(hidden)}, whose bytes "
            "are not counted"
        )
    notes += recorder.remarks
    if ceilings.remark:
        notes.append(ceilings.remark)
    return notes


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _about_above(rows: Sequence[dict]) -> str:
    """Which rows, by how much, and why that may be."""
    some = [row for row in rows if row["share"] > _SHARE] or rows[:3]
    each = _listed(
        [f"{r['name']} ({r['reached']:.2f} times its {r['ceiling']} ceiling)" for r in some]
    )
    if len(some) < len(rows):
        each += f", and {len(rows) - len(some)} shorter ones"
    why = "the operation does less work than counted (a fast algorithm, or cached data)"
    return (
        f"above their ceilings are {each}: either {why}, or the machine was busy when the "
        "ceilings were measured; --fresh-ceilings measures them again"
    )


def _about_shapes(recorder: Recorder) -> str:
    steps = recorder.other_shapes
    return (
        f"{len(steps)} of {len(recorder.seconds)} timed steps have inputs of other shapes than the "
        f"counted step ({steps[0]}), so no rates are given; FLOP, bytes and memory are of the "
        "counted step"
    )


def _is_unknown(row: dict[str, Any]) -> bool:
    """Whether what the row does in its time is not known: the calls that were timed are not those
    that were counted, or the graph that runs was compiled."""
    if row["name"] == COMPILED:
        return True
    return bool(row["flop"] or row["bytes"]) and row["share"] > 0 and row["reached"] is None


def _about_unknown(rows: Sequence[dict]) -> str:
    """Why these rows have no rates."""
    each = (
        f"{r['name']} (timed {r['timed_calls']:.4g} calls, counted {r['counted_calls']})"
        for r in rows
    )
    return (
        f"no rates are given for {', '.join(each)}: the timed and the counted calls differ, "
        "because steps differ or because counting changes what torch calls"
    )


def largest_loss(rows: Sequence[dict], on_device: bool, total: float) -> str:
    """A sentence that names where most time goes that the ceilings do not ask for.

    A row whose rates are not known loses nothing that is known; a second clause names it.
    """

    def lost(row: dict) -> float:
        return 0 if _is_unknown(row) else row["share"] * (1 - min(1.0, row["reached"] or 0.0))

    row = max(rows, key=lost)
    sentence = _loss(row, lost(row), on_device)
    unknown = max(filter(_is_unknown, rows), key=lambda r: r["share"], default=None)
    if unknown is not None and unknown["share"] > lost(row):
        compiled = unknown["name"] == COMPILED
        why = "its FLOP are not counted" if compiled else "the timed and the counted calls differ"
        sentence += (
            f"; {unknown['name']} takes {unknown['share']:.0%}, but how much of that is lost "
            f"is not known: {why}"
        )
    return sentence


def _loss(row: dict[str, Any], lost: float, on_device: bool) -> str:
    """Describe one row. lost: share of the step"""
    share = f"{row['share']:.0%}"
    if row["name"] == GAP:
        if on_device:
            return f"host-bound: the device waits {share} of the step"
        return f"host-bound: no operator runs {share} of the step, which is Python's"
    if row["ceiling"] is None:
        return f"{row['name']} takes {share} of the step and computes nothing that is counted"
    if is_above(row):
        return (
            f"no loss is known: {row['name']} takes {share} of the step, above its ceiling "
            f"({row['ceiling']})"
        )
    return (
        f"{row['name']} takes {share} of the step at {row['reached']:.0%} of its ceiling "
        f"({row['ceiling']}); {lost:.0%} of the step is lost there"
    )
