# SPDX-License-Identifier: Apache-2.0
"""Named ranges for profilers: samfast/OPERATION/STAGE.

torch.profiler shows them as user annotations. Where CUDA is in use they are NVTX ranges too, for
nsys and ncu. They are off until ``samfast.ranges(True)`` or SAMFAST_RANGES=1.
"""

import contextlib
import threading

import torch

from samfast.kernels._common.variables import switch

_NOTHING = contextlib.nullcontext()
_on = switch("SAMFAST_RANGES", False, "1 for ranges, to 0 for none")
_listener = None


class ranges:
    """Switch ranges on or off, at once and in all threads; in ``with``, until its end.

    A backward shows only if the switch is still on when it runs. Backend "reference" is plain
    autograd and has no ranges. Raises RuntimeError inside a compiled function, where it would have
    no effect.
    """

    def __init__(self, on: bool = True):
        if not isinstance(on, bool):
            raise ValueError(f"expected ranges(True) or ranges(False), got {on!r}")
        if torch.compiler.is_compiling():
            raise RuntimeError("samfast.ranges has no effect in compiled code; call it outside")
        global _on
        self._wanted, self._before, _on = on, _on, on

    def __enter__(self) -> "ranges":
        global _on
        _on = self._wanted
        return self

    def __exit__(self, *error) -> None:
        global _on
        _on = self._before


def stage(operation: str, name: str):
    """A context of one stage of an operation; does nothing where ranges are off."""
    if _listener is not None:
        return _listener(f"samfast/{operation}/{name}")
    return Range(f"samfast/{operation}/{name}") if _on else _NOTHING


def wanted() -> bool:
    """Whether ranges are on."""
    return _on


@contextlib.contextmanager
def listening(listener):
    """Inside this context ``listener(label)`` gives the context of each stage of this thread."""
    global _listener
    thread = threading.get_ident()

    def stage_of(label):
        if threading.get_ident() == thread:
            return _both(listener(label), label) if _on else listener(label)
        return Range(label) if _on else _NOTHING

    _listener = stage_of
    try:
        yield
    finally:
        _listener = None


@contextlib.contextmanager
def _both(context, label):
    with context, Range(label):
        yield


class Range:
    """A range of torch's profiler and, where CUDA is in use, of NVTX."""

    def __init__(self, label: str):
        self.label, self.recorded = label, torch.profiler.record_function(label)

    def __enter__(self) -> None:
        self.marked = torch.cuda.is_initialized()
        if self.marked:
            torch.cuda.nvtx.range_push(self.label)
        self.recorded.__enter__()

    def __exit__(self, *error) -> None:
        self.recorded.__exit__(*error)
        if self.marked:
            torch.cuda.nvtx.range_pop()
