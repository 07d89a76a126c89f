# SPDX-License-Identifier: Apache-2.0
"""Drawings of a profile: operations under their ceilings, and the memory over one step."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from samfast.profiling.counted import CATEGORIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that colour-blind readers tell apart; by category, then by kind of operation.
_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7")
_OURS, _OTHERS = "#d55e00", "#0072b2"
_NAMED = 8  # points with names


def plot_png(result: dict[str, Any]) -> bytes:
    """Draw both, one above the other."""
    figure = _figure((8, 9))
    above, below = figure.subplots(2, 1)
    _roofline(above, result)
    _memory(below, result)
    return _png(figure)


def roofline_png(result: dict[str, Any]) -> bytes:
    """The operations by FLOP per byte and FLOP per second."""
    figure = _figure((8, 4.8))
    _roofline(figure.subplots(), result)
    return _png(figure)


def memory_png(result: dict[str, Any]) -> bytes:
    """Bytes of tensors over one step, by what they are for."""
    figure = _figure((8, 4.2))
    _memory(figure.subplots(), result)
    return _png(figure)


def _figure(size: tuple[float, float]) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: "Figure") -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _roofline(axes: "Axes", result: dict[str, Any]) -> None:
    limits = result["ceilings"]
    rows = [r for r in result["operations"] if r["tflop_per_s"] and r["bytes"]]
    points = [(r["flop"] / r["bytes"], 1e12 * r["tflop_per_s"], r) for r in rows]
    ridge = limits["gemm"] / limits["copy"]
    at = [ridge / 100, ridge * 100, *(x for x, _, _ in points)]
    low, high = min(at) / 2, max(at) * 30  # with room for names
    axes.plot(
        [low, ridge, high],
        [low * limits["copy"], limits["gemm"], limits["gemm"]],
        color="black",
        linewidth=1.2,
        label=f"{limits['gemm'] / 1e9:.0f} GFLOP/s, {limits['copy'] / 1e9:.0f} GB/s",
    )
    for x, y, row in points:
        own = row["name"].startswith("samfast::")
        size = 20 + 1000 * row["share"]
        axes.scatter(x, y, s=size, color=_OURS if own else _OTHERS, alpha=0.7, linewidths=0)
    _name(axes, [point for point in points if point[2]["share"] >= 0.005][:_NAMED])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("FLOP per second")
    axes.set_title("Operations under their ceilings; area: share of the step", loc="left")
    for colour, label in ((_OURS, "samfast"), (_OTHERS, "torch")):
        axes.scatter([], [], s=40, color=colour, label=label)
    axes.legend(loc="lower right", frameon=False)


def _name(axes: "Axes", points: Sequence[tuple[float, float, dict[str, Any]]]) -> None:
    """Names to the right of points, moved down where one would lie on another."""
    heights: list[tuple[float, float]] = []
    for x, y, row in sorted(points, key=lambda p: -p[1]):
        height = y
        while any(_ratio(height, h) < 1.5 and _ratio(x, a) < 60 for a, h in heights):
            height /= 1.25
        heights.append((x, height))
        axes.annotate(
            row["name"],
            (x, y),
            xytext=(x * 1.25 * (1 + row["share"]), height),  # past the point's own area
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "grey"},
        )


def _ratio(a: float, b: float) -> float:
    """How many times the larger is the smaller."""
    return max(a, b) / min(a, b)


def _memory(axes: "Axes", result: dict[str, Any]) -> None:
    memory = result["memory_over_step"]
    layers = [[size / 1e6 for size in memory[name]] for name in CATEGORIES]
    sums = [sum(column) for column in zip(*layers, strict=True)]
    count = len(sums)
    axes.stackplot(range(count), layers, labels=CATEGORIES, colors=_COLOURS, linewidth=0)
    peak = max(range(count), key=sums.__getitem__)
    axes.plot(peak, sums[peak], "v", color="black")
    axes.annotate(
        f"{sums[peak]:.1f} MB",
        (peak, sums[peak]),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right" if peak > count / 2 else "left",
    )
    axes.set_xlim(0, max(1, count - 1))
    axes.set_ylim(0, max(sums) * 1.15)
    axes.set_xticks([])
    axes.set_xlabel("one step, by allocations and releases in their order")
    axes.set_ylabel("MB of tensors")
    axes.set_title("Memory over a step", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8, reverse=True)
