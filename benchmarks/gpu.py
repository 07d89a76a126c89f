# SPDX-License-Identifier: Apache-2.0
"""All benchmarks of a GPU, one process each, the goals' table last.

python -m benchmarks.gpu
python -m benchmarks.gpu --quick       attention and blocks of ViT-H and ViT-B, in 100 s

A process that fails, or hangs for a third of the time, costs its own rows and no others. What
does not fit into the time is left out, and said: first come whole steps and blocks, last the peers
under torch.compile.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks import goals, machine, quick, timed

COMMON = "--device cuda --dtype bfloat16 --batch 4 --record".split()
STEPS = "--repeats 9 --model"
JOBS = (
    f"encoder {STEPS} vit_h",
    "block --repeats 30 --model vit_h",
    *(f"{operation} --repeats 50 --model vit_h" for operation in (
        "relpos_attention", "lora_linear", "conv_lora", "hypercomplex", "task_core", "cobot",
        "adapt_former",
    )),
    f"encoder {STEPS} vit_b",
    f"encoder {STEPS} vit_l",
    *(f"{operation} --repeats 30 --model vit_h --compiled" for operation in (
        "lora_linear", "relpos_attention", "block",
    )),
    f"encoder {STEPS} vit_h --compiled",
)  # fmt: skip

QUICK_JOBS = tuple(
    f"{operation} --model {model}"
    for model in ("vit_h", "vit_b") for operation in ("block", "relpos_attention")
)  # fmt: skip


def run(jobs, common, seconds: float, program: str = "benchmarks.run") -> dict[str, str]:
    """Job -> how it ended, ``done`` or a sentence; all together take ``seconds`` at most."""
    ends, limit = {}, time.monotonic() + seconds
    for job in jobs:
        left = min(limit - time.monotonic(), seconds / 3)
        if left < 1:
            ends[job] = "not run: no time left"
            continue
        command = [sys.executable, "-m", program, "--op", *job.split(), *common]
        print(f"\n=== {job}", flush=True)
        code, took = timed.run(command, left)
        ends[job] = "done" if code == 0 else f"FAILED: exit status {code}"
        if code is None:
            ends[job] = "STOPPED: no time left; its earlier rows are kept"
        ends[job] += f" ({took:.0f} s)"
    return ends


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="run every benchmark on this GPU")
    parser.add_argument(
        "--minutes", type=float, help="time limit for all benchmarks (9; with --quick 1.67)"
    )
    parser.add_argument("--quick", action="store_true", help="run only attention and blocks")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA device, and torch sees none")
    if options.quick:
        quick.RESULTS.unlink(missing_ok=True)
        ends = run(QUICK_JOBS, [], 60 * (options.minutes or 100 / 60), "benchmarks.quick")
        print("\n=== how the benchmarks ended")
        print("\n".join(f"{job:50} {end}" for job, end in ends.items()))
        print(f"\n=== goals, by {quick.RESULTS}")
        quick.goals(quick.RESULTS)
        return _code(ends)
    ends = run(JOBS, COMMON, 60 * (options.minutes or 9))
    results = Path(__file__).with_name("results") / f"{machine.slug('cuda')}.csv"
    print("\n=== how the benchmarks ended")
    print("\n".join(f"{job:50} {end}" for job, end in ends.items()))
    print(f"\n=== goals, by {results.name}")
    if results.is_file():
        goals.main([str(results)])
    return _code(ends)


def _code(ends: dict[str, str]) -> int:
    return 1 if any(end.startswith(("FAILED", "STOPPED")) for end in ends.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
