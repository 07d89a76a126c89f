# SPDX-License-Identifier: Apache-2.0
"""torch.cuda for a machine without a GPU, so that programs meant for one run to their launches.

What is put on "cuda" lies on the CPU. Streams, events, graphs and memory statistics exist and do
nothing. Matrix products give zeros, as kernels do under the stand-in driver, and cost no time.
Values mean nothing here: a program that compares them fails after it has launched.
"""

import contextlib
import itertools
import time
from collections import defaultdict
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import stand_in
from benchmarks.cubin import SHARED_LIMITS
from samfast.kernels._common.implementation import IMPLEMENTATIONS


@contextlib.contextmanager
def standing_in(arch: int = 90, compiles: bool = True):
    """stand_in.standing_in with a torch.cuda for it; yields the same StandIn."""
    with stand_in.standing_in(arch, compiles) as standing, contextlib.ExitStack() as stack:
        for name, value in _functions(standing).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        autocast = torch.autocast.__init__

        def on_cpu(self, device_type, *args, **kwargs):
            autocast(self, _place(device_type), *args, **kwargs)

        stack.enter_context(mock.patch.object(torch.autocast, "__init__", on_cpu))
        stack.enter_context(_OnCpu())
        stack.enter_context(_NoProducts())
        yield standing


def _place(value):
    """The CPU in place of a CUDA device, however it is named; everything else as it is."""
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        args = tuple(map(_place, args))
        kwargs = {name: _place(value) for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default: lambda a, b: a.new_zeros(a.shape[0], b.shape[1]),
    _ATEN.addmm.default: lambda c, a, b, **scales: a.new_zeros(a.shape[0], b.shape[1]),
    _ATEN.bmm.default: lambda a, b: a.new_zeros(*a.shape[:2], b.shape[2]),
    _ATEN.baddbmm.default: lambda c, a, b, **scales: a.new_zeros(*a.shape[:2], b.shape[2]),
}


class _NoProducts(TorchDispatchMode):
    """Zeros for products, in the operators of samfast too, forward and backward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (body := IMPLEMENTATIONS.get(func._schema.name)) is not None:
            with self:
                return body(*args, **kwargs)
        return _PRODUCTS.get(func, func)(*args, **kwargs)


class _Event:
    """Host time, as nothing else passes."""

    def __init__(self, *args, **kwargs):
        self.time = 0.0

    def record(self, stream=None):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


class _Graph:
    """Launches are made at capture; a replay makes none."""

    def __init__(self, *args, **kwargs):
        self.replays = 0

    def replay(self):
        self.replays += 1

    def pool(self):
        return (0, 0)

    def reset(self):
        pass


def _streams(standing):
    """Stream, stream, current_stream and default_stream; the driver is asked for the current."""
    handles = itertools.count(1)

    class Stream:
        def __init__(self, *args, cuda_stream=None, **kwargs):
            self.cuda_stream = next(handles) if cuda_stream is None else cuda_stream

        def __eq__(self, other):
            return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

        def __hash__(self):
            return self.cuda_stream

        def wait_stream(self, stream):
            pass

        def wait_event(self, event):
            pass

        def record_event(self, event=None):
            event = event or _Event()
            event.record(self)
            return event

        def synchronize(self):
            pass

        def query(self):
            return True

    @contextlib.contextmanager
    def stream(entered):
        before = standing.stream
        if entered is not None:
            standing.stream = entered.cuda_stream
        try:
            yield
        finally:
            standing.stream = before

    def graph(_, pool=None, stream=None, **kwargs):
        return enter(stream or Stream())

    enter = stream
    return {
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda device=None: Stream(cuda_stream=standing.stream),
        "default_stream": lambda device=None: Stream(cuda_stream=0),
        "graph": graph,
    }


def _functions(standing):
    name, capability = stand_in.DEVICES[standing.arch], divmod(standing.arch, 10)
    properties = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=stand_in.PROCESSORS[standing.arch],
        shared_memory_per_block_optin=SHARED_LIMITS[standing.arch],
        total_memory=141 * 10**9,
        warp_size=32,
    )

    def returns(value):
        return lambda *args, **kwargs: value

    nothing = ("synchronize", "empty_cache", "reset_peak_memory_stats", "init", "set_device")
    zero = ("memory_allocated", "max_memory_allocated", "memory_reserved", "current_device")
    return {
        "is_available": returns(True),
        "is_initialized": returns(True),
        "is_bf16_supported": returns(True),
        "device_count": returns(1),
        "get_device_name": returns(name),
        "get_device_capability": returns(capability),
        "get_device_properties": returns(properties),
        "memory_stats": lambda device=None: defaultdict(int),
        "device": lambda device: contextlib.nullcontext(),
        "nvtx": SimpleNamespace(range_push=returns(0), range_pop=returns(0)),
        "Event": _Event,
        "CUDAGraph": _Graph,
        **{name: returns(None) for name in nothing},
        **{name: returns(0) for name in zero},
        **_streams(standing),
    }
