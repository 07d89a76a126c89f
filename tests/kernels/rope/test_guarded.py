# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel under the guarded interpreter: orders of programs, tiles, offsets far out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .cases import Case, runnable

if runnable("triton") or torch.cuda.is_available():
    reason = runnable("triton") or "kernels are compiled, not interpreted, beside a GPU"
    pytest.skip(reason, allow_module_level=True)

from guarded import ORDERS, guarded

from samfast.kernels.rope import triton_kernels as kernels


@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
def test_every_order_and_tile_gives_the_same_bits(pairs, monkeypatch):
    """Of a program with all rows of a token, and of three where the last one is not full."""
    case = Case(1, 2, 3, 5, 6, (2, 2), pairs)
    runs = []
    for most, rows in ((2048, 16), (32, 4)):
        monkeypatch.setattr(kernels, "ELEMENTS", most)
        assert kernels._blocks(10, 6)["BLOCK_R"] == rows
        for order in ORDERS if most == 32 else ORDERS[:1]:
            with guarded(order) as guard:
                runs.append(case.run(torch.bfloat16, "triton"))
            assert guard.launches == 2
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


# Offsets beyond 2**31 elements on a CPU: virtual memory of which a few pages are touched. Images,
# lines, q and k, and rows of the tables lie far apart in turn.
FAR = """
import torch
from guarded import guarded
from samfast.kernels._common.windows import Windows
from samfast.kernels.rope import triton_kernels as kernels

torch.manual_seed(0)
far = 2**31
store, angles = torch.empty(far + 4096, dtype=torch.float16), torch.empty(far + 4096)
x = torch.randn(2, 2, 2, 2, 2, 8).half()
windows = Windows(2, 2, 2, 2, 2)
cos, sin = torch.randn(4, 4), torch.randn(4, 4)
near = [64, 32, 16, 8, 1]
with guarded(poison=False):
    for halves in (False, True):
        expected = torch.empty_like(x)
        kernels.rotate(x, expected, cos, sin, windows, halves, False)
        for dim in range(5):
            strides = list(x.stride())
            strides[dim] = far
            t = store.as_strided(x.shape, strides)
            t.copy_(x)
            kernels.rotate(t, t, cos, sin, windows, halves, False)
            assert torch.equal(t, expected), dim
        for strides in ((far // 3, 1), (4, far // 3)):
            table = angles.as_strided((4, 4), strides)
            table.copy_(cos)
            t = x.clone()
            kernels.rotate(t, t, table, sin, windows, halves, False)
            assert torch.equal(t, expected), strides
            table.copy_(sin)
            t = x.clone()
            kernels.rotate(t, t, cos, table, windows, halves, False)
            assert torch.equal(t, expected), strides
print("equal")
"""


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31():
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    command = [sys.executable, "-c", FAR]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr
