# SPDX-License-Identifier: Apache-2.0
"""Time an operation against its peers, side by side in one process.

python -m benchmarks.run --op lora_linear
python -m benchmarks.run --op encoder        steps of the whole image encoder
python -m benchmarks.run --op saved_bytes    what the encoder's forward keeps, counted; --record
                                             writes benchmarks/results/saved_bytes.csv
python -m benchmarks.run --op offline        every Triton kernel compiled for every target
"""

import contextlib
import csv
import datetime
import functools
import importlib.metadata
import itertools
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import samfast
from benchmarks import machine
from benchmarks.graph import captured
from benchmarks.operations import OPERATIONS, segment_anything_missing
from benchmarks.options import parsed
from benchmarks.registry import Workload
from benchmarks.shapes import ENCODERS
from benchmarks.verify import REFUSALS, refusal, verify
from samfast.counters import saved_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = (
    "operation provider mode shape dtype p20_ms p50_ms p80_ms ratio predicted_ms peak_mib "
    "resident_mib saved_mib gb_s tflop_s note machine torch triton samfast date"
).split()


@dataclass
class Settings:
    """Medians over interleaved repeats after one warm-up; ratios are to the baseline."""

    op: Literal[(*OPERATIONS, "saved_bytes", "offline")] = "lora_linear"
    model: Literal[tuple(ENCODERS)] = "vit_b"
    batch: int = 1
    image_size: int = field(
        default=1024, metadata={"help": "side of the images of block and encoder"}
    )
    rank: int | None = field(
        default=None, metadata={"help": "rank of the adapters; None: 4, conv_lora 3, task_core 32"}
    )
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal[tuple(DTYPES)] = "float32"
    repeats: int = 9
    compiled: bool = field(
        default=False, metadata={"help": "also time the peers under torch.compile"}
    )
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 keeps torch's choice"})
    csv: Path | None = field(default=None, metadata={"help": "append the rows to this file"})
    record: bool = field(
        default=False, metadata={"help": "append the rows to benchmarks/results/<machine>.csv"}
    )


def main(settings: Settings) -> int:
    if settings.op == "offline":
        from benchmarks import offline

        return offline.main([]) or (offline.main(["--cuda"]) if shutil.which("nvcc") else 0)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if (missing := segment_anything_missing(settings.op)) is not None:
        print(missing, file=sys.stderr)
        return 2
    if settings.op == "saved_bytes":
        from benchmarks import saved

        return saved.main(settings.record)
    device, dtype = settings.device, DTYPES[settings.dtype]
    rates = machine.rates(device, dtype)
    print(f"{machine.name(device)}, torch {torch.__version__}, {settings.dtype}, fwd + bwd")
    print(f"measured here: {rates[0] / 1e12:.2f} TFLOP/s in products, {rates[1] / 1e9:.1f} GB/s")
    make = OPERATIONS[settings.op]
    files = [settings.csv] if settings.csv else []
    if settings.record:
        files.append(Path(__file__).with_name("results") / f"{machine.slug(device)}.csv")
    common = {
        "operation": settings.op,
        "dtype": settings.dtype,
        "machine": machine.name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "samfast": samfast.__version__,
        "date": datetime.date.today().isoformat(),
    }
    failed = False
    rank = settings.rank or {"conv_lora": 3, "task_core": 32}.get(settings.op, 4)
    sized = settings.op in ("block", "encoder")
    options = {"image_size": settings.image_size} if sized else {}
    workloads = make(
        settings.model, settings.batch, rank, device, dtype, settings.compiled, **options
    )
    for workload in workloads:
        wrong = verify(workload.verified or workload, dtype)
        print(f"\n{workload.name}")
        rows = []
        for mode in ("eager", "graph") if device == "cuda" else ("eager",):
            rows += measure(workload, wrong, mode, settings, rates)
        for name, sentence in {**wrong, **workload.skipped}.items():
            print(f"  {name:20} no time: {sentence}")
            rows.append({"provider": name, "shape": workload.name, "note": sentence})
        for file in files:
            append(file, [{**common, **row} for row in rows])
        untimed = (row["provider"] for row in rows if "p50_ms" not in row)
        failed |= any(name.startswith("samfast") for name in untimed)
    return 1 if failed else 0


def measure(workload: Workload, wrong, mode, settings, rates) -> list[dict]:
    """Time every right provider of a workload and print its rows."""
    device = settings.device
    alone = mode == "graph" and workload.images > 0  # graphs of whole encoders, one at a time
    names = [name for name in workload.providers if name not in wrong]
    times, rows = {}, []
    for group in [[name] for name in names] if alone else [names]:
        calls = {}
        for name in group:
            try:
                calls[name] = prepared(workload, name, mode)
                calls[name]()
            except REFUSALS as error:
                calls.pop(name, None)
                print(f"  {name:20} {mode:5} no time: {refusal(error)}")
                row = {"provider": name, "mode": mode, "shape": workload.name}
                rows.append(row | {"note": refusal(error)})
                if device == "cuda":
                    with contextlib.suppress(*REFUSALS):  # as after a capture that broke off
                        torch.cuda.empty_cache()
        times |= interleaved(calls, settings.repeats, device)
    base = quantile(times[workload.baseline], 0.5) if workload.baseline in times else math.nan
    for name in times:
        provider, (p20, p50, p80) = (
            workload.providers[name],
            (quantile(times[name], q) for q in (0.2, 0.5, 0.8)),
        )
        row = {"provider": name, "mode": mode, "shape": workload.name}
        row |= {"p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3, "ratio": p50 / base}
        row |= memory(workload, name, device)
        if provider.stages:
            row["predicted_ms"] = machine.predict(provider.stages, device, *rates) * 1e3
            row["gb_s"] = sum(s.bytes for s in provider.stages) / p50 / 1e9
            row["tflop_s"] = sum(s.flops for s in provider.stages) / p50 / 1e12
        predicted = f"  predicted {row['predicted_ms']:.2f}" if provider.stages else ""
        print(
            f"  {name:20} {mode:5} {p50 * 1e3:9.3f} ms  [{p20 * 1e3:.3f}, {p80 * 1e3:.3f}]"
            f"  ratio {p50 / base:5.2f}  saved {row.get('saved_mib', math.nan):7.2f} MiB beside x, "
            f"peak {row.get('peak_mib', math.nan):7.1f} MiB{predicted}"
        )
        if workload.images and "peak_mib" in row:
            whole = (row["peak_mib"] + row["resident_mib"]) / 2**10
            note = f"{workload.images / p50:.3g} images/s; peak with weights {whole:.2f} GiB"
            row["note"] = "; ".join([note, row["note"]] if "note" in row else [note])
        if "note" in row:
            print(f"  {'':20} {row['note']}")
        rows.append(row)
    return rows


def memory(workload: Workload, name: str, device: str) -> dict:
    """What a provider takes, or a note: compiled code may refuse to be looked into."""
    found, missing = {"resident_mib": resident(workload) / 2**20}, []
    measures = {
        "saved_mib": lambda: (
            saved_bytes(workload.providers[name].forward, workload.known).hooks / 2**20
        ),
        "peak_mib": lambda: peak(lambda: workload.run(name), device),
    }
    for what, measured in measures.items():
        try:
            found[what] = measured()
        except REFUSALS as error:
            missing.append(f"no {what}: {refusal(error)}")
    if workload.logits and "peak_mib" in found:
        missing.append(working_memory(workload, name, found["peak_mib"]))
    return found | ({"note": "; ".join(missing)} if missing else {})


def prepared(workload: Workload, name: str, mode: str):
    """What is timed: the call, or its graph's replay."""
    call = functools.partial(workload.run, name)
    if mode == "eager":
        return call
    if not workload.providers[name].captured:
        raise NotImplementedError("waits for the host, which no graph can")
    return captured(call)


def resident(workload: Workload) -> int:
    """Bytes of what is there before a call: inputs and parameters, each storage once."""
    storages = [t.untyped_storage() for t in [*workload.known, workload.dy]]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def working_memory(workload: Workload, name: str, peak_mib: float) -> str:
    """The peak less what a provider must give back, and how that compares with all logits."""
    made = workload.dy.nbytes + sum(t.nbytes for t in workload.providers[name].leaves)
    working, logits = peak_mib - made / 2**20, workload.logits / 2**20
    return f"working memory {working:.1f} MiB, {working / logits:.4f} of the logits"


def interleaved(calls, repeats, device):
    """Seconds of every call, taken in turn so that a slow moment hits all of them."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            if device == "cuda":
                seconds = _cuda_seconds(call)
            else:
                start = time.perf_counter()
                call()
                seconds = time.perf_counter() - start
            if turn:
                times[name].append(seconds)
    return times


def peak(call, device):
    """MiB that tensors take at most during a call beyond what was there."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    cpu = torch.profiler.ProfilerActivity.CPU
    with _no_stderr(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate((size for _, size in sorted(memory)), initial=0)) / 2**20


@contextlib.contextmanager
def _no_stderr():
    """The profiler writes its comings and goings there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def quantile(samples, q):
    ordered = sorted(samples)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def append(path: Path, rows: list[dict], columns=COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    if not new and (
        header := path.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    ) != ",".join(columns):
        raise ValueError(f"{path} has the columns {header}, not {','.join(columns)}; move it away")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if new:
            writer.writeheader()
        for row in rows:
            short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(short)


def _cuda_seconds(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _triton_version():
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    raise SystemExit(main(parsed(Settings)))
