# SPDX-License-Identifier: Apache-2.0
"""The CUDA source compiles for GPUs that are not here: no spills, no float atomics, memory fits."""

import shutil

import pytest

pytest.importorskip("triton", reason="triton, whose tools read the binary, is not installed")
from benchmarks.offline import ROOT, SHARED_LIMITS, compile_cuda

SOURCE = ROOT / "csrc" / "cuda" / "hypercomplex.cu"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def check(archs):
    for arch in archs:
        kernels = compile_cuda(SOURCE, arch)
        assert len(kernels) == 13  # of nine pairs of types, of three types, and the sum
        assert all(kernel.clean for kernel in kernels), kernels


@pytest.mark.slow_on_cpu
@needs_nvcc
def test_quick():
    """The target with the least shared memory."""
    check([86])


@needs_nvcc
@pytest.mark.slow
def test_every_target():
    check(sorted(set(SHARED_LIMITS) - {86}))
