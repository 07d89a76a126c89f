# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of the attention; on a CPU the same code runs at tiny sizes.

Values, gradients and module checks run on a GPU too, from tests/kernels and tests/modules.
"""

import pytest
import torch

from benchmarks.graph import captured
from samfast.backends import triton_missing
from samfast.counters import count, saved_bytes
from samfast.functional import window_relpos_attention

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
REPEATS = 250 if CUDA else 1
STEPS = 20 if CUDA else 3
BACKEND = "triton" if triton_missing(DEVICE) is None else "torch"
# (map, window, heads, head_dim): padded windows, and a map that attends to all of itself
SIZES = {
    "windows": (64, 14, 16, 80) if CUDA else (2, 3, 1, 16),
    "global": (64, 64, 12, 64) if CUDA else (3, 3, 1, 16),
}
needs_gpu = pytest.mark.skipif(not CUDA, reason="there is no CUDA device")


def problem(kind, dtype=torch.float32):
    """qkv, tables and bias that want gradients, and dout."""
    side, window, heads, head_dim = SIZES[kind]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    width = heads * head_dim
    qkv = draw(1, side, side, 3 * width).to(dtype)
    leaves = [qkv, *(0.3 * draw(2 * window - 1, head_dim) for _ in range(2)), draw(3 * width)]
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
def test_the_same_bits_every_time(kind, dtype, deterministic, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    call = problem(kind, dtype)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = gradients(kind, *call)
        for _ in range(REPEATS):
            again = gradients(kind, *call)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", SIZES)
def test_optimizer_steps_under_graph_replay_equal_eager(kind):
    """Tables and bias change between replays, so nothing of them may be frozen in the graph."""
    losses = {}
    for mode in ("eager", "graph"):
        leaves, target = problem(kind)
        trained = leaves[1:]
        start = [p.detach().clone() for p in trained]
        loss = torch.zeros((), device=DEVICE)

        def step(leaves=leaves, target=target, trained=trained, loss=loss):
            value = (attend(kind, leaves) - target).square().mean()
            grads = torch.autograd.grad(value, trained)
            with torch.no_grad():
                for parameter, grad in zip(trained, grads, strict=True):
                    parameter.sub_(grad)
            loss.copy_(value.detach())

        run = captured(step) if mode == "graph" and CUDA else step
        with torch.no_grad():  # warm-up and capture moved them
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
        trace = []
        for _ in range(STEPS):
            run()
            trace.append(loss.item())
        losses[mode] = trace
    assert losses["graph"] == losses["eager"]
    assert losses["eager"][-1] < losses["eager"][0]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_bfloat16_against_float64(kind):
    """The interpreter multiplies bfloat16 wrongly, so that this is its only test."""
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
    stock = reference(torch.bfloat16)
    all_within_budget(ours, stock, reference(torch.float64), torch.bfloat16, names)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_counted_launches_are_the_profilers(kind):
    """Triton's, which both count by name."""
    call = problem(kind, torch.bfloat16)
    counts = count(lambda: gradients(kind, *call))
    assert counts.total_syncs == 0
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        gradients(kind, *call)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    ours = [name for name in kernels if name.endswith("_kernel")]
    assert len(ours) == sum(n for name, n in counts.launches.items() if name.endswith("_kernel"))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_a_stream_that_is_not_the_default(kind):
    call = problem(kind)
    expected = gradients(kind, *call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = gradients(kind, *call)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_saved_bytes_are_what_the_allocator_says(kind):
    leaves, _ = problem(kind, torch.bfloat16)
    counted = saved_bytes(lambda: attend(kind, leaves), leaves)
    attend(kind, leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = attend(kind, leaves)
    kept = torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes()
    blocks = 8 * 512  # the allocator rounds each of the few tensors up to its block
    assert abs(kept - counted.living) <= 0.03 * counted.living + blocks
