# SPDX-License-Identifier: Apache-2.0
"""The first minutes on a GPU: two calls on a machine without a network.

python -m benchmarks.first_gpu call1              480 s: build, smoke tests, quick benchmarks
python -m benchmarks.first_gpu call2              300 s: what failed, backends, whole encoders
python -m benchmarks.first_gpu call1 --rehearse   every step that needs no GPU, smaller, on this CPU

A step that fails or hangs uses up only its own time. Its end is in the log before the next begins.
Results go to --out, by default $OUT. `make carry-gpu` fills .gpu, which travels with the tree.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import timed

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / ".gpu"
CACHE = "/tmp/samfast-triton"  # where a filled cache was made; its entries hold absolute paths
SITE = "/tmp/samfast-site"
KEPT = ("build/smoke.xml", "build/quick.csv")
SECONDS = {"call1": 480, "call2": 300}
MOST_BYTES = 15 * 2**20


@dataclasses.dataclass(frozen=True)
class Step:
    """A line for bash and the seconds that it may take.

    rehearsed: the line without a GPU; "" where there is none
    lacks: () -> why the step is left out, or None
    """

    name: str
    seconds: float
    command: str
    rehearsed: str = ""
    lacks: Callable[[], str | None] = lambda: None


def _carried(name: str, made_by: str) -> Callable[[], str | None]:
    return lambda: None if (CARRIED / name).exists() else f"no .gpu/{name}; {made_by} makes it"


WHEELS = (
    f"$PYTHON -m pip install -q --no-index --no-deps --upgrade --target {SITE} "
    "--find-links .gpu/wheels -r benchmarks/gpu_wheels.txt"
)
UNPACK = "$PYTHON -m benchmarks.offline --unpack .gpu/triton-cache.tar.xz"
KEY = "$PYTHON -c 'from benchmarks.evidence import *; print(commit(), triton_key())'"
ARCH = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
BUILD = f'TORCH_CUDA_ARCH_LIST=$($PYTHON -c "{ARCH}") $PYTHON setup.py -q build_ext --inplace'
SMALL = "--device cpu --dtype float32 --side 8 --batches 1 --repeats 1"
ENCODER = "$PYTHON -m benchmarks.run --op encoder --device cuda --dtype bfloat16 --batch 4"
PROFILE = (
    "ncu --clock-control none --set basic --launch-count 12 "
    "--kernel-name 'regex:dq_kernel|dkv_kernel|gelu_backward_kernel|norm_row_kernel' "
    "$PYTHON -m benchmarks.quick --op block --model vit_h --batches 1 --repeats 1 "
    "--csv /tmp/profiled.csv"
)
# Not `samfast info --check`: the command line needs a package that such a machine lacks.
CHECK = "$PYTHON -c 'from samfast.info import main; raise SystemExit(main(check=True))'"
SANITIZE = f"compute-sanitizer --tool memcheck --error-exitcode 9 {CHECK}"
# Every launch by CUDA's rules; values mean nothing there, so tests fail and broken rules count.
STOOD_IN = (
    "$PYTHON -m benchmarks.stand_in -- -m pytest -q --tb=no tests/gpu/test_smoke.py -m gpu_smoke "
    "-k 'not (within_a_program or missing_barrier)' | tail -4"
)
STEPS = {
    "call1": (
        Step("wheels", 20, WHEELS, WHEELS, _carried("wheels", "make carry-gpu")),
        Step("cache", 30, UNPACK, UNPACK,
             _carried("triton-cache.tar.xz", "benchmarks.offline --fill .gpu")),
        Step("key", 15, KEY, KEY),
        Step("build", 90, BUILD,
             "TORCH_CUDA_ARCH_LIST=9.0 $PYTHON setup.py -q build_ext "
             "--build-lib build/rehearsed"),
        Step("check", 40, CHECK, CHECK),
        Step("smoke", 150, "$PYTHON -m benchmarks.smoke --seconds 148",
             f"{{ [ ! -f benchmarks/stand_in.py ] || {STOOD_IN}; }} && "
             "$PYTHON -m pytest -q tests/gpu/test_smoke.py -k test_module "
             "--junit-now build/smoke.xml"),
        Step("quick", 100, "$PYTHON -m benchmarks.gpu --quick --minutes 1.6",
             f"$PYTHON -m benchmarks.quick --op relpos_attention {SMALL} && "
             f"$PYTHON -m benchmarks.quick --op block {SMALL} && "
             "$PYTHON -m benchmarks.quick --goals build/quick.csv"),
    ),
    "call2": (
        Step("wheels", 15, WHEELS, WHEELS, _carried("wheels", "make carry-gpu")),
        Step("cache", 20, UNPACK, UNPACK,
             _carried("triton-cache.tar.xz", "benchmarks.offline --fill .gpu")),
        Step("build", 60, BUILD),
        Step("failed", 40, "$PYTHON -m benchmarks.smoke --seconds 38 --failed .gpu/smoke.xml",
             lacks=_carried("smoke.xml", "the first call")),
        Step("cuda beside triton", 30, "$PYTHON -m benchmarks.native",
             "$PYTHON -m benchmarks.native --device cpu --small"),
        Step("encoder vit_h", 50, f"{ENCODER} --model vit_h --repeats 5 --csv $OUT/encoder.csv"),
        Step("encoder vit_b", 40, f"{ENCODER} --model vit_b --repeats 5 --csv $OUT/encoder.csv"),
        Step("profile", 40, f"{PROFILE} --side 64"),
        Step("memcheck", 90, SANITIZE),
    ),
}  # fmt: skip


def environment(out: Path) -> dict[str, str]:
    """Of every step: its Python, this tree and the carried wheels, and Triton's cache."""
    paths = [str(ROOT), SITE, os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", CACHE),
        "OUT": str(out),
    }


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def run(steps, seconds: float, out: Path, rehearse=False, slower=1.0) -> dict[str, str]:
    """Step -> how it ended. All take ``seconds`` at most; the log is ``out``/steps.log.

    slower: a factor for every limit, for a machine that is slower than the GPU's
    """
    out.mkdir(parents=True, exist_ok=True)
    settings, ends = environment(out), {}
    cache, limit = Path(settings["TRITON_CACHE_DIR"]), time.monotonic() + slower * seconds
    made_here: set[str] = set()
    for step in steps:
        command = step.rehearsed if rehearse else step.command
        left = min(slower * step.seconds, limit - time.monotonic())
        lacks = "it needs a GPU" if rehearse and not command else step.lacks()
        if lacks is not None or left < 1:
            ends[step.name] = f"left out: {lacks or 'no time left'}"
            _log(out, step, ends)
            continue
        print(f"\n=== {step.name}, {left:.0f} s at most", flush=True)
        before = entries(cache)
        line = f"set -o pipefail; ({command}) 2>&1 | tee -a '{out}/output.txt'"
        code, took = timed.run(line, left, ROOT, settings)
        end = "STOPPED" if code is None else "done" if code == 0 else f"FAILED with {code}"
        new = entries(cache) - before
        if step.name != "cache":
            made_here |= new
        ends[step.name] = f"{end}, {took:.1f} of {left:.0f} s, {len(new)} new cache entries"
        _log(out, step, ends)
        _keep(out)
    _pack(cache, made_here, out / "new-cache.tar.xz")
    return ends


def _log(out, step, ends):
    line = f"{step.name:20} {ends[step.name]}"
    print(line, flush=True)
    with (out / "steps.log").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _keep(out):
    """Results so far, under names of their own; a stop later loses none of them."""
    for path in map(ROOT.joinpath, KEPT):
        if path.is_file():
            shutil.copyfile(path, out / path.name)


def _pack(cache: Path, names: set[str], path: Path) -> None:
    """What was compiled here and not carried, to be carried next time."""
    if not names:
        return
    with tarfile.open(path, "w:xz", preset=1) as tar:
        for name in sorted(names):
            for file in sorted((cache / name).glob("*")):
                if file.suffix in (".cubin", ".json", ".so"):
                    tar.add(file, f"{name}/{file.name}")
    if path.stat().st_size > MOST_BYTES:
        print(f"{path} has {path.stat().st_size} bytes, above the {MOST_BYTES} that come back")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="the first minutes on a GPU")
    parser.add_argument("call", choices=sorted(STEPS))
    parser.add_argument(
        "--rehearse", action="store_true", help="run the steps that need no GPU, on this CPU"
    )
    parser.add_argument(
        "--slower", type=float, default=1.0, help="multiply all time limits by this (1)"
    )
    parser.add_argument(
        "--seconds", type=float, help="time limit for all steps (call1 480, call2 300)"
    )
    parser.add_argument("--out", type=Path, help="folder for results ($OUT, or a new folder)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps only")
    options = parser.parse_args(arguments)
    steps, names = STEPS[options.call], [step.name for step in STEPS[options.call]]
    if unknown := [name for name in options.only or () if name not in names]:
        parser.error(f"unknown step {unknown[0]!r}; expected one of {', '.join(names)}")
    out = options.out or Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="first-gpu-"))
    start = time.monotonic()
    ends = run(
        [step for step in steps if not options.only or step.name in options.only],
        options.seconds or SECONDS[options.call], out.resolve(), options.rehearse, options.slower,
    )  # fmt: skip
    print(f"\n=== {options.call}, {time.monotonic() - start:.0f} s; results in {out}")
    print("\n".join(f"{name:20} {end}" for name, end in ends.items()))
    return 1 if any(end.startswith(("FAILED", "STOPPED")) for end in ends.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
