# SPDX-License-Identifier: Apache-2.0
"""The table of a profile for readers."""

from collections.abc import Sequence
from typing import Any

from samfast.profiling.notes import ROWS, is_above

_HEADS = ("calls", "ms", "spread", "share", "GFLOP", "MB", "TFLOP/s", "GB/s", "ceiling", "reached")
_COUNTS = ("launches", "syncs", "saved MB")


def table(result: dict[str, Any]) -> str:
    """Operations, phases, blocks, totals and the largest loss."""
    parts = [head(result), _operations(result["operations"])]
    parts.append(_groups("phase", result["phases"]))
    parts.append(_groups("block", result["blocks"]))
    parts.append("\n".join(totals(result)))
    if result.get("compare"):
        parts.append(comparison(result["compare"]))
    parts += [f"note: {note}" for note in result["notes"]]
    parts.append(f"largest loss: {result['largest_loss']}")
    return "\n\n".join(parts)


def totals(result: dict[str, Any]) -> list[str]:
    """What a step takes in all, a line each."""
    steps, sums, limits = result["steps"], result["totals"], result["ceilings"]
    step = f"{steps['ms']:.2f} ms ({steps['least_ms']:.2f} to {steps['most_ms']:.2f})"
    lines = [f"step {step}, median of {steps['timed']}, under the profiler"]
    if steps["plain_ms"] is not None:
        more = steps["profiler_overhead"]
        costs = f"so it costs {more:+.0%}" if more > 0 else "so it costs less than steps vary"
        lines[0] += f"; without it {steps['plain_ms']:.2f} ms, {costs}"
    flop = f"{sums['flop'] / 1e9:.3f} GFLOP executed"
    if sums["model_flop"] is not None:
        flop += f", {sums['model_flop'] / 1e9:.3f} GFLOP of the stock model's step"
    lines.append(
        f"{flop}; {sums['launches']} launches, {sums['syncs']} synchronisations, "
        f"{sums['saved_bytes'] / 1e6:.2f} MB saved for the backward"
    )
    parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sums["peak"].items())
    lines.append(f"peak memory {sums['peak_bytes'] / 1e6:.1f} MB of tensors ({parts})")
    if sums["allocator_peak_bytes"] is not None:
        lines[-1] += f"; {sums['allocator_peak_bytes'] / 1e6:.1f} MB as the allocator counts"
    lines.append(
        f"ceilings of {limits['machine']}, measured {limits['date']}: {limits['dtype']} products "
        f"{limits['gemm'] / 1e12:.3f} TFLOP/s ({limits['product']}), copies "
        f"{limits['copy'] / 1e9:.1f} GB/s, a call {1e6 * limits['launch']:.2f} µs"
    )
    return lines


def comparison(rows: Sequence[dict[str, Any]]) -> str:
    """The table of --compare."""
    return aligned(comparison_cells(rows))


def comparison_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The lines of that table; one of two cells is a name and what is missing."""
    heads = ["run in turns", "ms", "spread", "of the first", "saved MB", "peak MB", "launches"]
    lines = [heads]
    for row in rows:
        if row["missing"] is not None:
            lines.append([row["name"], row["missing"]])
            continue
        lines.append(
            [
                row["name"],
                f"{row['ms']:.2f}",
                f"{row['least_ms']:.2f}-{row['most_ms']:.2f}",
                f"{row['ratio']:.2f}",
                f"{row['saved_bytes'] / 1e6:.2f}",
                f"{row['peak_bytes'] / 1e6:.1f}",
                str(row["launches"]),
            ]
        )
    return lines


def cells(row: dict[str, Any]) -> list[str]:
    """An operation's row, without its name."""
    return [
        str(row["calls"] or ""),
        f"{row['ms']:.3f}",
        f"{row['least_ms']:.3f}-{row['most_ms']:.3f}",
        f"{row['share']:.1%}",
        _number(row["flop"] / 1e9),
        _number(row["bytes"] / 1e6),
        _number(row["tflop_per_s"]),
        _number(row["gb_per_s"]),
        row["ceiling"] or "",
        _reached(row),
        *_counted(row),
    ]


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that count, and one that stands for the others."""
    if len(rows) <= ROWS + 1:
        return list(rows)
    others = rows[ROWS:]
    sums = (
        *("calls", "ms", "least_ms", "most_ms", "share", "flop", "bytes"),
        *("launches", "syncs", "saved_bytes"),
    )
    row = {name: sum(other[name] for other in others) for name in sums}
    none = dict.fromkeys(("tflop_per_s", "gb_per_s", "ceiling", "reached"))
    return [*rows[:ROWS], {"name": f"{len(others)} others", **row, **none}]


def heads_of_operations() -> list[str]:
    return ["operation", *_HEADS, *_COUNTS]


def group_cells(row: dict[str, Any]) -> list[str]:
    """A phase's or a block's row, without its name."""
    return [
        f"{row['ms']:.3f}",
        f"{row['least_ms']:.3f}-{row['most_ms']:.3f}",
        f"{row['share']:.1%}",
        _number(row["flop"] / 1e9),
        *_counted(row),
    ]


def heads_of_groups(kind: str) -> list[str]:
    return [kind, "ms", "spread", "share", "GFLOP", *_COUNTS]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left; a line of two cells is a name and a sentence."""
    full = [line for line in lines if len(line) != 2]
    widths = [max(len(line[i]) for line in full) for i in range(len(full[0]))]
    widths[0] = max(len(line[0]) for line in lines)
    made = []
    for line in lines:
        first, *rest = line
        if len(line) == 2:
            made.append(f"{first:<{widths[0]}}  {rest[0]}")
            continue
        numbers = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        made.append("  ".join([f"{first:<{widths[0]}}", *numbers]).rstrip())
    return "\n".join(made)


def head(result: dict[str, Any]) -> str:
    """What was profiled."""
    return f"{result['what']} on {result['machine']}, torch {result['torch']}"


def _operations(rows: Sequence[dict[str, Any]]) -> str:
    lines = [[row["name"], *cells(row)] for row in shown(rows)]
    return aligned([heads_of_operations(), *lines])


def _groups(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [[row["name"], *group_cells(row)] for row in rows]
    return aligned([heads_of_groups(kind), *lines])


def _counted(row: dict[str, Any]) -> list[str]:
    saved = row["saved_bytes"] / 1e6
    return [str(row["launches"] or ""), str(row["syncs"] or ""), _number(saved)]


def _reached(row: dict[str, Any]) -> str:
    """The share of the ceiling; a word where it cannot be one, which a note explains."""
    if row["reached"] is None:
        return ""
    return "above" if is_above(row) else f"{row['reached']:.0%}"


def _number(value: float | None) -> str:
    """Three digits; nothing for nothing."""
    if not value:
        return ""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
