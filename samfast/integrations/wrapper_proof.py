# SPDX-License-Identifier: Apache-2.0
"""Whether a class that bears a wrapper's name computes what that wrapper does.

Such classes are copied from program to program and changed there, so the name is only a hint. A
wrapper's mixin says what is to be compared, by class methods:

    reads                   attributes that the forward may read
    stamp(module)           what the next two depend on, hashable
    structure(module)       what the module has or lacks, None where it is built as it should be
    sizes(module)           what the formula depends on
    stand_in(kind, sizes, generator)   a module of the class with layers of its own
    formula(sizes)          takes x and the stand-in's parameters by name
    small(sizes)            the same sizes but for smaller layers
    width(sizes)            features of x

Sentences are the rest of one that begins with the module: "has a child norm1, ...".
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from samfast.adapters.foreign import Foreign, cache
from samfast.integrations.plain_code import PlainCode
from samfast.integrations.probe import apart, deviation, difference
from samfast.integrations.swap import swapped

_LINEAR = PlainCode(nn.Linear, frozenset(("weight", "bias")))


class Wrapper(Protocol):
    """What a wrapper's mixin says of itself."""

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


_verdicts: dict[tuple[Any, ...], str | None] = {}


def problem(module: nn.Module, mixin: type[Wrapper]) -> str | None:
    """What is not as the mixin has it in a module, of the class found or swapped already.

    Answers from memory while the class's code and the module's build stay as they are, and
    otherwise runs a probe on a CPU.
    """
    kind = stock_of(module)
    codes: list[int | str] = []
    for plain in (_plain(kind, mixin), _LINEAR):
        code, unclear = plain()
        codes.append(code if unclear is None else unclear)
    key = kind, mixin, tuple(codes), mixin.stamp(module)
    if key not in _verdicts:
        _verdicts[key] = _judgement(module, kind, mixin, codes)
    return _verdicts[key]


def _judgement(
    module: nn.Module, kind: type[nn.Module], mixin: type[Wrapper], codes: list[int | str]
) -> str | None:
    reason = mixin.structure(module) or _signature_problem(kind)
    if reason is not None:
        return reason
    for unclear in codes:
        if isinstance(unclear, str):
            return f"has code that a run may not tell all of: {unclear}"
    sizes = mixin.sizes(module)
    return apart(lambda: _probed(kind, mixin, sizes))


def own_problem(module: nn.Module) -> str | None:
    """The same of a module that is swapped already."""
    made_of = swapped(module)
    assert made_of is not None, type(module)
    return problem(module, made_of.mixin)


# What torch.compile calls while it traces, rather than trace it.
own_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it


def stock_of(module: nn.Module) -> type[nn.Module]:
    """The class that the module has, or had before it was swapped."""
    made_of = swapped(module)
    return type(module) if made_of is None else made_of.stock


@cache
def _plain(kind: type[nn.Module], mixin: type[Wrapper]) -> PlainCode:
    return PlainCode(kind, frozenset(mixin.reads), writes=True)


def _signature_problem(kind: type[nn.Module]) -> str | None:
    found = inspect.signature(kind.forward, follow_wrapped=False).parameters.values()
    taken = str(inspect.Signature([p.replace(annotation=p.empty) for p in found]))
    return None if taken == "(self, x)" else f"has a forward that takes {taken}, not (self, x)"


def _probed(kind: type[nn.Module], mixin: type[Wrapper], sizes: Any) -> str | None:
    """A small module in both modes with all gradients, then one of the same sizes, on maps."""
    generator = torch.Generator("cpu").manual_seed(0)
    small = mixin.small(sizes)
    cases = (small, difference, (3, 6, 7)), (sizes, deviation, (1, 5, 2))
    for given, compare, shape in cases:
        tested = mixin.stand_in(kind, given, generator)
        x = draw(generator, *shape, mixin.width(given))
        found = compare(tested, mixin.formula(given), x)
        if found is not None:
            return f"is not what its name says: {found}"
    return None


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in -1 to 1."""
    return torch.empty(shape).uniform_(-1.0, 1.0, generator=generator)


def drawn_linear(
    generator: torch.Generator, inputs: int, outputs: int, bias: bool = False
) -> nn.Linear:
    """A linear layer with weights of its own."""
    layer = nn.Linear(1, 1, bias=bias)
    layer.in_features, layer.out_features = inputs, outputs
    layer.weight = nn.Parameter(draw(generator, outputs, inputs) * (3 / inputs) ** 0.5)
    if bias:
        layer.bias = nn.Parameter(0.3 * draw(generator, outputs))
    return layer
