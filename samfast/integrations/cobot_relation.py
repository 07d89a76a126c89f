# SPDX-License-Identifier: Apache-2.0
"""Check and read what SAM-COBOT's layers share: coefficients of all blocks, quaternion heads.

FacT_c (1, V, S) and FacT_p (S, S) are the same Parameters in all layers of a model. Each layer
folds its own slices, so their gradients add up by themselves.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from samfast.adapters.block_layer import foreign_tensor
from samfast.adapters.foreign import Foreign, cache
from samfast.integrations.linears import (
    held_problem,
    hook_problem,
    number_problem,
    shape_problem,
)
from samfast.integrations.plain_code import PlainCode
from samfast.integrations.probe import shell
from samfast.kernels._common.autocast import autocast_dtype

RELATION = ("FacT_c", "FacT_p", "gamma")
QUARTERS = tuple(f"{letter}_weight" for letter in "rijk")
_SIZES = ("in_features", "out_features")  # numbers that a head may read
_IN_HEADS = (
    *QUARTERS,
    *_SIZES,
    *("bias", "addmm", "apply", "needs_input_grad", "narrow", "saved_tensors"),
    *("save_for_backward", "sum", "t"),
)


class Head(NamedTuple):
    """A class of quaternion layers and the numbers that a layer of it has."""

    kind: type[nn.Module]
    numbers: tuple[int | None, ...]


def head_of(head: nn.Module) -> Head:
    """Return the class and the numbers of a head."""
    return Head(type(head), tuple(vars(head).get(name) for name in _SIZES))


def head_stamp(head: nn.Module | None) -> tuple[Any, ...]:
    """Return a mark that differs between builds of a head."""
    if head is None:
        return ()
    shapes = tuple((n, None if p is None else p.shape) for n, p in head._parameters.items())
    own = "bias" in vars(head), tuple(head._modules), tuple(head._buffers)
    return (*head_of(head), shapes, *own)


def head_problem(name: str, head: nn.Module, width: int) -> str | None:
    """Say why the head is not a quaternion layer of that width without a bias."""
    if (reason := held_problem(head, (), QUARTERS)) is not None:
        return f"has a {name} that {reason}"
    if "bias" in vars(head):
        return f"has a {name} with a bias that is not a parameter"
    quarter = (width // 4, width // 4)
    weights = {f"{name}.{part}": (head._parameters.get(part), quarter) for part in QUARTERS}
    reason = shape_problem(weights)
    for number, value in zip(_SIZES, head_of(head).numbers, strict=True):
        if value is not None:
            reason = reason or number_problem(number, value)
    return reason


def relation_problem(module: Foreign, width: int, slices: int) -> str | None:
    """Say why the coefficients do not fit a layer with that many slices of that width."""
    c, p, gamma = (module._parameters.get(name) for name in RELATION)
    if width % 4 or width == 0:
        return f"has a bottleneck of {width}, which four does not divide"
    count = 0 if p is None else p.shape[0]
    shapes = {
        "FacT_c": (c, (1, width, count)),
        "FacT_p": (p, (count, count)),
        "gamma": (gamma, (slices * width,)),
    }
    if (reason := shape_problem(shapes)) is not None:
        return reason
    idx = vars(module).get("idx")
    if type(idx) is not int or not 0 <= idx <= count - slices:
        return f"has the index {idx!r}, while FacT_p has {count} slices"
    return None


@cache
def code_of(kind: type[nn.Module]) -> PlainCode:
    """Return the code of a class of heads."""
    return PlainCode(kind, frozenset(_IN_HEADS))


def drawn_head(head: Head, width: int, draw: Any) -> nn.Module:
    """Make a head of the class with weights of its own; draw: takes a shape."""
    quarter = width // 4
    parts = {name: nn.Parameter(draw(quarter, quarter)) for name in QUARTERS}
    numbers = dict(zip(_SIZES, head.numbers, strict=True))
    made = shell(head.kind, {n: v for n, v in numbers.items() if v is not None}, **parts)
    made.register_parameter("bias", None)
    return made


def quarters_of(heads: Iterable[Foreign]) -> Tensor:
    """Return the quarters as (heads, 4, V/4, V/4)."""
    quarters = [getattr(head, quarter) for head in heads for quarter in QUARTERS]
    return torch.stack(quarters).unflatten(0, (-1, 4))


def now_problem_of(tensors: dict[str, Tensor], parts: dict[str, Foreign]) -> str | None:
    """Say which of the tensors and parts prevents fusing now."""
    if (reason := hook_problem(parts)) is not None:
        return reason
    if any("_is_replica" in vars(part) for part in parts.values()):
        return "is a replica of nn.DataParallel; use DistributedDataParallel to fuse it"
    for name, tensor in tensors.items():
        if foreign_tensor(tensor):
            return f"has a weight in {name} that is a {type(tensor).__name__}"
    dtypes = {tensor.dtype for tensor in tensors.values()}
    device = next(iter(tensors.values())).device.type
    if len(dtypes) == 1 or (autocast_dtype(device) is not None and torch.float64 not in dtypes):
        return None
    names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"has layers of {' and '.join(names)}"
