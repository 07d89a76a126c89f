# SPDX-License-Identifier: Apache-2.0
"""Track which block of the model runs, by hooks that torch calls for all modules.

Such hooks leave fused blocks fused. A block is a transformer block, or another part, such as the
neck. Its backward is known by the sequence numbers of the nodes its forward made.
"""

import bisect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.nn.modules import module as hooks_of_torch
from torch.utils.hooks import RemovableHandle

from samfast.fused.fuse import block_states

RANGE = "samfast/block/"
# Of a step: by a module's id, the shapes of its inputs and how often it was called with them.
Shapes = dict[int, Counter[tuple]]


def blocks_of(model: nn.Module) -> dict[int, str]:
    """id of a module: its name, for every block and every part with parameters beside blocks; for
    the model's children where it has no block."""
    named = dict(model.named_modules())
    blocks = [name for name in block_states(model) if name]
    above = {part for name in blocks for part in _above(name)}
    beside = [
        name
        for name, m in named.items()
        if name
        and name not in above
        and name.rpartition(".")[0] in above
        and name not in blocks
        and next(m.parameters(), None) is not None
    ]
    if not blocks:
        return {
            id(m): name
            for name, m in model.named_children()
            if next(m.parameters(), None) is not None
        }
    # A part may be run without its own forward, so that its modules stand for it.
    found = {id(m): name for name in beside for m in named[name].modules()}
    return found | {id(named[name]): name for name in blocks}


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def difference(counted: Shapes, timed: Shapes, named: Callable[[int], str]) -> str | None:
    """Name the first module that got inputs of other shapes in as many calls.

    Other numbers of calls show in the operations. Nor do modules count that only one of both steps
    called: torch.compile runs a model without calling those inside.
    """
    for key, here in timed.items():
        there = counted.get(key, here)
        if here != there and here.total() == there.total():
            other, usual = (next(iter(shapes)) for shapes in (here - there, there - here))
            return f"{named(key)} gets {_sizes(other)}, counted with {_sizes(usual)}"
    return None


def _sizes(shapes: tuple) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes) or "no tensor"


class Blocks:
    """Enter it to follow the blocks of a model, or of every model that is called inside.

    roots: the models that were seen
    shapes: of the inputs of every module that was called; whoever reads it empties it
    """

    def __init__(self, model: nn.Module | None = None):
        self.roots: dict[int, nn.Module] = {}
        self.shapes: Shapes = {}
        self._names: dict[int, str] = {}
        self._stack: list[
            tuple[int, str, Any, int]
        ] = []  # (module's id, name, range, sequence number) of those inside
        self._depth = 0
        self.device: torch.device | None = None  # of the last model that was called
        self.dtype: torch.dtype | None = None  # of its products
        self._starts: list[int] = []
        self._spans: list[tuple[int, str]] = []  # end, name
        self._hooks: list[RemovableHandle] = []
        self._quiet = warnings.catch_warnings()
        if model is not None:
            self._take(model)

    def __enter__(self) -> "Blocks":
        self._quiet.__enter__()
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are gl")
        self._hooks = [
            hooks_of_torch.register_module_forward_pre_hook(self._before),
            hooks_of_torch.register_module_forward_hook(self._after, always_call=True),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._stack.clear()
        self._quiet.__exit__(*error)

    @property
    def now(self) -> str | None:
        """The block whose forward runs."""
        return self._stack[-1][1] if self._stack else None

    def of_sequence(self, number: int) -> str | None:
        """The block whose forward made the node of this sequence number."""
        at = bisect.bisect_right(self._starts, number) - 1
        if at < 0 or number >= self._spans[at][0]:
            return None
        return self._spans[at][1]

    def named(self, key: int) -> str:
        """What to call the module of this id."""
        for root in self.roots.values():
            for name, module in root.named_modules():
                if id(module) == key:
                    return name or type(root).__name__
        return "a module"

    def _take(self, model: nn.Module) -> None:
        self.roots[id(model)] = model  # kept, so that no other module gets its id
        self._names.update(blocks_of(model))

    def _look(self, module: nn.Module) -> None:
        """Where it runs, and in which dtype."""
        first = next((p for p in module.parameters() if p.is_floating_point()), None)
        if first is not None or self.device is None:
            device = self.device = torch.device("cpu") if first is None else first.device
            lower = torch.is_autocast_enabled(device.type)
            own = torch.float32 if first is None else first.dtype
            self.dtype = torch.get_autocast_dtype(device.type) if lower else own

    def _before(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._depth == 0:
            if id(module) not in self._names and id(module) not in self.roots:
                self._take(module)
            self._look(module)
        elif self.dtype == torch.float32 and self.device is not None:
            if torch.is_autocast_enabled(self.device.type):
                self.dtype = torch.get_autocast_dtype(self.device.type)
        self._depth += 1
        sizes = tuple([t.shape for t in inputs if isinstance(t, Tensor)])
        self.shapes.setdefault(id(module), Counter())[sizes] += 1
        name = self._names.get(id(module))
        if name is not None and name != self.now:
            entered = record_function(RANGE + name)
            entered.__enter__()
            self._stack.append((id(module), name, entered, torch.autograd._get_sequence_nr()))

    def _after(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth = max(0, self._depth - 1)
        if not self._stack or self._stack[-1][0] != id(module):
            return
        _, name, entered, start = self._stack.pop()
        entered.__exit__(None, None, None)
        end = torch.autograd._get_sequence_nr()
        if end > start and (not self._starts or start >= self._starts[-1]):
            self._starts.append(start)
            self._spans.append((end, name))
