# SPDX-License-Identifier: Apache-2.0
"""Time an operation against its peers, side by side in one process.

python -m benchmarks.run --op lora_linear
"""

import csv
import datetime
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import samfast
from benchmarks.registry import OPERATIONS
from benchmarks.shapes import ENCODERS
from benchmarks.verify import problems

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Settings:
    """Times are medians over interleaved repeats after one warm-up; ratios are to the baseline."""

    op: Literal[tuple(OPERATIONS)] = "lora_linear"
    model: Literal[tuple(ENCODERS)] = "vit_b"
    batch: int = 1
    rank: int = 4
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal[tuple(DTYPES)] = "float32"
    repeats: int = 9
    threads: int = 0
    """CPU threads; 0 keeps torch's choice."""
    csv: Path | None = None
    """Append the rows to this file."""


def main(settings: Settings) -> int:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dtype, device = DTYPES[settings.dtype], settings.device
    print(f"{machine(device)}, torch {torch.__version__}, {settings.dtype}, forward and backward")
    workloads = OPERATIONS[settings.op](
        settings.model, settings.batch, settings.rank, device, dtype
    )
    rows, failed = [], False
    for workload in workloads:
        wrong = problems(workload, dtype)
        failed |= bool(wrong)
        calls = {name: call for name, call in workload.providers.items() if name not in wrong}
        times = interleaved(calls, settings.repeats, device)
        base = statistics.median(times[workload.baseline])
        print(f"\n{workload.name}  ({workload.flops / 1e9:.1f} GFLOP in the frozen layer)")
        for name, samples in times.items():
            p20, p50, p80 = (_quantile(samples, q) for q in (0.2, 0.5, 0.8))
            print(
                f"  {name:15} {p50 * 1e3:8.2f} ms  [{p20 * 1e3:.2f}, {p80 * 1e3:.2f}]"
                f"  ratio {p50 / base:5.2f}"
            )
            rows.append([settings.op, name, "fwd+bwd", workload.name, settings.dtype])
            rows[-1] += [f"{t * 1e3:.4f}" for t in (p20, p50, p80)] + [f"{p50 / base:.3f}"]
        for name, sentence in {**wrong, **workload.skipped}.items():
            print(f"  {name:15} no time: {sentence}")
    if settings.csv is not None:
        append(settings.csv, rows, device)
    return 1 if failed else 0


def interleaved(calls, repeats, device):
    """Seconds of every call, taken in turn so that a slow moment hits all of them."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = _now(device)
            call()
            if turn:
                times[name].append(_now(device) - start)
    return times


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [row for row in info.read_text().splitlines() if row.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def append(path: Path, rows, device) -> None:
    head = ["operation", "provider", "mode", "shape", "dtype", "p20_ms", "p50_ms", "p80_ms"]
    head += ["ratio", "machine", "torch", "samfast", "date"]
    tail = [machine(device), torch.__version__, samfast.__version__]
    tail.append(datetime.date.today().isoformat())
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(head)
        writer.writerows([*row, *tail] for row in rows)


def _now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _quantile(samples, q):
    ordered = sorted(samples)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Settings)))
