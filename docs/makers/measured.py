# SPDX-License-Identifier: Apache-2.0
"""The page of measured numbers, made of benchmarks/results."""

import csv
from pathlib import Path

from benchmarks import methods, tables

ABOUT = """# Measured

Every number here is a row of `benchmarks/results/`, with its machine and date where the file has
them. Whatever depends on no machine is counted. Of rows that were recorded several times, the last
one stands here.

**Never run on a GPU.** There are no GPU times here, because no GPU has run the kernels yet.
`make bench-gpu` records them.
"""
COUNTED = """## Kept for the backward

What one forward of the image encoder keeps for its backward at 1024², batch 1, with LoRA of rank 4
on qkv, proj, lin1 and lin2, and a bfloat16 base and residual stream. Counted, the same on any
machine.
"""
STEPS = """## Memory of a step

Peak resident memory of one whole step at 1024², batch 1, float32, with random weights: encoder with
LoRA on four layers, mask decoder, AdamW.
"""
LORA = """## LoRA on a CPU

Time of forward and backward of the linear layers of a ViT-B block at 1024², LoRA of rank 4,
float32, divided by that of the frozen layer.
"""
CONV_LORA = """## Conv-LoRA on a CPU

Forward and backward of Conv-LoRA on packed qkv, rank 3, eight experts, with the balancing loss,
divided by the frozen layer. Peak: the most that tensors take during one call.
"""
TASKS = """## Several tasks

Validation scores of 36 street scenes of CamVid for training and 10 for validation, from random
weights, on a CPU. [Several tasks](../guides/tasks.md) has the command.
"""
TIMES = ("p50_ms", "ratio", "peak_mib", "saved_mib")
SHOWN = {  # by the file: what says which row it is, and what is shown of it
    "saved_bytes.csv": (("model", "provider"), ("saved_bytes", "torch", "date")),
    "steps.csv": (
        ("model", "provider", "memory", "batch", "image_size"),
        ("peak_gib", "note", "machine", "date"),
    ),
    methods.NAME: (("method",), (*methods.COLUMNS[1:],)),
    "task_scores.csv": (("run",), ("miou", "accuracy", "mean_error", "relative_error")),
}
RATIOS = (("operation", "provider", "mode", "shape", "dtype"), (*TIMES, "machine", "torch", "date"))


def page() -> str:
    """The page: tables for reading, then all rows of the files."""
    parts = [ABOUT]
    for about, table in (
        (COUNTED, tables.saved_bytes),
        (STEPS, tables.steps),
        (LORA, tables.lora_linear),
        (CONV_LORA, tables.conv_lora),
        (TASKS, tables.task_scores),
    ):
        parts += [about, table(tables.RESULTS)]
    parts.append("## All rows\n")
    for path in sorted(tables.RESULTS.glob("*.csv")):
        parts += [f"### {path.stem}\n", rows(path)]
    return "\n".join(parts)


def rows(path: Path) -> str:
    """The last of each kind of row of a results file, as a table."""
    keys, values = SHOWN.get(path.name, RATIOS)
    with path.open(newline="", encoding="utf-8") as file:
        last = {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}
    columns = [c for c in (*keys, *values) if any(row[c] for row in last.values())]
    common = {c: v.pop() for c in columns if len(v := {row[c] for row in last.values()}) == 1}
    columns = [c for c in columns if c not in common]
    table = tables.markdown(columns, ([row[c] for c in columns] for row in last.values()))
    told = "; ".join(f"{column} {value}" for column, value in common.items())
    return f"{table}\nAll rows: {told}.\n" if told else table
