# SPDX-License-Identifier: Apache-2.0
"""Count an operator that runs in C++ by what torch's path of it calls.

The operator itself runs as it is. Its body then runs once more for each new set of shapes, so that
launches, bytes and FLOP are those that ``samfast.counters`` finds on the torch backend, where
attention stays one call, with the FLOP of the C++ path: its logits are in no memory here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from samfast import backends
from samfast.counters import Counts, counting
from samfast.kernels.relpos_attention.flops import OPERATORS as WITH_BIAS
from samfast.kernels.relpos_attention.flops import torch_stands_for
from samfast.kernels.window_attention.flops import OPERATORS as WITHOUT

ATTENTION = (*WITH_BIAS, *WITHOUT)
# Conv-LoRA's experts: which of them run depends on values, so that each call is another.
BY_VALUES = frozenset(f"samfast::conv_experts_{way}" for way in ("forward", "backward"))


class Noted(NamedTuple):
    """One call as ``Counts.launch`` is told, a wait of the host, or an operator of ours begins."""

    inside: tuple[str, ...]
    name: str
    times: int
    size: int
    flops: int
    waits: bool = False
    opens: bool = False


class _Notes(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[Noted] = []

    def opened(self, operator: str) -> Any:
        self.made.append(Noted(tuple(self.inside), operator, 0, 0, 0, opens=True))
        return super().opened(operator)

    def launch(self, name: str, times: int, size: int, flops: int) -> None:
        self.made.append(Noted(tuple(self.inside), name, times, size, flops))

    def sync(self, name: str) -> None:
        self.made.append(Noted(tuple(self.inside), name, 0, 0, 0, True))


class Replay:
    """Runs an operator for ``counting(run=…)`` and tells ``counts`` what its body calls.

    counts: Counts that are also told which operation is entered, as ``counted.Owned`` is
    """

    def __init__(self, counts: Any):
        self.counts = counts
        self._known: dict[Any, list[Noted]] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        at = names.index("backend") if "backend" in names else None
        backend = "torch" if at is None or at >= len(args) else backends.requested(args[at])
        if at is None or backend not in ("auto", "cpu") or not _on_cpu(args):
            return NotImplemented
        out = func(*args, **kwargs)
        key = (func._schema.name, *_signature(args, kwargs))
        made = self._known.get(key)
        if made is None:
            with torch_stands_for(backend):
                made = _noted(func, (*args[:at], "torch", *args[at + 1 :]), kwargs)
            if not any(BY_VALUES.intersection(note.inside) for note in made):
                self._known[key] = made
        self._tell(made)
        return out

    def _tell(self, made: list[Noted]) -> None:
        for note in made:
            self.counts.inside += note.inside
            if note.opens:
                self.counts.enter(note.name)
            elif note.waits:
                self.counts.sync(note.name)
            else:
                self.counts.launch(note.name, note.times, note.size, note.flops)
            del self.counts.inside[len(self.counts.inside) - len(note.inside) :]


def _noted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Noted]:
    """What the operator's body calls on torch's path; no mode of the step at hand sees it."""
    notes = _Notes()
    with _disable_current_modes(), torch_path(), counting(ATTENTION, counts=notes):
        func(*args, **kwargs)
    return notes.made


def _on_cpu(args: tuple[Any, ...]) -> bool:
    return all(t.is_cpu for t in tree_flatten(args)[0] if isinstance(t, Tensor))


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    leaves, spec = tree_flatten((args, kwargs))
    known = [
        (t.shape, t.stride(), t.dtype) if isinstance(t, Tensor) else (type(t), t) for t in leaves
    ]
    return str(spec), tuple(known)


@contextmanager
def torch_path() -> Iterator[None]:
    before = os.environ.get("SAMFAST_BACKEND")
    os.environ["SAMFAST_BACKEND"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SAMFAST_BACKEND"]
        else:
            os.environ["SAMFAST_BACKEND"] = before
