# SPDX-License-Identifier: Apache-2.0
"""Remember what a block's forward found out about itself, while its state stays the same.

A forward asks a block, its parts and its adapters about a hundred questions, with the same answers
from step to step. This file watches the state behind the answers instead: attributes, children,
Parameters and hooks by identity, the code of the stock classes, precision and backend. Parts whose
answers depend on more are asked each time.
"""

import operator
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from samfast.adapters.block_layer import BlockLayer, layer_problem
from samfast.backends import BACKEND, requested
from samfast.kernels._common.autocast import autocast_dtype
from samfast.kernels._common.planned import guard
from samfast.kernels._common.windows import Windows
from samfast.kernels.sam_block.plan import LayerPlan, Plan

# Attributes of torch's modules that are checked in detail, or that no forward reads.
_HOOKS = operator.itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_OF_TORCH = frozenset(
    "_modules _parameters _buffers _forward_hooks _forward_pre_hooks _backward_hooks "
    "_backward_pre_hooks _forward_hooks_with_kwargs _forward_hooks_always_called "
    "_forward_pre_hooks_with_kwargs _non_persistent_buffers_set _state_dict_hooks "
    "_state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks".split()
)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
State = tuple[Any, ...]
MOST = 4  # kinds of forwards per block, such as two sizes with and without gradients
# Misses in a row after which only one forward in this many is remembered, such as under FSDP, which
# gives a block new Parameters at each forward.
MOST_MISSES, SELDOM = 16, 256
_remembered: weakref.WeakKeyDictionary[nn.Module, "Remembered"] = weakref.WeakKeyDictionary()


class Remembered:
    """The answers of one block. They keep neither the block nor a Parameter alive."""

    @classmethod
    def of(cls, block: nn.Module) -> "Remembered | None":
        """Return the block's answers, new if it has none; None for a replica, which runs once."""
        found = _remembered.get(block)
        if found is None and "_is_replica" not in vars(block):
            found = _remembered[block] = cls()
        return found

    def __init__(self) -> None:
        self.answers: tuple[Answers, ...] = ()
        self.misses = 0

    def latest(self, block: nn.Module, x: Tensor) -> "tuple[Answers, list[Tensor | None]] | None":
        """Return what is known for a forward on x, and the tensors of its node."""
        if torch._C._get_tracing_state() is not None:
            return None  # the full questions refuse a tracer
        state = _state(x)
        for answers in self.answers:
            if answers.state == state:
                tensors = answers.hold(block)
                if tensors is not None:
                    self.misses = 0
                    return answers, tensors
        return None

    def keep(self, block: nn.Module, x: Tensor, *found: Any) -> None:
        """Remember a forward, see ``Answers.of``."""
        self.misses += 1
        if self.misses <= MOST_MISSES or self.misses % SELDOM == 0:
            state = _state(x)
            new = Answers.of(block, state, *found)
            others = [a for a in self.answers if a.state != state]
            self.answers = (*(() if new is None else (new,)), *others[: MOST - 1])


def forget() -> None:
    """Forget the answers of all blocks."""
    _remembered.clear()


class Answers:
    """The answers of one forward that ran as one node.

    state: what they depend on in addition to the block   key, numbers, backend: of the node's call
    """

    @classmethod
    def of(
        cls, block: nn.Module, state: State, same_code: Callable[[], bool], plan: Plan,
        tensors: Sequence[Tensor | None], layers: dict[str, nn.Module],
    ) -> "Answers | None":  # fmt: skip
        """Make the answers; return None if they may depend on unwatched state.

        same_code: says if the stock classes' code is unchanged   tensors: as the node took them
        layers: by their place in the node
        """
        # A plain tensor in place of a Parameter may have a graph, as with functional_call.
        parameters = (t for module in block.modules() for t in module._parameters.values())
        own = {id(t) for t in parameters if type(t) is nn.Parameter}
        head, parts = plan.split(tensors)
        if plan.side is not None or plan.drops or not own.issuperset(map(id, head)):
            return None
        if not all(isinstance(layer, nn.Module) for layer in layers.values()):
            return None  # a wrapper computes it anew at each call
        asked = {
            name: layer
            for name, layer in layers.items()
            if not (type(layer) is nn.Linear or _watched(layer))
            or any(t is not None and id(t) not in own for t in parts[name])
        }
        own_state = [m for layer in asked.values() for m in layer.modules()]
        watched = Watched.of(block, own_state)
        if watched is None:
            return None
        return cls(block, watched, asked, state, same_code, plan, tensors, parts)

    def __init__(
        self, block: nn.Module, watched: "Watched", asked: dict[str, nn.Module], state: State,
        same_code: Callable[[], bool], plan: Plan, tensors: Sequence[Tensor | None],
        parts: dict[str, Any],
    ):  # fmt: skip
        self.state, self.same_code, self.watched = state, same_code, watched
        self.key, self.numbers, self.backend = plan.key, plan.numbers, requested("auto")
        self.asked: list[tuple[str, weakref.ref[Any], LayerPlan, int, int]] = []
        start = len(plan.split(tensors)[0])
        self.tensors = list(tensors)
        for name, of_layer in zip(plan.names, plan.layers, strict=True):
            stop = start + len(parts[name])
            if name in asked:
                self.asked.append((name, weakref.ref(asked[name]), of_layer, start, stop))
                self.tensors[start:stop] = [None] * (stop - start)
            start = stop
        at = {id(t): (store, name) for t, store, name in watched.tensors(block)}
        kept = [t for t in self.tensors if t is not None]
        self.places = [(i, *at[id(t)]) for i, t in enumerate(self.tensors) if t is not None]
        self.tensors = [None] * len(self.tensors)
        self.alike = guard(kept) if len({*map(id, kept)}) == len(kept) else lambda *_: False

    def hold(self, block: nn.Module) -> list[Tensor | None] | None:
        """Return the node's tensors if nothing that the answers depend on has changed."""
        stores = self.watched.same(block)
        if stores is None or not self.same_code():
            return None
        tensors = self.tensors.copy()
        for i, store, name in self.places:
            tensors[i] = stores[store][name]
        return tensors if self.alike(*[tensors[i] for i, *_ in self.places]) else None

    def shares(
        self, tensors: list[Tensor | None], like: Tensor, windows: Mapping[str, Windows]
    ) -> dict[str, BlockLayer] | None:
        """Ask what is asked each time and fill the tensors; None if an answer differs.

        windows: of each layer
        """
        found = {}
        for name, ref, plan, start, stop in self.asked:
            layer = ref()
            if layer is None or layer_problem(name, layer) is not None:
                return None
            share = found[name] = layer.block_layer(like, windows[name])
            if share.plan != plan:
                return None
            tensors[start:stop] = share.tensors
        return found


def _watched(layer: nn.Module) -> bool:
    """True if a layer says that its answers depend only on its own state."""
    return getattr(layer, "block_watched", False) and type(layer).__module__.startswith("samfast.")


def _state(x: Tensor) -> State:
    """Return what else the answers depend on."""
    return (
        x.shape[1:], x.dtype, x.device, os.environ.get(BACKEND), autocast_dtype(x.device.type),
        torch.is_grad_enabled(),
    )  # fmt: skip


class Watched:
    """The state of a block's modules: classes, numbers, children, hooks and tensors.

    It keeps only the numbers alive.
    """

    @classmethod
    def of(cls, block: nn.Module, but: Sequence[nn.Module]) -> "Watched | None":
        """Watch the modules; return None if one outside ``but`` cannot be watched."""
        left = {id(m) for m in but}
        modules = [m for m in block.modules() if id(m) not in left]
        for module in modules:
            for name, value in vars(module).items():
                if name not in _OF_TORCH and not _is_plain(value):
                    return None
        return cls(modules)

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = [weakref.ref(m) for m in modules[1:]]  # the first is the block
        self.kinds = [*map(type, modules)]
        dicts = [*map(vars, modules)]
        self.lengths = [*map(len, dicts)]
        names = [[name for name in d if name not in _OF_TORCH] for d in dicts]
        self.picks = [operator.itemgetter(*own) for own in names]  # torch gives at least two
        self.numbers = [d[name] for d, own in zip(dicts, names, strict=True) for name in own]
        self.children = [_weak(m) for d in dicts for m in d["_modules"].values()]
        stores = _stores(dicts)
        self.sizes = [*map(len, stores)]
        self.absent = [t is None for store in stores for t in store.values()]

    def tensors(self, block: nn.Module) -> list[tuple[Tensor, int, str]]:
        """List each tensor with its place: the dict, of those that ``same`` gives, and the name."""
        stores = _stores([vars(m) for m in (block, *_alive(self.modules))])
        return [(t, k, n) for k, d in enumerate(stores) for n, t in d.items() if t is not None]

    def same(self, block: nn.Module) -> list[dict[str, Tensor | None]] | None:
        """Return the modules' Parameters and buffers if nothing has changed, else None.

        It uses Python's built-in loops, because ten modules have two hundred attributes.
        """
        modules = [block, *_alive(self.modules)]
        if [*map(type, modules)] != self.kinds:  # also differs if one is gone
            return None
        dicts = [*map(vars, modules)]
        if [*map(len, dicts)] != self.lengths:
            return None
        try:
            found = [pick(d) for pick, d in zip(self.picks, dicts, strict=True)]
        except KeyError:
            return None
        if not all(map(operator.is_, chain.from_iterable(found), self.numbers)):
            return None
        if any(chain.from_iterable(map(_HOOKS, dicts))):
            return None
        children = [m for d in dicts for m in d["_modules"].values()]
        if len(children) != len(self.children):
            return None
        if not all(map(operator.is_, children, _alive(self.children))):
            return None
        stores = _stores(dicts)
        if [*map(len, stores)] != self.sizes:
            return None
        if [t is None for store in stores for t in store.values()] != self.absent:
            return None
        return stores


def _stores(dicts: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor | None]]:
    return [*[d["_parameters"] for d in dicts], *[d["_buffers"] for d in dicts]]


def _is_plain(value: object) -> bool:
    """True if a value cannot change while it is the same object."""
    return isinstance(value, _PLAIN) or (type(value) is tuple and all(map(_is_plain, value)))


def _weak(value: Any) -> weakref.ref[Any] | None:
    return None if value is None else weakref.ref(value)


def _alive(refs: Sequence[weakref.ref[Any] | None]) -> list[Any]:
    """Return the referenced object; None if there was none or it is gone."""
    return [None if ref is None else ref() for ref in refs]
