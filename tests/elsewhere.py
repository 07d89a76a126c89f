# SPDX-License-Identifier: Apache-2.0
"""Runs the value tests of every operation as other processors would: `make test-elsewhere`.

    python tests/elsewhere.py [row …]      all rows, or those of these numbers

Six rows hold 83 of the 106 pairs of settings (no six rows hold more than 88): the code that torch,
MKL, oneDNN and samfast choose, threads, and three draws of the numbers. A cell that this processor
cannot run is printed as "not run"; its row runs without it.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from samfast import backends

ROOT = Path(__file__).parents[1]
ORDER = ("default", "avx2", "avx512")
COLUMNS = ("ATEN", "MKL", "oneDNN", "samfast", "threads", "draw")
ROWS = (
    ("avx2", "AVX2", "AVX2", "avx2", 1, 0),
    ("default", "AVX2", "native", "avx2", 2, 1),
    ("native", "COMPATIBLE", "AVX2", "default", 1, 1),
    ("native", "native", "native", "default", 2, 0),
    ("default", "native", "AVX2", "avx512", 1, 2),
    ("avx2", "COMPATIBLE", "native", "avx512", 2, 2),
)
VARIABLES = {
    ("ATEN", "default"): ("ATEN_CPU_CAPABILITY", "default"),
    ("ATEN", "avx2"): ("ATEN_CPU_CAPABILITY", "avx2"),
    ("MKL", "AVX2"): ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
    ("MKL", "COMPATIBLE"): ("MKL_CBWR", "COMPATIBLE"),
    ("oneDNN", "AVX2"): ("ONEDNN_MAX_CPU_ISA", "AVX2"),
    **{("samfast", name): ("SAMFAST_CPU_CAPABILITY", name) for name in ORDER},
}
FILES = (
    *("values", "cpu", "native", "block", "fold", "gate", "factors", "factored", "conv_lora"),
    *("stages", "side", "golden", "triton"),
)
WORKERS = 2


def cannot(column: str, setting: str) -> bool:
    """Whether this processor, or this build, lacks what a setting asks for."""
    if setting == "native":
        return False
    if column == "samfast":
        has = backends.cpu_capability()
        return has is None or ORDER.index(setting) > ORDER.index(has)
    library = {"MKL": torch.backends.mkl, "oneDNN": torch.backends.mkldnn}.get(column)
    if library is not None and not library.is_available():
        return True
    has = torch.backends.cpu.get_cpu_capability()
    return setting.upper() == "AVX2" and has not in ("AVX2", "AVX512")


def run(number: int, row: tuple) -> tuple[list[str], bool]:
    """The row's cells and verdict, and whether all passed."""
    environment, cells = dict(os.environ), []
    for column, setting in zip(COLUMNS[:4], row[:4], strict=True):
        missing = cannot(column, setting)
        cells.append(f"{setting}: not run" if missing else setting)
        if not missing and setting != "native":
            name, value = VARIABLES[column, setting]
            environment[name] = value
    *_, threads, draw = row
    files = sorted(str(f) for f in (ROOT / "tests/kernels").glob("*/test_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(WORKERS), "--dist", "loadfile"]
    command += ["-m", "not (slow or slow_on_cpu)", "--draws", f"{draw}:{draw + 1}"]
    command += ["--threads", str(threads)]
    command += [f for f in files if Path(f).stem.removeprefix("test_") in FILES]
    started = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - started
    failures = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
    print("\n".join([f"row {number}:", *failures]) if failures else "", end="\n" * bool(failures))
    if done.returncode and not failures:
        print(done.stdout[-3000:], done.stderr[-3000:])
    *_, last = done.stdout.strip().splitlines() or ["no output"]
    return [*cells, str(threads), str(draw), last.strip("= "), f"{seconds:.0f} s"], not (
        done.returncode
    )


def main(wanted: list[int]) -> int:
    given = sorted({name for name, _ in VARIABLES.values()} & os.environ.keys())
    if given:
        print(f"{', '.join(given)} is set; unset it: the rows set their own")
        return 2
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}", flush=True)
    table, green = [], True
    for number, row in enumerate(ROWS, 1):
        if wanted and number not in wanted:
            continue
        cells, passed = run(number, row)
        green &= passed
        table.append(cells)
        print(f"{number}: {' | '.join(cells)}", flush=True)
    print(f"\n| {' | '.join(COLUMNS)} | result | time |\n|{'---|' * (len(COLUMNS) + 2)}")
    for cells in table:
        print(f"| {' | '.join(cells)} |")
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main([int(number) for number in sys.argv[1:]]))
