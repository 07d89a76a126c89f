# SPDX-License-Identifier: Apache-2.0
"""The offline gate reports what it must: spills and float atomics, in Triton and in CUDA."""

import os
import shutil
import subprocess
import sys

import pytest
from offline_gate import ROOT, gate

CUDA = """
__global__ void clean(const float* x, float* y) { y[threadIdx.x] = 2 * x[threadIdx.x]; }
__global__ void adds(float* y) { atomicAdd(y, 1.0f); }
__global__ void spills(const float* x, float* y, int n) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = x[i * n];
  for (int i = 0; i < n; ++i) y[i] = kept[(i * 7) % 64];  // a run-time index needs memory
}
"""


PLANTED = ("--launches", "tests.instruments.planted_kernels")


@pytest.mark.slow_on_cpu
def test_planted_faults():
    check_faults("--only", "faults", count="4 compiles of 4 launches, 4 wrong")


@pytest.mark.slow_on_cpu
def test_planted_kernels():
    text = check_faults(count="7 compiles of 8 launches, 4 wrong")
    clean = [row for row in text.splitlines() if " clean_kernel" in row]
    assert len(clean) == 3 and clean[0].startswith("sound +1 ")  # one compile for the same code
    assert not any("NOT CLEAN" in row for row in clean)


def check_faults(*options, count):
    """The gate sees each fault and fails. Returns what it printed."""
    code, text = gate("--archs", "86", *PLANTED, "--quick", "--jobs", "1", *options)
    rows = {
        row.split(" sm_86 ")[1].split()[0]: row for row in text.splitlines() if " sm_86 " in row
    }
    assert code == 1 and count in text
    assert "NOT CLEAN" in rows["spilling_kernel"] and "spills   0" not in rows["spilling_kernel"]
    assert "atomics 1" in rows["atomic_kernel"] and "NOT CLEAN" in rows["atomic_kernel"]
    assert "spills   0" in rows["crowded_kernel"] and "NOT CLEAN" in rows["crowded_kernel"]
    assert "NOT COMPILED: arange's range must be a power of 2" in rows["refused_kernel"]
    return text


@pytest.mark.slow_on_cpu
def test_a_product_less_exact_than_asked():
    code, text = gate("--archs", "100", *PLANTED, "--only", "narrowed")
    assert code == 1
    assert "NOT CLEAN, TF32 unasked" in text


@pytest.mark.slow_on_cpu
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cuda_sources(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(CUDA)
    code, text = gate("--archs", "86", "--cuda", str(source))
    assert code == 1, text
    rows = {name: row for row in text.splitlines() for name in ("clean", "adds", "spills")
            if f"{len(name)}{name}" in row}  # fmt: skip
    assert not rows["clean"].endswith("NOT CLEAN")
    assert rows["adds"].endswith("NOT CLEAN") and "atomics 0" not in rows["adds"]
    assert rows["spills"].endswith("NOT CLEAN") and "spills   0" not in rows["spills"]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_other_versions_of_triton(version, tmp_path):
    """Kernels compile and run guarded under the oldest and the newest Triton too."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    install += ["--target", str(tmp_path), f"triton=={version}"]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip(f"triton {version} cannot be downloaded")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    quick = [sys.executable, "-m", "benchmarks.offline", "--quick"]
    tests = [sys.executable, "-m", "pytest", "-q", "tests/instruments/test_guarded.py"]
    tests += ["tests/kernels/lora_linear/test_guarded.py"]
    planted = [sys.executable, "-m", "benchmarks.offline", "--archs", "90", "--launches"]
    planted += ["tests.instruments.planted_code", "--jobs", "1"]
    for command in (quick, tests, planted):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == (command is planted), done.stdout + done.stderr
        assert command is tests or f"triton {version}\n" in done.stdout
    assert ", 8 wrong" in done.stdout, done.stdout
