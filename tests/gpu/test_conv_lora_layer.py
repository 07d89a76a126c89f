# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of Conv-LoRA; on a CPU the same code runs at tiny sizes.

Values, gradients and module checks run on a GPU too, from tests/kernels and tests/modules.
"""

import pytest
import torch
from torch import nn

from benchmarks.graph import captured
from samfast.counters import count, saved_bytes
from samfast.functional import conv_experts
from samfast.kernels.conv_experts.op import supports
from samfast.modules import ConvLoraLinear

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
REPEATS = 250 if CUDA else 2
SHAPE = (25, 14, 14, 256) if CUDA else (2, 5, 6, 24)
needs_gpu = pytest.mark.skipif(not CUDA, reason="there is no CUDA device")


def problem(dtype=torch.float32):
    """x, a layer with random factors, an incoming gradient, and the noise of its gate."""
    torch.manual_seed(0)
    features, experts = SHAPE[-1], 8 if CUDA else 3
    layer = ConvLoraLinear(features, 3 * features, experts=experts, device=DEVICE, dtype=dtype)
    for _, parameter in layer.adapter_parameters():
        nn.init.normal_(parameter, std=0.3)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    x = torch.randn(SHAPE, device=DEVICE).to(dtype).requires_grad_()
    dy = torch.randn(*SHAPE[:-1], 3 * features, device=DEVICE).to(dtype)
    return x, layer, dy, torch.randn(SHAPE[0], experts, device=DEVICE)


def gradients(x, layer, dy, noise):
    y, loss = layer(x, noise=noise, return_aux=True)
    wanted = [x, *(p for _, p in layer.adapter_parameters())]
    return [y, loss, *torch.autograd.grad([y, loss], wanted, [dy, torch.ones_like(loss)])]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(dtype, deterministic, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    call = problem(dtype)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = gradients(*call)
        for _ in range(REPEATS):
            assert all(torch.equal(a, b) for a, b in zip(first, gradients(*call), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_experts_repeat_bit_for_bit(backend):
    torch.manual_seed(0)
    samples, size = (25, 14) if CUDA else (2, 4)
    h = torch.randn(samples, size, size, 3, device=DEVICE, requires_grad=True)
    weight = torch.randn(8, 3, 3, 3, 3, device=DEVICE, requires_grad=True)
    bias = torch.randn(8, 3, device=DEVICE, requires_grad=True)
    if reason := supports(backend, h, weight):
        pytest.skip(reason)
    index = torch.arange(samples, device=DEVICE) % 8

    def run():
        z = conv_experts(h, weight, bias, index, range(1, 9), backend=backend)
        return [z, *torch.autograd.grad(z, [h, weight, bias], torch.ones_like(z))]

    first = run()
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_twenty_optimizer_steps_under_graph_replay_equal_eager():
    """Routing and factors change between replays, so nothing of them may be frozen in the graph."""
    losses = {}
    for mode in ("eager", "graph"):
        x, layer, target, noise = problem()
        x.requires_grad_(False)
        factors = [p for _, p in layer.adapter_parameters()]
        start = [p.detach().clone() for p in factors]
        loss = torch.zeros((), device=DEVICE)

        def step(x=x, layer=layer, target=target, noise=noise, factors=factors, loss=loss):
            y, aux = layer(x, noise=noise, return_aux=True)
            value = (y - target).square().mean() + aux
            grads = torch.autograd.grad(value, factors)
            with torch.no_grad():
                for parameter, grad in zip(factors, grads, strict=True):
                    parameter.sub_(grad, alpha=0.01)
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


@needs_gpu
@pytest.mark.gpu
def test_counted_launches_are_the_profilers(monkeypatch):
    """Triton's, which both count by name; the noise, an input here, is one more in training."""
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    call = problem(torch.bfloat16)
    counts = count(lambda: gradients(*call))
    assert counts.total_syncs == 0
    gradients(*call)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        gradients(*call)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    ours = [name for name in kernels if name.endswith("_kernel")]
    assert len(ours) == sum(n for name, n in counts.launches.items() if name.endswith("_kernel"))


@needs_gpu
@pytest.mark.gpu
def test_a_stream_that_is_not_the_default():
    call = problem()
    expected = gradients(*call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = gradients(*call)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@needs_gpu
@pytest.mark.gpu
def test_saved_bytes_are_what_the_allocator_says():
    x, layer, _, noise = problem(torch.bfloat16)
    known = [x, noise, *layer.parameters()]
    counted = saved_bytes(lambda: layer(x, noise=noise), known)
    layer(x, noise=noise)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x, noise=noise)
    kept = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()
    blocks = 8 * 512  # the allocator rounds each of the few tensors up to its block
    assert abs(kept - counted.living) <= 0.03 * counted.living + blocks
