# SPDX-License-Identifier: Apache-2.0
"""Few numbers in little time: attention and blocks of SAM, verified first, beside what others run.

python -m benchmarks.quick --op block --model vit_h
python -m benchmarks.quick --goals build/quick.csv

A row is written as soon as there is one. Nothing here waits for torch.compile.
"""

import argparse
import csv
import dataclasses
import datetime
import math
import sys
import time
from pathlib import Path

import torch

import samfast
from benchmarks import evidence, machine, run, smoke
from benchmarks.model import by_depth, floor
from benchmarks.operations import segment_anything_missing
from benchmarks.rates import Rates, load
from benchmarks.shapes import ENCODERS
from benchmarks.verify import verdict, verify
from samfast.kernels._common.windows import Windows

RESULTS = smoke.ROOT / "build" / "quick.csv"
SIDE, WINDOW = 64, 14
OURS = "samfast, fast"
PEERS = {
    "relpos_attention": (
        "eager", "SDPA + mask", "samfast", "flash without bias", "SDPA without bias",
    ),
    "block": ("eager", "SDPA + mask, PEFT", OURS, "samfast, frozen", "samfast, LoRA"),
}  # fmt: skip
ADAPTERS = ("LoRA on all", "LoRA on qkv", "Conv-LoRA on qkv")


def workloads(operation: str, model: str, batch: int, device: str, dtype, side: int = SIDE):
    """(place, workload) one by one; what is verified is one image of it."""
    for place, window in (("windows", WINDOW), ("global", 0)):
        if operation == "relpos_attention":
            from benchmarks.relpos_attention import relpos_attention_workload

            sides = (window, window) if window else (side, side)
            made = [
                relpos_attention_workload(
                    ENCODERS[model], Windows(n, side, side, *sides), device, dtype
                )
                for n in dict.fromkeys((batch, 1))
            ]
            yield place, _only(operation, made)
            continue
        from benchmarks.blocks import block_workload

        for adapters in ADAPTERS:
            rank = 3 if adapters.startswith("Conv") else 4
            made = [
                block_workload(model, n, rank, window, adapters, device, dtype, side=side)
                for n in dict.fromkeys((batch, 1))
            ]
            yield place, _only(operation, made)


def _only(operation, made):
    """The providers that are compared here; the last one is verified for the first."""
    for workload in made:
        kept = [name for name in workload.providers if name in PEERS[operation]]
        workload.providers = {name: workload.providers[name] for name in kept}
        workload.stock = tuple(name for name in workload.stock if name in kept)
        if not workload.stock:
            raise ValueError(f"{workload.name} has no peer whose errors set its budget")
    return dataclasses.replace(made[0], verified=made[-1])


def host_ms(call, repeats: int = 5) -> float:
    """Least ms until the host is done with a call, whose kernels may still run."""
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def measured(operation, place, workload, settings, common, rates, outcomes):
    """Rows of a workload with their evidence, eager and as a graph, in groups as they are ready."""
    dtype = run.DTYPES[settings.dtype]
    wrong = verify(workload.verified or workload, dtype)
    print(f"\n{workload.name}", flush=True)
    test = evidence.green_test(outcomes, operation, place, settings.dtype)
    for mode in ("eager", "graph") if settings.device == "cuda" else ("eager",):
        rows = run.measure(workload, wrong, mode, settings, rates)
        for row in rows:
            name = row["provider"]
            row |= common | {"verified": verdict(workload, name, wrong)}
            row["test"] = test if name.startswith("samfast") else "none: not samfast"
            if mode == "eager" and "p50_ms" in row:
                row["host_ms"] = host_ms(lambda name=name: workload.run(name))
        yield rows
    for name, sentence in {**wrong, **workload.skipped}.items():
        print(f"  {name:20} no time: {sentence}")
        yield [{**common, "provider": name, "shape": workload.name, "note": sentence}]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="time blocks and attention of SAM in little time")
    add = parser.add_argument
    add("--op", choices=sorted(PEERS), default="block", help="what to time (block)")
    add(
        "--model",
        choices=sorted(ENCODERS),
        default="vit_b",
        help="model whose sizes to use (vit_b)",
    )
    add("--batches", type=int, nargs="+", default=[1, 4], help="images (1 4)")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="device (cuda)")
    add("--dtype", choices=sorted(run.DTYPES), default="bfloat16", help="(bfloat16)")
    add("--side", type=int, default=SIDE, help="tokens along a side of the map (64)")
    add("--repeats", type=int, default=9, help="repeats of each call (9)")
    add("--csv", type=Path, default=RESULTS, help="append rows to this file (build/quick.csv)")
    add("--smoke", type=Path, default=smoke.RESULTS, help="junit xml of the smoke tests")
    add("--goals", type=Path, metavar="CSV", help="only print what these rows say of the goals")
    options = parser.parse_args(arguments)
    if options.goals is not None:
        return goals(options.goals)
    missing = segment_anything_missing(options.op)
    if missing is None and options.device == "cuda":
        missing = smoke.no_gpu()
    if missing is not None:
        print(missing, file=sys.stderr)
        return 2
    dtype, outcomes = run.DTYPES[options.dtype], smoke.outcomes(options.smoke)
    settings = run.Settings(
        options.op, options.model, device=options.device, dtype=options.dtype,
        repeats=options.repeats,
    )  # fmt: skip
    rates = machine.rates(options.device, dtype)
    common = {
        "operation": options.op, "dtype": options.dtype, "machine": machine.name(options.device),
        "torch": torch.__version__, "triton": run._triton_version(),
        "samfast": samfast.__version__, "date": datetime.date.today().isoformat(),
        "commit": evidence.commit(), "triton_key": evidence.triton_key(),
    }  # fmt: skip
    timed = False
    for batch in options.batches:
        made = workloads(options.op, options.model, batch, options.device, dtype, options.side)
        for place, workload in made:
            for rows in measured(options.op, place, workload, settings, common, rates, outcomes):
                run.append(options.csv, evidence.admitted(rows), evidence.QUICK_COLUMNS)
                timed |= any(row["provider"].startswith("samfast") and "p50_ms" in row
                             for row in rows)  # fmt: skip
    return 0 if timed else 1


def goals(path: Path) -> int:
    """Print the goals' table, and what follows for whole steps from the blocks."""
    from benchmarks.goals import table

    if not path.is_file():
        print(f"{path} is not a file; run make bench-gpu QUICK=1 first", file=sys.stderr)
        return 2
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    single = ("P1 ", "P2 ", "P3 ", "P4 ")
    print("\n".join([line for line in table(rows) if line.startswith(single)] + steps(rows)))
    unverified = {row["shape"] for row in rows if row["test"] == evidence.UNVERIFIED}
    print(f"{len(unverified)} shapes without a green smoke test" if unverified else
          "every shape has a green smoke test")  # fmt: skip
    return 0


def steps(rows: list[dict]) -> list[str]:
    """P6, P7, P8 and P10 from the blocks with LoRA on all four layers; others as they are known."""
    found: dict[tuple, dict] = {}
    for row in rows:
        if row["operation"] == "block" and "LoRA on all" in row["shape"] and row["p50_ms"]:
            model, place = row["shape"].split()[0], "global" if ", global," in row["shape"] else ""
            batch = int(row["shape"].split(",")[2].strip().split("x")[0])
            found[model, batch, row["provider"], row["mode"], place] = row
    lines, rates = [], Rates(load(), "H100")  # the floor's rate is that of both
    for model, batch, who, mode in dict.fromkeys(key[:4] for key in found):
        parts = [found.get((model, batch, who, mode, place)) for place in ("", "global")]
        if None in parts:
            continue
        ms = by_depth(model, *(float(row["p50_ms"]) for row in parts))
        name = f"{model}, batch {batch}, {who}, {mode}: {ms:.2f} ms by its blocks"
        if who == OURS:
            least = floor(model, batch, rates)
            lines.append(f"P6   {name}, {ms / least:.2f} of the floor {least:.2f} ms")
            lines += [f"P8   {model}, batch {batch}: {_saved(parts, model):.2f} GB saved by its "
                      f"blocks"] if parts[0]["saved_mib"] and mode == "eager" else []  # fmt: skip
            other = [found.get((model, batch, "eager", mode, place)) for place in ("", "global")]
            if mode == "eager" and None not in other:
                host = _host(parts, model)
                ratio = host / _host(other, model)
                lines.append(
                    f"P10  {model}, batch {batch}: host {host:.2f} ms, {ratio:.2f} of eager"
                )
        else:
            lines.append(f"P7   {name} (not under torch.compile)")
    return [*lines, "P1b, P5 are not timed here; P9 is what the smoke tests repeat"]


def _saved(parts, model: str) -> float:
    return by_depth(model, *(float(row["saved_mib"]) for row in parts)) * 2**20 / 1e9


def _host(parts, model: str) -> float:
    missing = [row for row in parts if not row["host_ms"]]
    return math.nan if missing else by_depth(model, *(float(row["host_ms"]) for row in parts))


if __name__ == "__main__":
    raise SystemExit(main())
