# SPDX-License-Identifier: Apache-2.0
"""FLOP formulas of the operators: those of the backend that the operator takes itself."""

import pytest
import torch
from guarded import guarded
from torch.utils.flop_counter import FlopCounterMode

from samfast import backends
from samfast.counters import counting
from samfast.functional import window_relpos_attention
from samfast.kernels.relpos_attention.flops import torch_stands_for

HEADS, HEAD, SIDE, WINDOW = 2, 16, 5, 4  # a map of 5 × 5 in four windows of 4 × 4
INSIDE = HEADS * SIDE**2 * WINDOW**2  # pairs of an image's query and any key
ALL = HEADS * 4 * WINDOW**4  # and with the queries of the padding
LINES = HEADS * 2 * WINDOW
ABSENT = backends.triton_missing(torch.device("cpu"))


def step(backend, dtype=torch.float32):
    qkv = torch.randn(1, SIDE, SIDE, 3 * HEADS * HEAD, dtype=dtype, requires_grad=True)
    tables = torch.randn(2, 2 * WINDOW - 1, HEAD, dtype=dtype)
    window_relpos_attention(qkv, HEADS, WINDOW, *tables, backend=backend).sum().backward()


def counted(backend, dtype=torch.float32):
    with FlopCounterMode(display=False) as counter:
        step(backend, dtype)
    return counter.get_total_flops()


def flop(pairs, queries):
    """Two products and the bias forwards, five and the bias twice backwards."""
    return 2 * HEAD * (7 * pairs + 3 * LINES * queries)


@pytest.mark.skipif(backends.native_missing() is not None, reason=str(backends.native_missing()))
def test_keys_of_the_padding_are_computed_in_cpp_but_no_queries():
    assert counted("cpu") == counted("auto") == flop(INSIDE, SIDE**2)


def test_torch_computes_queries_of_the_padding_too():
    assert counted("torch") == flop(ALL, 4 * WINDOW**2)
    assert counted("auto", torch.float64) == counted("torch")  # which C++ does not take


@pytest.mark.slow_on_cpu
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_s_is_the_sum_of_its_kernels(dtype):
    with guarded(), counting() as counts:
        step("triton", dtype)
    assert counted("triton", dtype) == counts.flops > flop(INSIDE, SIDE**2)


@pytest.mark.skipif(backends.native_missing() is not None, reason=str(backends.native_missing()))
def test_torch_may_stand_for_another_backend(monkeypatch):
    """As the profile counts a C++ operator by what its torch path calls."""
    with torch_stands_for("cpu"):
        assert counted("torch") == flop(INSIDE, SIDE**2)
        monkeypatch.setenv("SAMFAST_BACKEND", "torch")
        assert counted("auto") == flop(INSIDE, SIDE**2)
    assert counted("auto") == flop(ALL, 4 * WINDOW**2)
