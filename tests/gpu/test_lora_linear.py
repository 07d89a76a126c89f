# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of lora_linear; on a CPU the same code runs at tiny sizes.

Values, gradients and module checks run on a GPU too, from tests/kernels and tests/modules.
"""

import pytest
import torch
from torch import nn

from benchmarks.graph import captured
from samfast.backends import triton_missing
from samfast.counters import count, saved_bytes
from samfast.functional import lora_linear
from samfast.modules import LoraLinear

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
REPEATS = 250 if CUDA else 3
SHAPE = (4, 70, 70, 256) if CUDA else (2, 9, 24)
BACKEND = "triton" if triton_missing(DEVICE) is None else "torch"
needs_gpu = pytest.mark.skipif(not CUDA, reason="there is no CUDA device")


def problem(dtype=torch.float32, rank=4):
    """x, a layer with random factors, and an incoming gradient."""
    torch.manual_seed(0)
    features = SHAPE[-1]
    layer = LoraLinear(features, 3 * features, rank, device=DEVICE, dtype=dtype)
    nn.init.normal_(layer.lora_B)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    x = torch.randn(SHAPE, device=DEVICE).to(dtype).requires_grad_()
    return x, layer, torch.randn(*SHAPE[:-1], 3 * features, device=DEVICE).to(dtype)


def gradients(x, layer, dy, dropout=0.0, seed=None):
    y = lora_linear(
        x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling,
        dropout=dropout, seed=seed, backend=BACKEND,
    )  # fmt: skip
    return [y, *torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_bits_every_time(dtype, deterministic, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    x, layer, dy = problem(dtype)
    seed = torch.tensor([9], device=DEVICE)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = gradients(x, layer, dy, 0.1, seed)
        for _ in range(REPEATS):
            again = gradients(x, layer, dy, 0.1, seed)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_twenty_optimizer_steps_under_graph_replay_equal_eager():
    """Factors updated between replays must be seen: nothing of them may be frozen in the graph."""
    losses = {}
    for mode in ("eager", "graph"):
        x, layer, target = problem()
        x.requires_grad_(False)
        factors = [layer.lora_A, layer.lora_B]
        start = [p.detach().clone() for p in factors]
        for parameter in factors:
            parameter.grad = torch.zeros_like(parameter)
        loss = torch.zeros((), device=DEVICE)

        def step(x=x, layer=layer, target=target, factors=factors, loss=loss):
            value = (layer(x) - target).square().mean()
            for parameter, grad in zip(factors, torch.autograd.grad(value, factors), strict=True):
                parameter.grad.copy_(grad)
            with torch.no_grad():
                for parameter in factors:
                    parameter.sub_(parameter.grad, alpha=0.05)
            loss.copy_(value.detach())

        run = captured(step) if mode == "graph" and CUDA else step
        with torch.no_grad():  # warm-up and capture moved the factors
            for parameter, value in zip(factors, start, strict=True):
                parameter.copy_(value)
        trace = []
        for _ in range(20):
            run()
            trace.append(loss.item())
        losses[mode] = trace
    assert losses["graph"] == losses["eager"]
    assert losses["eager"][-1] < losses["eager"][0]


def test_counted_launches_and_syncs():
    x, layer, dy = problem()
    counts = count(lambda: gradients(x, layer, dy))
    assert counts.total_launches <= (8 if BACKEND == "triton" else 14)
    assert counts.total_syncs == 0


@needs_gpu
@pytest.mark.gpu
def test_a_stream_that_is_not_the_default():
    x, layer, dy = problem()
    expected = gradients(x, layer, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = gradients(x, layer, dy)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_are_what_the_allocator_says(dtype):
    x, layer, _ = problem(dtype)
    known = [x, layer.weight, layer.bias, layer.lora_A, layer.lora_B]
    counted = saved_bytes(lambda: layer(x), known)
    assert counted.hooks == counted.living
    layer(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    kept = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()
    assert abs(kept - counted.living) <= 0.03 * counted.living + 512  # the allocator's block


@needs_gpu
@pytest.mark.gpu
def test_the_profiler_sees_the_counted_launches():
    x, layer, dy = problem(torch.bfloat16)
    counts = count(lambda: gradients(x, layer, dy))
    gradients(x, layer, dy)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        gradients(x, layer, dy)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    ours = [name for name in kernels if name.endswith("_kernel")]
    assert len(ours) == sum(n for name, n in counts.launches.items() if name.endswith("_kernel"))
