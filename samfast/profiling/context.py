# SPDX-License-Identifier: Apache-2.0
"""``samfast.profile``: profile the steps inside a ``with``."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from samfast.profiling.ceilings import ceilings, measured_again
from samfast.profiling.outputs import check_output, trace_bytes
from samfast.profiling.recorder import BOTH, TIME, Recorder

_active: list["profile"] = []


class profile:
    """Profile training steps: ``with samfast.profile(model) as p: step()``.

    model: its blocks get rows; without it, those of every model called inside
    steps: largest number of timed steps; later ones are not recorded
    fresh_ceilings: measure the machine's ceilings again

    A step ends when an optimizer steps; with several optimizers, when the first one does. The first
    step is counted, which is slow, and the following ones are timed. A single step is counted and
    timed at once: its times include the counting, and the table says so. Under
    DistributedDataParallel, only rank 0 profiles.

    Raises RuntimeError for a profile inside a profile, and for results before the block ends.

    Example:
        with samfast.profile(model) as p:
            for batch in itertools.islice(loader, 4):
                step(batch)
        print(p.table())
    """

    def __init__(
        self, model: nn.Module | None = None, *, steps: int = 10, fresh_ceilings: bool = False
    ):
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}; it must be a whole number of at least 1")
        self._model, self._fresh = model, fresh_ceilings
        self._plan = [BOTH, *[TIME] * steps]
        self._recorder: Recorder | None = None
        self._result: dict[str, Any] | None = None
        self._rank = 0

    def __enter__(self) -> "profile":
        if _active:
            raise RuntimeError(
                "another samfast.profile is active; leave it before you enter the next one"
            )
        if self._recorder is not None:
            raise RuntimeError("this samfast.profile was used before; make another one")
        self._rank = rank()
        if self._rank == 0:
            self._recorder = Recorder(list(self._plan), self._model)
            self._recorder.__enter__()
            _active.append(self)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._recorder is None:
            return
        _active.remove(self)
        self._recorder.__exit__(kind, error, trace)
        if kind is not None:
            self._recorder.timed = 0

    def as_dict(self) -> dict[str, Any]:
        """Return all results as JSON values; {} on ranks above 0."""
        if self._rank:
            return {}
        if self._recorder is None or self in _active or not self._recorder.timed:
            raise RuntimeError(
                "there is no result yet; leave the with block without an error first"
            )
        if not self._recorder.counted.counts.launches:
            raise RuntimeError(
                "nothing ran inside the with block; run at least one training step there"
            )
        if self._result is None:
            self._result = result_of(self._recorder, self._fresh)
        return self._result

    def table(self) -> str:
        """Return the tables as text; on ranks above 0, a sentence."""
        from samfast.profiling.text import table

        return table(self.as_dict()) if self._rank == 0 else self._elsewhere()

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write a trace for chrome://tracing or Perfetto."""
        self._write(path, lambda: trace_bytes(self._recorded().profiler))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw operations against their ceilings, and memory over a step, as PNG."""
        from samfast.profiling.plot import plot_png

        self._write(path, lambda: plot_png(self.as_dict()))

    def html(self, path: str | os.PathLike[str]) -> None:
        """Write one page with the tables and drawings."""
        from samfast.profiling.page import page

        self._write(path, lambda: page(self.as_dict()).encode())

    def _write(self, path: str | os.PathLike[str], made: Callable[[], bytes]) -> None:
        from samfast.files.placing import write_whole

        if self._rank == 0:
            self.as_dict()
            check_output(Path(path))
            write_whole(Path(path), made())

    def _recorded(self) -> Recorder:
        assert self._recorder is not None
        return self._recorder

    def _elsewhere(self) -> str:
        return f"rank {self._rank} did not profile; rank 0 did"


def rank() -> int:
    """Return this process's rank; 0 for a single process or a RANK that is not a number."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    named = os.environ.get("RANK", "")
    return int(named) if named.isdecimal() else 0


def result_of(
    recorder: Recorder, fresh: bool = False, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The tables of a recording, with ceilings of the device and dtype that were seen."""
    from samfast.profiling.tables import result

    device = recorder.blocks.device or torch.device("cpu")
    dtype = recorder.blocks.dtype or torch.float32
    kind = "cuda" if device.type == "cuda" else "cpu"
    limits = ceilings(kind, dtype, fresh)
    named = str(dtype).removeprefix("torch.")
    what = f"{len(recorder.seconds)} steps, {named} on {kind}"
    about = {"what": what, "device": kind, "dtype": named, **(known or {})}
    try:
        return result(recorder, limits, about, functools.partial(measured_again, kind, dtype))
    except IndexError as error:
        raise RuntimeError(
            "torch.profiler lost the events of these steps, as it does when another profiler runs "
            "inside; leave that one out"
        ) from error
