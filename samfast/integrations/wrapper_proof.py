# SPDX-License-Identifier: Apache-2.0
"""Prove that a class with a wrapper's name computes what that wrapper does.

Programs copy such classes from each other and change them, so the name is only a hint. A wrapper's
mixin says what to compare, by class methods:

    reads                   attributes that the forward may read
    stamp(module)           hashable state that the next two depend on
    structure(module)       what the module has or lacks; None if it is built as expected
    sizes(module)           what the formula depends on
    stand_in(kind, sizes, generator)   a module of the class with layers of its own
    formula(sizes)          takes x and the stand-in's parameters by name
    small(sizes)            the same sizes with smaller layers
    width(sizes)            number of features of x

and by what a mixin may have; these stand for what it does not have:

    takes = "(self, x)"     the forward's signature
    stores = ()             attributes that the forward may set
    methods = ()            methods of the class that the forward may call
    codes(module)           (), code of classes inside that has to be plain too
    runs(sizes)             see ``Run``: modules and formulas to compare

Sentences here are the end of one that starts with the module: "has a child norm1, ...".
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from samfast.adapters.foreign import Foreign, cache
from samfast.adapters.stand_in import bare_kind
from samfast.integrations.plain_code import PlainCode
from samfast.integrations.probe import apart, deviation, difference
from samfast.integrations.swap import swapped

_LINEAR = PlainCode(nn.Linear, frozenset(("weight", "bias")))


class Wrapper(Protocol):
    """The class methods of a wrapper's mixin."""

    reads: ClassVar[tuple[str, ...]]

    @classmethod
    def stamp(cls, module: Foreign) -> tuple[Any, ...]: ...

    @classmethod
    def structure(cls, module: Foreign) -> str | None: ...

    @classmethod
    def sizes(cls, module: Foreign) -> Any: ...

    @classmethod
    def stand_in(
        cls, kind: type[nn.Module], sizes: Any, generator: torch.Generator
    ) -> nn.Module: ...

    @classmethod
    def formula(cls, sizes: Any) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]: ...

    @classmethod
    def small(cls, sizes: Any) -> Any: ...

    @classmethod
    def width(cls, sizes: Any) -> int: ...


class Run(NamedTuple):
    """One comparison: sizes of the module, its formula and what compares them on x of a shape."""

    sizes: Any
    formula: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    compare: Callable[[nn.Module, Callable[..., Tensor], Tensor], str | None]
    shape: tuple[int, ...]


_verdicts: dict[tuple[Any, ...], str | None] = {}


def problem(module: nn.Module, mixin: type[Wrapper]) -> str | None:
    """Say what differs in a module from its mixin, before or after the class is swapped.

    The answer is remembered while the class's code and the module's build stay the same. Otherwise
    it runs a probe on a CPU.
    """
    kind = stock_of(module)
    codes: list[int | str] = []
    inside = getattr(mixin, "codes", _no_codes)(module)
    for plain in (_plain(kind, mixin), _LINEAR, *inside):
        code, unclear = plain()
        codes.append(code if unclear is None else unclear)
    key = kind, mixin, tuple(codes), mixin.stamp(module)
    if key not in _verdicts:
        _verdicts[key] = _judgement(module, kind, mixin, codes)
    return _verdicts[key]


def _judgement(
    module: nn.Module, kind: type[nn.Module], mixin: type[Wrapper], codes: list[int | str]
) -> str | None:
    reason = mixin.structure(module) or _signature_problem(kind, mixin)
    if reason is not None:
        return reason
    for unclear in codes:
        if isinstance(unclear, str):
            return f"has code that a run may not tell all of: {unclear}"
    sizes = mixin.sizes(module)
    return apart(lambda: _probed(kind, mixin, sizes))


def own_problem(module: nn.Module) -> str | None:
    """Say the same about a module that is swapped already."""
    made_of = swapped(module)
    assert made_of is not None, type(module)
    return problem(module, made_of.mixin)


# torch.compile calls this while tracing, and does not trace it.
own_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it


def stock_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module has, or had before the swap."""
    made_of = swapped(module)
    return bare_kind(module) if made_of is None else made_of.stock


@cache
def _plain(kind: type[nn.Module], mixin: type[Wrapper]) -> PlainCode:
    stores, methods = (frozenset(getattr(mixin, name, ())) for name in ("stores", "methods"))
    return PlainCode(kind, frozenset(mixin.reads), True, stores, methods)


def _no_codes(module: nn.Module) -> tuple[PlainCode, ...]:
    return ()


def _signature_problem(kind: type[nn.Module], mixin: type[Wrapper]) -> str | None:
    found = inspect.signature(kind.forward, follow_wrapped=False).parameters.values()
    taken = str(inspect.Signature([p.replace(annotation=p.empty) for p in found]))
    wanted = getattr(mixin, "takes", "(self, x)")
    return None if taken == wanted else f"has a forward that takes {taken}, not {wanted}"


def _probed(kind: type[nn.Module], mixin: type[Wrapper], sizes: Any) -> str | None:
    """Run small modules in both modes with all gradients, then one of full size, on maps."""
    generator = torch.Generator("cpu").manual_seed(0)
    for run in getattr(mixin, "runs", functools.partial(_runs, mixin))(sizes):
        tested = mixin.stand_in(kind, run.sizes, generator)
        x = draw(generator, *run.shape, mixin.width(run.sizes))
        found = run.compare(tested, run.formula, x)
        if found is not None:
            return f"is not what its name says: {found}"
    return None


def _runs(mixin: type[Wrapper], sizes: Any) -> list[Run]:
    small = mixin.small(sizes)
    return [
        Run(small, mixin.formula(small), difference, (3, 6, 7)),
        Run(small, mixin.formula(small), deviation, (2, 3, 4)),
        Run(sizes, mixin.formula(sizes), deviation, (1, 5, 2)),
    ]


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw uniformly from -1 to 1."""
    return torch.empty(shape).uniform_(-1.0, 1.0, generator=generator)


def drawn_linear(
    generator: torch.Generator, inputs: int, outputs: int, bias: bool = False
) -> nn.Linear:
    """Make a linear layer with weights of its own."""
    layer = nn.Linear(1, 1, bias=bias)
    layer.in_features, layer.out_features = inputs, outputs
    layer.weight = nn.Parameter(draw(generator, outputs, inputs) * (3 / inputs) ** 0.5)
    if bias:
        layer.bias = nn.Parameter(0.3 * draw(generator, outputs))
    return layer
