# SPDX-License-Identifier: Apache-2.0
"""Compare a GPU's results file with the goals, one line each.

python -m benchmarks.goals benchmarks/results/<gpu>.csv
"""

import argparse
import csv
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Goal:
    """At most ``limit`` in the rows of a provider: their ratio, the time over that of another
    provider, or another value. shape: a pattern of the workload's name."""

    number: str
    what: str
    operation: str
    shape: str
    provider: str
    limit: float | None
    over: str = ""
    value: Callable[[Row], float] | None = None


def _time(row: Row) -> float:
    return float(row["p50_ms"])


def _ratio(row: Row) -> float:
    return float(row["ratio"])


def _to_floor(row: Row) -> float:
    return _time(row) / float(row["predicted_ms"])


def _peak(row: Row) -> float:
    """GB, as goals are given: the most that was allocated, weights and images included."""
    return (float(row["peak_mib"]) + float(row["resident_mib"])) * 2**20 / 1e9


OURS, FAST = "samfast", "samfast, fast"
FLASH, CUDNN = "flash without bias", "cuDNN without bias"
GOALS = (
    Goal("P1", "LoRA on qkv / frozen block", "block", "(?<!Conv-)LoRA on qkv", FAST, 1.12),
    Goal("P1", "LoRA on all / frozen block", "block", "LoRA on all", FAST, 1.20),
    Goal("P1b", "LoRA / frozen linear", "lora_linear", "qkv|lin1", OURS, 1.35),
    Goal("P1b", "LoRA / frozen linear", "lora_linear", "proj|lin2", OURS, 1.65),
    Goal("P2", "attention / flash", "relpos_attention", "", OURS, 1.25, over=FLASH),
    Goal("P2", "attention / cuDNN", "relpos_attention", "", OURS, None, over=CUDNN),
    Goal("P3", "windows / eager", "relpos_attention", "windows of", OURS, 1 / 6),
    Goal("P4", "Conv-LoRA / LoRA, block", "block", "Conv-LoRA", FAST, 1.15, over="samfast, LoRA"),
    Goal("P5", "PHM / nn.Linear", "hypercomplex", "PHM", OURS, 1.15),
    Goal("P5", "Kronecker / LoRA", "hypercomplex", "Kronecker", OURS, 1.05),
    Goal("P5", "TA-LoRA / LoRA", "task_core", "", OURS, 1.05),
    Goal("P5", "COBOT / LoRA, AdaptFormer", "cobot", "", OURS, 1.05),
    Goal("P6", "step / floor of FLOP", "encoder", "vit_h", FAST, 1.6, value=_to_floor),
    Goal("P8", "peak of a step, GB", "encoder", "vit_h", FAST, 16.0, value=_peak),
)


def table(rows: list[Row]) -> list[str]:
    """A line for every goal and shape, from the newest rows. Tests answer P9; there is no P7."""
    newest = {(r["operation"], r["shape"], r["provider"], r["mode"]): r for r in rows}
    lines = []
    for goal in GOALS:
        providers = {goal.provider, goal.over or goal.provider}
        shapes = dict.fromkeys(
            row["shape"] for row in rows
            if row["operation"] == goal.operation and re.search(goal.shape, row["shape"])
            and providers <= {p for o, s, p, _ in newest if (o, s) == key(row)}
        )  # fmt: skip
        limit = "" if goal.limit is None else f"goal {goal.limit:.3g}"
        head = f"{goal.number:4} {goal.what:27} {limit:10}"
        lines += [f"{head} {_measured(goal, shape, newest)}  ({shape})" for shape in shapes]
        if not shapes:
            lines.append(f"{head} no row")
    return lines


def key(row: Row) -> tuple[str, str]:
    return row["operation"], row["shape"]


def _measured(goal: Goal, shape: str, newest) -> str:
    """A number a mode, or why there is none, and whether the better one meets the goal."""
    values, words = [], []
    for mode in ("eager", "graph", ""):
        ours, other = (
            newest.get((goal.operation, shape, provider, mode), {})
            for provider in (goal.provider, goal.over or goal.provider)
        )
        if ours.get("p50_ms") and other.get("p50_ms"):
            value = _time(ours) / _time(other) if goal.over else (goal.value or _ratio)(ours)
            words.append(
                f"{mode} baseline not timed" if math.isnan(value) else f"{mode} {value:.3f}"
            )
            values += [] if math.isnan(value) else [value]
        else:
            words += [
                f"{mode} {r['provider']}: {r['note']}" for r in (ours, other) if r.get("note")
            ]
    if values and goal.limit is not None:
        words.append("met" if min(values) <= goal.limit else "MISSED")
    return ", ".join(dict.fromkeys(words)) or "not timed"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="compare a results file with the goals")
    parser.add_argument("results", type=Path)
    options = parser.parse_args(arguments)
    if not options.results.is_file():
        raise SystemExit(f"{options.results} is not a file")
    with options.results.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
