# SPDX-License-Identifier: Apache-2.0
"""What a folder's cases.py says of its operators, for tests/kernels/test_operators.py."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import torch
from draws import DEVICE, drawing
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Kept = Callable[[Sequence[Tensor], frozenset[int]], tuple[int, int]]


def runnable_by(example) -> Callable[[str], str | None]:
    """For a folder's cases.py: None when a backend runs on the tests' device, or why it does not.

    example: of the operation, whose ``missing`` knows
    """

    def runnable(backend: str) -> str | None:
        return None if backend == "auto" else example.missing(backend, DEVICE, torch.float32)

    return runnable


@dataclasses.dataclass(frozen=True)
class Operation:
    """A call on small tensors that runs one operator, samfast::``name``.

    way: tells it from other calls of the same operator
    tensors: (dtype) -> the tensors that can want a gradient, those of activations first
    call: (tensors, backend) -> the results that have a gradient; "reference" is a backend too
    runnable, backends: which backends run here, and which there are
    kept: (tensors, wanted) -> the bytes kept for a backward with the gradients ``wanted``, by their
        places: of what was given (parameters aside) or is a result, and of what is made for it;
        None where a test of its own counts them
    activations: how many of the tensors are not parameters
    apart: places whose gradients cost something, and nothing where nobody wants any of them; each
        by itself where None
    autocast: what it makes narrow: the "result", its "products" or ""
    """

    name: str
    way: str
    tensors: Callable[[torch.dtype], list[Tensor]]
    call: Callable[[Sequence[Tensor], str], Sequence[Tensor]]
    runnable: Callable[[str], str | None]
    backends: tuple[str, ...] = ("torch",)
    kept: Kept | None = None
    activations: int = 1
    apart: tuple[tuple[int, ...], ...] | None = None
    autocast: str = ""

    @property
    def id(self) -> str:
        return self.name + (f"-{self.way}" if self.way else "")

    def leaves(self, dtype=torch.float32, wanted: Iterable[int] | None = None) -> list[Tensor]:
        """The tensors, those at the places ``wanted`` (or all) with a gradient."""
        tensors = [t.detach() for t in self.tensors(dtype)]
        wanted = range(len(tensors)) if wanted is None else set(wanted)
        return [t.requires_grad_(i in wanted) for i, t in enumerate(tensors)]

    def results(self, tensors, backend) -> tuple[Tensor, ...]:
        """The same in every call: a seed that is drawn is drawn from the same state."""
        torch.manual_seed(3)
        return tuple(self.call(tensors, backend))

    def run(self, tensors, backend, incoming=None) -> list[Tensor]:
        """Results and the gradients of the tensors that want one."""
        made = self.results(tensors, backend)
        wanted = [t for t in tensors if t.requires_grad]
        incoming = gradients_for(made) if incoming is None else incoming
        incoming = [g.to(t.dtype) for g, t in zip(incoming, made, strict=True)]
        grads = torch.autograd.grad(
            made, wanted, incoming, allow_unused=True, materialize_grads=True
        )
        return [*(t.detach() for t in made), *grads]


def gradients_for(results) -> list[Tensor]:
    draw = drawing(9)
    return [draw(*t.shape).to(t.dtype) for t in results]


def subsets(count: int) -> list[tuple[int, ...]]:
    """Of the places of ``count`` tensors: every one, or of many all, each and each pair."""
    sizes = range(1, count + 1) if count <= 6 else (1, *([2] if count <= 10 else []), count)
    return [which for size in sizes for which in combinations(range(count), size)]


def few_subsets(count: int) -> list[tuple[int, ...]]:
    """All, and each by itself; of very many only the first, and all others."""
    alone = range(count) if count <= 10 else [0]
    every = tuple(range(count))
    return [every, *((i,) for i in alone), *([every[1:]] if count > 10 else [])]


class Calls(TorchDispatchMode):
    """The operators of samfast that run inside, below autograd, with their arguments."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "samfast":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))

    def of(self, name: str):
        """The operator of that name and its arguments, or None; the last of several."""
        found = [made for made in self.made if made[0]._schema.name == f"samfast::{name}"]
        return found[-1] if found else None


class PublicCalls(TorchFunctionMode):
    """The same above autograd, with tensors that want gradients."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverloadPacket) and not kwargs:
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))

    def of(self, name: str):
        return next(made for made in self.made if made[0]._qualified_op_name == f"samfast::{name}")


def calls(operation, backend, wanted=None, layout=lambda t: t, incoming=lambda t: t):
    """The inner operators that one forward and backward run."""
    tensors = [layout(t) for t in operation.leaves()]
    tensors = of_wanted(tensors, wanted)
    with Calls() as found:
        made = operation.results(tensors, backend)
        given = [incoming(g) for g in gradients_for(made)]
        torch.autograd.grad(made, [t for t in tensors if t.requires_grad], given, allow_unused=True)
    return found


def of_wanted(tensors, wanted):
    """The same in memory, and those that are wanted with a gradient."""
    wanted = range(len(tensors)) if wanted is None else wanted
    return [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
