# SPDX-License-Identifier: Apache-2.0
"""What one step launches, moves, computes and keeps, and to what each of it belongs.

The numbers are those of ``samfast.counters``; here they only get an owner.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samfast.counters import Counts, Living, counting
from samfast.profiling.blocks import Blocks
from samfast.profiling.names import OWN, UNREAD, operation, row_of_node
from samfast.profiling.replay import Replay
from samfast.profiling.saved import SavedHooks

CATEGORIES = ("parameters", "optimizer state", "gradients", "saved for backward", "temporary")
PARAMETERS, STATE, GRADIENTS, SAVED, TEMPORARY = CATEGORIES


class Call(NamedTuple):
    """inside: samfast's operation around it   phase: forward or backward"""

    inside: str | None
    name: str
    phase: str
    block: str | None
    launches: int
    bytes: int
    flops: int
    syncs: int


class Kept(NamedTuple):
    """A storage that was saved for the backward. row: of the operation that reads it there"""

    row: str
    block: str | None
    size: int


class Owned(Counts):
    """Counts that keep a list of their calls, too. entered: calls of samfast's operations"""

    def __init__(self, blocks: Blocks):
        super().__init__()
        self.blocks = blocks
        self.calls: list[Call] = []
        self.entered: Counter[str] = Counter()

    def opened(self, operator: str) -> Any:
        self.enter(operator)
        return super().opened(operator)

    def enter(self, operator: str) -> None:
        """An operator of samfast's was called; a part of the operation around it is no new call."""
        name = operation(operator)
        if not self.inside or operation(self.inside[-1]) != name:
            self.entered[name] += 1

    def launch(self, name: str, times: int, size: int, flops: int) -> None:
        super().launch(name, times, size, flops)
        if name.startswith(OWN):  # an operator that is counted as one call
            self.enter(name)
        self._add(name, times, size, flops, 0)

    def sync(self, name: str) -> None:
        super().sync(name)
        self._add(name, 0, 0, 0, 1)

    def _add(self, name: str, times: int, size: int, flops: int, syncs: int) -> None:
        inside = operation(self.inside[-1]) if self.inside else None
        name = name if "::" in name else f"triton::{name}"
        node = torch._C._current_autograd_node()
        phase = "forward" if node is None else "backward"
        block = self.blocks.now
        if block is None and node is not None:
            block = self.blocks.of_sequence(node._sequence_nr())
        self.calls.append(Call(inside, name, phase, block, times, size, flops, syncs))


class Storages(Living):
    """Storages of a step by what they are for.

    base: bytes by category of what there was before, each storage once
    """

    def __init__(self, base: dict[str, list[Tensor]]):
        super().__init__([])
        self.base = dict.fromkeys(CATEGORIES, 0)
        # By when it was made, where it is not temporary; below 0 what was there before.
        self.category: dict[int, str] = {}
        self.names: set[str] = set()  # of all calls, views too
        self._before: dict[int, weakref.ref[Any]] = {}
        self._others = 0
        self._last: int | None = None  # of the events, once the step is over
        for category, tensors in base.items():
            for t in tensors:
                self._was_there(t.untyped_storage(), category)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func._schema.name)
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self._was_there(t.untyped_storage(), TEMPORARY)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _was_there(self, storage: torch.UntypedStorage, category: str) -> None:
        key = storage._cdata
        if key in self.alive or key in self.known:
            return
        self._others += 1
        which, size = -self._others, storage.nbytes()
        self.category[which] = category
        self.base[category] += size
        self.known.add(key)

        def ends(_: Any) -> None:
            self.known.discard(key)
            self.events.append((which, -size))

        self._before[key] = weakref.ref(storage, ends)

    def which(self, t: Tensor) -> int | None:
        """Number of the storage; None where the step has not made it."""
        found = self.alive.get(t.untyped_storage()._cdata)
        return None if found is None else found[0]

    def mark(self, tensors: Iterable[Tensor], category: str) -> None:
        for t in tensors:
            if (which := self.which(t)) is not None:
                self.category[which] = category

    def end(self) -> None:
        """What ends from now on is no part of the step."""
        self._last = len(self.events)

    def history(self) -> list[dict[str, int]]:
        """Bytes alive by category after each event, what there was before included."""
        now = dict(self.base)
        rows = [dict(now)]
        for which, size in self.events[: self._last]:
            now[self.category.get(which, TEMPORARY)] += size
            rows.append(dict(now))
        return rows


class CountedStep:
    """Enter it for one step. known: tensors by category that are there before.

    Programs under torch.compile run as they are written meanwhile.
    """

    def __init__(self, blocks: Blocks, known: dict[str, list[Tensor]]):
        self.blocks = blocks
        self.counts = Owned(blocks)
        self.storages = Storages(known)
        self.kept: dict[int, list[Any]] = {}  # by when it was made: row, block, size
        self._hooks = SavedHooks(self._save, self._read)
        self._stack = contextlib.ExitStack()
        self._top: TorchDispatchMode | None = None

    def __enter__(self) -> "CountedStep":
        with contextlib.ExitStack() as stack:
            if "torch._dynamo.eval_frame" in sys.modules:  # which would give up compiled code here
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self._hooks)
            stack.enter_context(self.storages)
            stack.enter_context(counting(counts=self.counts, run=Replay(self.counts)))
            self._top = torch.utils._python_dispatch._get_current_dispatch_mode()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self.storages.end()

    def is_innermost(self) -> bool:
        """Whether it can be left: nobody has entered another dispatch mode since."""
        return torch.utils._python_dispatch._get_current_dispatch_mode() is self._top

    def gradients(self, parameters: Iterable[Tensor]) -> None:
        """Note which storages are the gradients of these parameters."""
        self.storages.mark([p.grad for p in parameters if p.grad is not None], GRADIENTS)

    def saved(self) -> list[Kept]:
        return [Kept(*row) for row in self.kept.values()]

    def peak(self) -> dict[str, int]:
        """Bytes by category at the moment when the most were alive."""
        return max(self.storages.history(), key=lambda row: sum(row.values()))

    @property
    def hidden(self) -> set[str]:
        """Types of what the program's own hooks keep without a tensor that can be seen."""
        return self._hooks.hidden

    def _save(self, t: Tensor) -> int | None:
        which = self.storages.which(t)
        if which is not None and which not in self.kept:
            size = t.untyped_storage().nbytes()
            self.kept[which] = [UNREAD, self.blocks.now, size]
            self.storages.category.setdefault(which, SAVED)
        return which

    def _read(self, which: int | None) -> None:
        if which is not None and self.kept[which][0] == UNREAD:
            node = torch._C._current_autograd_node()
            if node is not None:
                self.kept[which][0] = row_of_node(node.name())
