# SPDX-License-Identifier: Apache-2.0
"""Evidence for a row of GPU results: the commit, the compiler, its green test, its verdict."""

import hashlib
import importlib.metadata
import os
import subprocess
from pathlib import Path

from benchmarks.run import COLUMNS
from benchmarks.verify import OTHER, WITHIN

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / ".gpu" / "commit"  # of a tree that travels without its history
UNVERIFIED = "unverified"
EVIDENCE = ("commit", "triton_key", "test", "verified")
QUICK_COLUMNS = (*COLUMNS, "host_ms", *EVIDENCE)
# Benchmark and place -> the smoke tests that answer for it, by operation and way.
TESTS = {
    ("relpos_attention", "global"): "relpos_attention-sam-map",
    ("relpos_attention", "windows"): "relpos_attention-windows",
    ("block", "global"): "sam_block-global",
    ("block", "windows"): "sam_block-windows",
}


def commit() -> str:
    """Of this tree: by SAMFAST_COMMIT, git, or the file that `make carry-gpu` writes."""
    if given := os.environ.get("SAMFAST_COMMIT"):
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        done = None
    if done is not None and done.returncode == 0:
        return done.stdout.strip()
    return CARRIED.read_text(encoding="utf-8").strip() if CARRIED.is_file() else "unknown"


def triton_key() -> str:
    """Triton's version and a digest of its key, which every entry of its cache depends on."""
    try:
        from triton.runtime.cache import triton_key as key
    except ImportError as error:
        return f"unknown: {error}"
    whole = key()  # the version, and digests of Triton's files
    version = importlib.metadata.version("triton")
    return f"{version}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"


def green_test(outcomes: dict[str, str], operation: str, place: str, dtype: str) -> str:
    """The id of the passed smoke test that answers for a row, or "unverified".

    outcomes: of benchmarks.smoke.outcomes   place: "windows" or "global"
    """
    prefix = TESTS.get((operation, place))
    wanted = f"::test_values[{prefix}-triton-{dtype}]"
    passed = [node for node, end in outcomes.items() if node.endswith(wanted) and end == "passed"]
    return passed[0] if prefix and passed else UNVERIFIED


def problem(row: dict) -> str | None:
    """None for a row that may be kept, or the sentence that says what it lacks.

    A row with a time needs all of its evidence and a verdict; one without a time needs a note.
    """
    who = f"{row.get('operation')} {row.get('shape')}, {row.get('provider')}"
    if not row.get("p50_ms"):
        return None if row.get("note") else f"{who} has neither a time nor a note"
    missing = [name for name in EVIDENCE if not row.get(name)]
    if missing:
        return f"{who} has a time without {', '.join(missing)}"
    if row["verified"] not in (WITHIN, OTHER):
        return f"{who} has the verdict {row['verified']!r}; expected {WITHIN!r} or {OTHER!r}"
    return None


def admitted(rows: list[dict]) -> list[dict]:
    """The rows, of which each may be kept; ValueError with a sentence for the first that may not.

    Nothing is timed before it was verified, so such a row is a mistake of the program.
    """
    for row in rows:
        if (sentence := problem(row)) is not None:
            raise ValueError(f"{sentence}; verify it first")
    return rows
