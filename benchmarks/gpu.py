# SPDX-License-Identifier: Apache-2.0
"""All benchmarks of a GPU, one process each, the goals' table last.

python -m benchmarks.gpu

A process that fails, or hangs for a third of the time, costs its own rows and no others. What
does not fit into the time is left out, and said: first come whole steps and blocks, last the peers
under torch.compile.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import goals, machine

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


def run(jobs, common, seconds: float) -> dict[str, str]:
    """Job -> how it ended, ``done`` or a sentence; all together take ``seconds`` at most."""
    ends, limit = {}, time.monotonic() + seconds
    for job in jobs:
        left = min(limit - time.monotonic(), seconds / 3)
        if left < 1:
            ends[job] = "not run: no time left"
            continue
        command = [sys.executable, "-m", "benchmarks.run", "--op", *job.split(), *common]
        print(f"\n=== {job}", flush=True)
        start = time.monotonic()
        try:
            code = subprocess.run(command, timeout=left).returncode
            ends[job] = "done" if code == 0 else f"FAILED: exit status {code}"
        except subprocess.TimeoutExpired:
            ends[job] = "STOPPED: no time left; its earlier rows are kept"
        ends[job] += f" ({time.monotonic() - start:.0f} s)"
    return ends


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="run every benchmark on this GPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (9)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA device, and torch sees none")
    ends = run(JOBS, COMMON, 60 * options.minutes)
    results = Path(__file__).with_name("results") / f"{machine.slug('cuda')}.csv"
    print("\n=== how the benchmarks ended")
    print("\n".join(f"{job:50} {end}" for job, end in ends.items()))
    print(f"\n=== goals, by {results.name}")
    if results.is_file():
        goals.main([str(results)])
    return 1 if any(end.startswith(("FAILED", "STOPPED")) for end in ends.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
