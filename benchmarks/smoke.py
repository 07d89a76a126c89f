# SPDX-License-Identifier: Apache-2.0
"""The first tests for a GPU, and what they left: results as junit xml that is whole at any time.

python -m benchmarks.smoke             run them, 150 s at most
python -m benchmarks.smoke --look      only say whether there is a GPU
"""

import argparse
import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import timed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "smoke.xml"
TESTS = "tests/gpu/test_smoke.py"
PROCESSES = 8  # beside one GPU; most of a first run is compiling


def no_gpu() -> str | None:
    """None where torch sees a CUDA device, or the sentence that says what is missing."""
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed for {sys.executable}; set PYTHON= to one that has it"
    import torch

    if torch.cuda.is_available():
        return None
    return f"this needs a CUDA device, and torch {torch.__version__} sees none; run it on a GPU"


def outcomes(path: Path) -> dict[str, str]:
    """Test's id -> passed, failed or skipped, by junit xml; nothing where there is no such file."""
    if not path.is_file():
        return {}
    words = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    found = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        ends = [words[child.tag] for child in case if child.tag in words]
        node = f"{case.attrib['classname']}::{case.attrib['name']}"
        found[node] = ends[0] if ends else "passed"
    return found


def run(results: Path, seconds: float, tests=(TESTS,)) -> int:
    """Run the tests and print what became of them; 0 where all passed in time."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu_smoke", *tests]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(PROCESSES), "--dist", "worksteal"]
    results.unlink(missing_ok=True)
    command += ["--junit-now", str(results.resolve())]
    code, took = timed.run(command, seconds, ROOT)
    end = f"STOPPED after {took:.0f} s" if code is None else f"ended with {code}, {took:.0f} s"
    ends = list(outcomes(results).values())
    counts = ", ".join(f"{ends.count(word)} {word}" for word in ("passed", "failed", "skipped"))
    print(f"smoke tests {end}: {counts}; {results}")
    return 1 if code is None else code


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="run the first tests for a GPU")
    parser.add_argument("--look", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--seconds", type=float, default=150, help="time limit for all tests (150)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="junit xml (build/smoke.xml)")
    parser.add_argument(
        "--failed", type=Path, metavar="XML", help="run only the tests that failed there"
    )
    options = parser.parse_args(arguments)
    tests = [TESTS]
    if options.failed is not None:
        tests = [node for node, end in outcomes(options.failed).items() if end == "failed"]
        if not tests:
            print(f"{options.failed} has no failed test; nothing to run")
            return 0
    if (missing := no_gpu()) is not None:
        print(missing, file=sys.stderr)
        return 2
    return 0 if options.look else run(options.results, options.seconds, tests)


if __name__ == "__main__":
    raise SystemExit(main())
