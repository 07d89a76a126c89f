# SPDX-License-Identifier: Apache-2.0
"""What each method adds to ViT-B's encoder and what a forward keeps, counted without memory.

python -m benchmarks.methods            prints the table
python -m benchmarks.methods --record   counts, which takes a minute, and writes results/methods.csv
"""

import argparse
import csv
import dataclasses
import datetime
from pathlib import Path

import torch

import samfast
from benchmarks.saved import counted
from benchmarks.tables import RESULTS, Rows, markdown, number
from samfast.adapters.adapter import adapters
from samfast.adapters.method import Method
from samfast.kernels.sam_block.plan import MEMORY
from samfast.methods.registry import VARIANTS, DecoderOnly
from samfast.models import build_sam

NAME = "methods.csv"
COLUMNS = ("method", "parameters", *MEMORY, "merges", "torch", "samfast", "date")
COUNTED = {name: m for name, m in VARIANTS.items() if not isinstance(m, DecoderOnly)}
TASKS = ("one", "two")  # of TA-LoRA, which runs one of them


def attached(method: Method) -> torch.nn.Module:
    """A ViT-B without memory, with a bfloat16 base and the method's adapters alone trained."""
    if method.needs_tasks:
        method = dataclasses.replace(method, tasks=TASKS)
    sam = build_sam("vit_b", random_init=True, device="meta")
    return samfast.attach(sam, method, train=(), base_dtype=torch.bfloat16)


def row(name: str) -> dict[str, str]:
    """A method's row; bytes are those of one forward of the fused encoder at 1024², batch 1."""
    sam = attached(COUNTED[name])
    found = {"method": name, "parameters": str(samfast.report(sam).adapter_parameters)}
    merges = all(hasattr(layer, "merge") for layer in adapters(sam).values())
    found["merges"] = "yes" if merges else "no"
    for memory in MEMORY:
        encoder = samfast.fuse(sam, memory=memory).image_encoder
        found[memory] = str(counted(encoder, torch.bfloat16).hooks)
    made = {"torch": torch.__version__, "samfast": samfast.__version__}
    return {**found, **made, "date": str(datetime.date.today())}


def table(folder: Path = RESULTS) -> str:
    """The recorded rows for readers."""
    found = Rows(folder, NAME)
    rows = []
    for name in COUNTED:
        last = found.last(method=name)
        kept = (f"{number(last[memory], unit=10**9)} GB" for memory in MEMORY)
        rows.append([f"`{name}`", f"{int(last['parameters']):,}", *kept, last["merges"]])
    modes = (f"keeps, `{memory}`" for memory in MEMORY)
    return markdown(["`--method`", "parameters", *modes, "merges"], rows)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="count parameters and saved bytes of each method")
    parser.add_argument("--record", action="store_true", help="count them anew and write them")
    if parser.parse_args(arguments).record:
        rows = [row(name) for name in COUNTED]
        with (RESULTS / NAME).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
