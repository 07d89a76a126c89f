# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for GPUs that are not here: no spills, no float atomics, memory fits."""

import shutil

import pytest
from offline_gate import ALL, QUICK, ROOT, compile_all

from benchmarks.cubin import SHARED_LIMITS, compile_cuda

SOURCE = ROOT / "csrc" / "cuda" / "hypercomplex.cu"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.mark.slow
def test_quick():
    done = compile_all("hypercomplex ", QUICK, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 compiles of 10 launches, 0 wrong" in done.stdout


def test_one_target():
    """The largest kernels for the target with the least registers and shared memory."""
    done = compile_all("hypercomplex ", ["86"], "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 compiles of 5 launches, 0 wrong" in done.stdout


@pytest.mark.slow
def test_every_target_dtype_and_n():
    done = compile_all("hypercomplex ", ALL)
    assert done.returncode == 0, done.stdout + done.stderr


def check_cuda(archs):
    for arch in archs:
        kernels = compile_cuda(SOURCE, arch)
        assert len(kernels) == 13  # of nine pairs of types, of three types, and the sum
        assert all(kernel.clean for kernel in kernels), kernels


@needs_nvcc
@pytest.mark.slow
def test_cuda_on_the_target_with_the_least_shared_memory():
    check_cuda([86])


@needs_nvcc
@pytest.mark.slow
def test_cuda_on_every_target():
    check_cuda(sorted(set(SHARED_LIMITS) - {86}))
