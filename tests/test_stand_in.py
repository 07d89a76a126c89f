# SPDX-License-Identifier: Apache-2.0
"""The stand-in driver: launches under CUDA's rules, and a cache of Triton's that is carried.

Tests import kernels for the interpreter, so what launches runs in processes of their own.
"""

import json
import os
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
from offline_gate import ROOT

pytest.importorskip("triton", reason="triton is not installed")
from benchmarks import launch_rules, stand_in
from samfast.info import OPERATIONS

ONE = ("--launches", "tests.instruments.stand_in_launches")
PROGRAM = ROOT / "tests" / "instruments" / "stand_in_launches.py"


def run(*command, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with a cache of one operation in a file, and what the program printed."""
    folder = tmp_path_factory.mktemp("filled")
    code, text, errors = run(PROGRAM, folder, cache=folder / "cache")
    assert code == 0, text + errors
    return folder, text


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the program says without filling a cache, which would take as long again."""
    code, text, errors = run(PROGRAM, cache=tmp_path_factory.mktemp("told"))
    assert code == 0, text + errors
    return json.loads(text)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("name", [*OPERATIONS, "whole block"])
def test_launches_are_those_of_the_design(told, name):
    """As the stand-in records them, as the counters count them and as the costs design them."""
    made, designed = told["operations"][name], told["designed"]
    assert made["recorded"] == made["counted"]
    assert set(made["found"]) <= {"not compiled", "memory"} and made["recorded"]
    if name == "whole block":
        assert made["total"] == designed[name] == 30
        assert made["streams"] == [7]
    else:
        assert made["streams"] == [0]
        if name != "sam_block":  # its example adapts two layers of four; see the whole block
            assert sum(made["recorded"].values()) == designed[name]


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("empty", "expected 1 to 2147483647 programs along x, got the grid (0, 1, 1)"),
        ("high", "expected 1 to 65535 programs along y, got the grid (1, 65536, 1)"),
        ("crowded", "expected at most 1024 threads in a program, got 2048"),
        ("dtype", "x_ptr is torch.float16, but the code was made for *fp32"),
        ("odd", "but the code was made for multiples of 16"),
        ("odd number", "n is 63, but the code was made for multiples of 16"),
        ("constant", "BLOCK is 16, but the code was made for 32"),
    ],
)
def test_a_broken_rule_ends_in_a_sentence(told, name, sentence):
    assert sentence in told["broken"][name]
    assert told["broken"][name].startswith("planted_kernel: ")
    assert "right" not in told["broken"]


@pytest.mark.parametrize(
    ("arch", "shared", "device", "sentence"),
    [
        (90, 232_448, "cpu", None),
        (90, 232_449, "cpu", "expected at most 232448 bytes of shared memory on sm_90, got 232449"),
        (86, 150_000, "cpu", "expected at most 101376 bytes of shared memory on sm_86, got 150000"),
        (90, 0, "meta", "expected all tensors on one device, got cpu and meta"),
    ],
)
def test_shared_memory_and_devices(arch, shared, device, sentence):
    signature = {"x_ptr": "*fp32", "y_ptr": "*bf16"}
    source = SimpleNamespace(signature=signature, constants={}, attrs={})
    metadata = SimpleNamespace(num_warps=4, shared=shared)
    arguments = torch.empty(3), torch.empty(3, device=device, dtype=torch.bfloat16)
    assert launch_rules.problem(source, metadata, (1, 1, 1), arguments, arch) == sentence


@pytest.mark.slow_on_cpu
def test_nothing_stays_behind(told):
    assert told["before"] == told["after"]


@pytest.mark.slow
def test_another_process_finds_every_kernel(filled, tmp_path):
    """From the file, at the same place; the cache that filled it is gone."""
    folder, text = filled
    told = json.loads(text.splitlines()[-1])
    assert told["before"] == told["after"]
    assert "2 kernels: 0 hits, 2 compiles, 0 wrong" in text
    (folder / "cache").rename(tmp_path / "gone")
    archive = folder / "triton-cache.tar.xz"
    with tarfile.open(archive) as opened:
        kinds = {name.rpartition(".")[2] for name in opened.getnames()}
    assert kinds == {"cubin", "json", "so"}
    command = ("-m", "benchmarks.offline", "--unpack", archive, "--hits", *ONE)
    code, text, errors = run(*command, cache=folder / "cache")
    assert code == 0, text + errors
    assert "2 hits, 0 compiles, 0 C compiles" in text


@pytest.mark.slow
def test_a_cache_that_lacks_a_kernel_is_told(tmp_path):
    code, text, errors = run("-m", "benchmarks.offline", "--hits", *ONE, cache=tmp_path / "cache")
    assert code == 2 and "Traceback" not in errors, text + errors
    assert "for sm_90 is not in Triton's cache; fill one from this source" in errors


def test_interpreted_kernels_and_other_targets_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreted kernels launch nothing; unset it"):
        stand_in.standing_in().__enter__()
    with pytest.raises(ValueError, match=r"expected a target of \[80, .*\], got 75"):
        stand_in.standing_in(75).__enter__()


PROGRAM_FOR_A_GPU = """
import torch
from benchmarks.graph import captured
from samfast.modules import LoraLinear

x = torch.randn(2, 9, 64, device="cuda").to(torch.bfloat16).requires_grad_()
layer = LoraLinear(64, 192, 4, device=torch.device("cuda"), dtype=torch.bfloat16)

def step():
    torch.autograd.grad(layer(x).sum(), [x, layer.lora_A, layer.lora_B])

captured(step)()
raise SystemExit(3 if torch.cuda.get_device_capability() == (8, 6) else 4)
"""


@pytest.mark.slow
def test_a_program_for_a_gpu_is_recorded_and_filled(tmp_path):
    """Three runs on a stream and one in a capture; then the program finds all in the cache."""
    (tmp_path / "program.py").write_text(PROGRAM_FOR_A_GPU)
    cache, jobs = tmp_path / "cache", tmp_path / "jobs"
    options, program = (
        ("-m", "benchmarks.stand_in", "--arch", "86"),
        ("--", tmp_path / "program.py"),
    )
    code, text, errors = run(*options, "--record", jobs, *program, cache=cache)
    assert code == 0, text + errors
    assert "sm_86: 24 launches of 5 kernels in 6 forms; not compiled" in text
    assert "streams [1, 2]; the program ended with 3" in text
    fill = ("-m", "benchmarks.offline", "--fill", tmp_path, "--from-launches", jobs)
    code, text, errors = run(*fill, cache=cache)
    assert code == 0 and "6 kernels: 0 hits, 6 compiles, 0 wrong" in text, text + errors
    code, text, errors = run(*options, "--compile", *program, cache=cache)
    assert code == 0 and "6 hits, 0 compiles, 0 C compiles" in text, text + errors


@pytest.mark.slow
def test_another_process_finds_every_usual_kernel(tmp_path):
    """All that the quick registry launches, from the file; and it is small enough to carry."""
    cache = tmp_path / "cache"
    code, text, errors = run("-m", "benchmarks.offline", "--fill", tmp_path, cache=cache)
    assert code == 0 and " 0 wrong" in text, text + errors
    cache.rename(tmp_path / "gone")
    unpack = ("-m", "benchmarks.offline", "--unpack", tmp_path / "triton-cache.tar.xz", "--hits")
    code, text, errors = run(*unpack, cache=cache)
    assert code == 0 and " 0 compiles, 0 C compiles" in text, text + errors
