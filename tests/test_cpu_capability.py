# SPDX-License-Identifier: Apache-2.0
"""SAMFAST_CPU_CAPABILITY: which of the extension's code runs, and that each kind is right."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from samfast import backends, info
from samfast.kernels import operations

ROOT = Path(__file__).parents[1]
NATIVE = operations("cpu_path.py")
NAMES = ("default", "avx2", "avx512")  # each runs wherever a later one does

pytestmark = pytest.mark.skipif(
    backends.cpu_capability() is None, reason="the native extension is not there"
)


CHECK = """
from samfast import info
info.OPERATIONS = {operations}
raise SystemExit(info.main(check=True, json=True))
"""


def run_with(capability, *arguments):
    # Interpreted kernels take long and are not what is asked about.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["SAMFAST_CPU_CAPABILITY"] = capability
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("best", NAMES)
@pytest.mark.parametrize("asked", [*NAMES, "sse2", "AVX2", ""])
def test_a_choice_runs_or_is_refused(asked, best):
    runs = NAMES[: NAMES.index(best) + 1]
    if asked in runs:
        assert torch.ops.samfast_native.choose_cpu_capability(asked, best) == asked
        return
    with pytest.raises(RuntimeError) as refusal:
        torch.ops.samfast_native.choose_cpu_capability(asked, best)
    assert str(refusal.value) == (
        f"SAMFAST_CPU_CAPABILITY is '{asked}', expected one of default, avx2, avx512; "
        f"this processor and this build run {', '.join(runs)}"
    )


def test_info_names_the_code(capsys):
    expected = {"default": "plain", "avx2": "AVX2", "avx512": "AVX-512"}[backends.cpu_capability()]
    info.main()
    printed = capsys.readouterr().out
    choices = "SAMFAST_CPU_CAPABILITY=default|avx2|avx512 chooses"
    assert f"native extension: loaded, {expected} code ({choices})\n" in printed


@pytest.mark.slow_on_cpu
def test_an_unknown_value_is_one_sentence():
    done = run_with("sse2", "-m", "samfast", "info")
    assert done.returncode == 2
    assert done.stdout == ""
    start = "samfast: SAMFAST_CPU_CAPABILITY is 'sse2', expected one of default, avx2, avx512; "
    assert done.stderr.startswith(start) and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["default", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)
def test_each_kind_of_code_is_right(name):
    done = run_with(name, "-c", CHECK.format(operations=NATIVE))
    if f"is '{name}', expected one of" in done.stderr:
        pytest.skip(done.stderr.strip())
    record = json.loads(done.stdout)
    assert record["cpu_capability"] == name
    ran = [r for r in record["check"] if r["backend"] == "cpu" and r["skipped"] is None]
    assert {r["operation"] for r in ran} == set(NATIVE)
    assert [r for r in ran if r["error"]] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
def test_no_instruction_is_beyond_its_processor():
    """Plain code and all that is shared use no AVX, and AVX2 code no register of AVX-512."""
    (library,) = (ROOT / "samfast").glob("_C*.so")
    command = ["objdump", "-dC", "--no-show-raw-insn", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "file format elf64-x86-64" not in listing or "::avx512(" not in listing:
        pytest.skip("this build has plain code only")
    functions = {}
    for name, code in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE):
        kind = re.search(r"EachProcessor<.*::(plain|avx2|avx512)\(", name)
        functions.setdefault(kind.group(1) if kind else "shared", []).append((name, code))
    avx, avx512 = r"\tv[a-z]|%[yz]mm", r"%zmm|%k[0-7]|mm(1[6-9]|2\d|3[01])\b|\{1to"
    beyond = {"shared": avx, "plain": avx, "avx2": avx512}
    for kind, pattern in beyond.items():
        assert [name for name, code in functions[kind] if re.search(pattern, code)] == []
    for kind, register in (("avx2", "%ymm"), ("avx512", "%zmm")):
        assert len(functions[kind]) == len(functions["plain"])
        assert any(register in code for _, code in functions[kind])
    # What a hot function calls would be shared, and slow.
    hot = [f for kind in ("plain", "avx2", "avx512") for f in functions[kind]]
    assert [name for name, code in hot if "\tcall " in code] == []
