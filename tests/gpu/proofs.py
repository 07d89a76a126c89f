# SPDX-License-Identifier: Apache-2.0
"""What the GPU tests of every operation prove in the same way."""

import gc
import importlib
import itertools
from collections import Counter

import pytest
import torch
from draws import DEVICE

from benchmarks.graph import captured
from samfast.counters import count, saved_bytes
from samfast.integrations.torchvision import installed

CUDA = torch.cuda.is_available()


def need_segment_anything() -> None:
    """Leave a test module out, with a sentence, where its classes cannot be inherited."""
    if not installed("segment_anything"):
        pytest.skip(
            "segment_anything is not installed; carry benchmarks/gpu_wheels.txt (make carry-gpu)",
            allow_module_level=True,
        )


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def missing(operation, backend, dtype) -> str | None:
    """None when the operation's small example runs on this backend here, or why it does not."""
    example = importlib.import_module(f"samfast.kernels.{operation}.example")
    return example.missing(backend, DEVICE, dtype)


def same_bits(call, repeats, deterministic):
    """``call()`` gives the same tensors every time; deterministic: under torch's own guard too,
    which fills fresh memory with NaN, so that nothing is right because it was there before."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = call()
        for _ in range(repeats):
            assert same(first, call())
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits_as(expected, call, repeats):
    """``call()`` gives these tensors every time, from memory that was filled with NaN."""
    turns = itertools.chain([expected], iter(call, object()))
    same_bits(lambda: next(turns), repeats, True)


def steps_under_replay(problem, steps, rate):
    """Steps of descent lower the loss, and as one captured graph they are the same steps.

    problem(): (what gives the loss, what is trained), afresh at each call
    """
    losses = {}
    for mode in ("eager", "graph"):
        value, trained = problem()
        start = [p.detach().clone() for p in trained]
        loss = torch.zeros((), device=DEVICE)

        def step(value=value, trained=trained, loss=loss):
            now = value()
            grads = torch.autograd.grad(now, trained)
            with torch.no_grad():
                for parameter, grad in zip(trained, grads, strict=True):
                    parameter.sub_(grad, alpha=rate)
            loss.copy_(now.detach())

        run = captured(step) if mode == "graph" and CUDA else step
        with torch.no_grad():  # warm-up and capture moved them
            for parameter, first in zip(trained, start, strict=True):
                parameter.copy_(first)
        losses[mode] = []
        for _ in range(steps):
            run()
            losses[mode].append(loss.item())
    assert losses["graph"] == losses["eager"]
    assert losses["eager"][-1] < losses["eager"][0]


def another_stream(call):
    expected, stream = call(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = call()
    torch.cuda.current_stream().wait_stream(stream)
    assert same(expected, actual)


def launches_as_profiled(call):
    """Triton's, which the counter and the profiler both know by name."""
    counts = count(call)
    assert counts.total_syncs == 0
    counted = {name: n for name, n in counts.launches.items() if name.endswith("_kernel")}
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()  # what was counted is not to be seen
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert Counter(name for name in kernels if name in counted) == counted


def saved_as_allocated(call, known, replaced=0):
    """call() gives one result; after it as many bytes more are asked of the allocator as counted.

    What it hands out for them is more: a block may be left whole where less than a MiB is over.
    replaced: bytes that a module may keep of that, which the next call frees
    """
    counted = saved_bytes(call, known)
    with torch.no_grad():  # a graph that a module keeps of its last call goes
        call()
    before = _requested()
    made = call()
    grown = _requested() - before - made.untyped_storage().nbytes()
    assert 0 <= counted.living - grown <= replaced, f"{grown} more bytes, {counted} counted"


def _requested() -> int:
    """Bytes of all tensors on the GPU."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]
