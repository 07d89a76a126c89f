# SPDX-License-Identifier: Apache-2.0
"""What autograd saves for the backward, seen through hooks, also where a program has its own.

Of several pairs of hooks torch calls only the last one. So the program's pairs are wrapped while
this is entered: what they keep in place of a tensor is what counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

_hooks = torch._C._autograd
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
        self._outer: Pair | None = None  # of the program, from before
        self._inner: list[Pair] = []  # entered since, as they are
        self._enter, self._exit = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__

    def __enter__(self) -> "SavedHooks":
        ours = self

        def enter(hooks: saved_tensors_hooks) -> None:
            pair = hooks.pack_hook, hooks.unpack_hook
            own = type(hooks).__module__ == _CHECKPOINT
            _hooks._push_saved_tensors_default_hooks(*(pair if own else ours._wrapped(*pair)))
            ours._inner.append(pair)

        def leave(hooks: saved_tensors_hooks, *error: object) -> None:
            _hooks._pop_saved_tensors_default_hooks()
            if ours._inner:
                ours._inner.pop()
            else:  # one from before, which lies under ours
                _hooks._pop_saved_tensors_default_hooks()
                ours._push()

        self._push()
        saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__ = enter, leave
        return self

    def __exit__(self, *error: object) -> None:
        saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__ = self._enter, self._exit
        for _ in range(len(self._inner) + 1):
            _hooks._pop_saved_tensors_default_hooks()
        for pair in self._inner:  # still open, as where an optimizer steps inside
            _hooks._push_saved_tensors_default_hooks(*pair)
        self._inner.clear()

    def _push(self) -> None:
        self._outer = _hooks._top_saved_tensors_default_hooks(False)
        pair = self._wrapped(*self._outer) if self._outer else (self._pack, self._unpack)
        _hooks._push_saved_tensors_default_hooks(*pair)

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
