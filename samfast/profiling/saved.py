# SPDX-License-Identifier: Apache-2.0
"""What autograd saves for the backward, seen through hooks, also where a program has its own.

Of several pairs of hooks torch calls only the last one. So the program's pairs are wrapped while
this is entered: what they keep in place of a tensor is what counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_hooks = torch._C._autograd
_PUSH, _POP = "_push_saved_tensors_default_hooks", "_pop_saved_tensors_default_hooks"
# Recomputes what it drops; what its hooks return holds no tensor, or one of the backward.
_CHECKPOINT = "torch.utils.checkpoint"
Pair = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class _Packed(NamedTuple):
    content: Any  # of the program's hook, or the tensor
    noted: tuple[Any, ...]  # what ``note`` returned of each tensor


class SavedHooks:
    """Enter it to be told of every tensor that is kept for the backward.

    note: called with each of these; returns what ``read`` is called with when they are read
    hidden: what hooks of the program's return where no tensor is seen in it, by its type
    """

    def __init__(self, note: Callable[[Tensor], Any], read: Callable[[Any], None]):
        self._note, self._read = note, read
        self.hidden: set[str] = set()
        self._inner: list[Pair] = []  # entered since, as they are
        self._push, self._pop = getattr(_hooks, _PUSH), getattr(_hooks, _POP)

    def __enter__(self) -> "SavedHooks":
        self._begin()
        # Not methods of torch's class: a ``with`` that is open has got its own already.
        setattr(_hooks, _PUSH, self._entered)
        setattr(_hooks, _POP, self._left)
        return self

    def __exit__(self, *error: object) -> None:
        setattr(_hooks, _PUSH, self._push)
        setattr(_hooks, _POP, self._pop)
        for _ in range(len(self._inner) + 1):
            self._pop()
        for pair in self._inner:  # still open, as where an optimizer steps inside
            self._push(*pair)
        self._inner.clear()

    def _begin(self) -> None:
        """Put ours above the program's pair that holds, if there is one."""
        outer = _hooks._top_saved_tensors_default_hooks(False)
        self._push(*(self._wrapped(*outer) if outer else (self._pack, self._unpack)))

    def _entered(self, pack: Callable, unpack: Callable) -> None:
        recomputes = getattr(pack, "__module__", None) == _CHECKPOINT
        self._push(*((pack, unpack) if recomputes else self._wrapped(pack, unpack)))
        self._inner.append((pack, unpack))

    def _left(self) -> None:
        self._pop()
        if self._inner:
            self._inner.pop()
        else:  # one from before, which lies under ours
            self._pop()
            self._begin()

    def _pack(self, t: Tensor) -> _Packed:
        return _Packed(t, (self._note(t),))

    def _unpack(self, packed: _Packed) -> Tensor:
        for noted in packed.noted:
            self._read(noted)
        return packed.content

    def _wrapped(self, pack: Callable, unpack: Callable) -> Pair:
        def packing(t: Tensor) -> _Packed:
            content = pack(t)
            tensors = [x for x in tree_leaves(content) if isinstance(x, Tensor)]
            if not tensors:
                self.hidden.add(type(content).__name__)
            return _Packed(content, tuple(map(self._note, tensors)))

        return packing, lambda packed: unpack(self._unpack(packed))
