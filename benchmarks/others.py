# SPDX-License-Identifier: Apache-2.0
"""Encoders with PEFT's LoRA, each as it is and fused: time of one step, and bytes it keeps.

ViT-B, float32, batch 1, LoRA r 4 on qkv, proj, lin1 and lin2, forward and backward. A round runs
every encoder once, in an order that turns; the ratio is the median of the rounds' ratios. Bytes
are what a forward keeps for its backward, counted.
"""

import argparse
import statistics
import time
import warnings

import torch
from torch import Tensor, nn

import samfast
from benchmarks.peers import sharing
from samfast.counters import saved_bytes
from samfast.integrations import check
from samfast.integrations.torchvision import declare_missing_schemas

WITH_PEFT = "PEFT on segment_anything", "PEFT on transformers, sdpa"


def encoders(side: int) -> dict[str, tuple[nn.Module, nn.Module]]:
    """By the library's name: the encoder as it is, and fused; the same Parameters."""
    made, size = {}, check.VIT_B._replace(image=side)
    for library in check.LIBRARIES:
        if library.name in WITH_PEFT and not library.missing():
            torch.manual_seed(0)
            stock = library.make(size).train()
            made[library.name] = stock, samfast.fuse(sharing(stock))
    return made


def step(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Seconds of one forward and backward, by the clock and of all threads."""
    start, cpu = time.perf_counter(), time.process_time()
    y = check.output(model, x)[0]
    y.sum().backward()
    times = time.perf_counter() - start, time.process_time() - cpu
    for parameter in model.parameters():
        parameter.grad = None
    return times


def kept(model: nn.Module, x: Tensor) -> int:
    known = [x, *model.parameters(), *model.buffers()]
    return saved_bytes(lambda: check.output(model, x), known).hooks


def measure(side: int, rounds: int) -> None:
    pairs = encoders(side)
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    runs = {(name, i): model for name, pair in pairs.items() for i, model in enumerate(pair)}
    for model in runs.values():
        step(model, x)
    seconds = {key: [] for key in runs}
    order = list(runs)
    for n in range(rounds):
        for key in order[n % len(order) :] + order[: n % len(order)]:
            seconds[key].append(step(runs[key], x))
    print(f"{side} x {side}, {rounds} rounds")
    for name, pair in pairs.items():
        clock, cpu = (_ratio(seconds[name, 0], seconds[name, 1], i) for i in range(2))
        before, after = (kept(model, x) / 2**20 for model in pair)
        stock, fused = (statistics.median(t[0] for t in seconds[name, j]) for j in (0, 1))
        print(
            f"  {name:28} {stock:7.2f} s -> {fused:7.2f} s  ratio {clock:.3f} (of all threads "
            f"{cpu:.3f})  kept {before:7.1f} -> {after:7.1f} MiB ({after / before:.3f})",
            flush=True,
        )


def _ratio(stock: list[tuple], fused: list[tuple], which: int) -> float:
    return statistics.median(b[which] / a[which] for a, b in zip(stock, fused, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.others", description=__doc__)
    parser.add_argument(
        "--size", type=int, nargs="+", default=[512], help="sides of the images [512]"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    declare_missing_schemas()
    warnings.simplefilter("ignore")
    for side in options.size:
        measure(side, options.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
