# SPDX-License-Identifier: Apache-2.0
"""The CUDA source compiles for GPUs that are not here: no spills, no float atomics, memory fits."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton", reason="triton, whose tools read the binary, is not installed")
from benchmarks.offline import ROOT, SHARED_LIMITS, compile_cuda
from samfast.kernels.conv_experts.cuda_path import MAX_EXPERTS, MAX_RANK

SOURCE = ROOT / "csrc" / "cuda" / "conv_experts.cu"
HEADER = ROOT / "csrc" / "conv_experts_tile.h"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def check(archs):
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda arch: compile_cuda(SOURCE, arch), archs))
    for kernels in compiled:
        assert len(kernels) == 9  # three, for each of three element types
        assert all(kernel.clean for kernel in kernels), kernels


@pytest.mark.slow_on_cpu
@needs_nvcc
def test_quick():
    """The target with the least shared memory; at the highest rank the source asserts its share."""
    check([86])


@needs_nvcc
@pytest.mark.slow
def test_every_target():
    check(sorted(set(SHARED_LIMITS) - {86}))


def test_limits_are_those_of_the_source():
    (rank,) = re.findall(r"kMaxRank = (\d+)", HEADER.read_text())
    (experts,) = re.findall(r"kMaxExperts = (\d+)", SOURCE.read_text())
    assert (int(rank), int(experts)) == (MAX_RANK, MAX_EXPERTS)
