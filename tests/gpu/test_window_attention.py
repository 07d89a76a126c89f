# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of the attention; on a CPU the same code runs at tiny sizes.

Values, gradients and module checks run on a GPU too, from tests/kernels and tests/modules.
"""

from functools import partial

import pytest
import torch
from draws import DEVICE, drawing

from samfast.backends import triton_missing
from samfast.functional import window_relpos_attention

from . import proofs
from .proofs import CUDA

pytestmark = pytest.mark.slow_on_cpu

REPEATS = 250 if CUDA else 1
STEPS = 20 if CUDA else 3
BACKEND = "triton" if triton_missing(DEVICE) is None else "torch"
# (map, window, heads, head_dim): padded windows, and a map that attends to all of itself
SIZES = {
    "windows": (64, 14, 16, 80) if CUDA else (2, 3, 1, 16),
    "global": (64, 64, 12, 64) if CUDA else (3, 3, 1, 16),
}


def problem(kind, dtype=torch.float32):
    """qkv, tables and bias that want gradients, and dout."""
    side, window, heads, head_dim = SIZES[kind]
    draw = drawing(0, torch.float32)
    width = heads * head_dim
    qkv = draw(1, side, side, 3 * width).to(dtype)
    tables = (draw(2 * window - 1, head_dim, divisor=10 / 3) for _ in range(2))
    leaves = [qkv, *tables, draw(3 * width)]
    return [t.requires_grad_() for t in leaves], draw(1, side, side, width).to(dtype)


def attend(kind, leaves):
    _, window, heads, _ = SIZES[kind]
    qkv, table_h, table_w, bias = leaves
    return window_relpos_attention(
        qkv, heads, window, table_h, table_w, pad_bias=bias, backend=BACKEND
    )


def gradients(kind, leaves, dout):
    out = attend(kind, leaves)
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", SIZES)
def test_the_same_bits_every_time(kind, dtype, deterministic):
    call = problem(kind, dtype)
    proofs.same_bits(lambda: gradients(kind, *call), REPEATS, deterministic)


@pytest.mark.parametrize("kind", SIZES)
def test_optimizer_steps_under_graph_replay_equal_eager(kind):
    """Tables and bias change between replays, so nothing of them may be frozen in the graph."""

    def prepare():
        leaves, target = problem(kind)
        return lambda: (attend(kind, leaves) - target).square().mean(), leaves[1:]

    proofs.steps_under_replay(prepare, STEPS, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_bfloat16_against_float64(kind):
    """At the sizes of SAM, which the interpreter has no time for."""
    from budgets import all_within_budget

    leaves, dout = problem(kind, torch.bfloat16)
    _, window, heads, _ = SIZES[kind]

    def reference(dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
        qkv, table_h, table_w, bias = inputs
        out = window_relpos_attention(
            qkv, heads, window, table_h, table_w, pad_bias=bias, backend="reference"
        )
        return [out, *torch.autograd.grad(out, inputs, dout.to(dtype))]

    ours = gradients(kind, leaves, dout)
    names = ("out", "dqkv", "drel_pos_h", "drel_pos_w", "dpad_bias")
    stock, exact = (partial(reference, dtype) for dtype in (torch.bfloat16, torch.float64))
    all_within_budget(ours, stock, exact, torch.bfloat16, names)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_counted_launches_are_the_profilers(kind):
    call = problem(kind, torch.bfloat16)
    proofs.launches_as_profiled(lambda: gradients(kind, *call))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_a_stream_that_is_not_the_default(kind):
    call = problem(kind)
    proofs.another_stream(lambda: gradients(kind, *call))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_saved_bytes_are_what_the_allocator_says(kind):
    leaves, _ = problem(kind, torch.bfloat16)
    proofs.saved_as_allocated(lambda: attend(kind, leaves), leaves)
