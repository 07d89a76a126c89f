# SPDX-License-Identifier: Apache-2.0
"""What the rows of a profile are called: samfast's operations by their names, the rest by aten's.

A call inside one of samfast's operations belongs to it, but for products, which have own rows.
"""

import functools
import re

from torch.utils.flop_counter import flop_registry

from samfast.kernels._common.implementation import IMPLEMENTATIONS

GAP = "host gap"
AUTOGRAD = "autograd engine"
UNREAD = "saved, never read"
OWN, NATIVE = "samfast::", "samfast_native::"
_WAY = re.compile(r"_(forward|backward)$")


def operation(name: str) -> str:
    """``samfast::sam_block_forward`` is part of ``samfast::sam_block``."""
    return _WAY.sub("", name)


@functools.cache
def is_product(name: str) -> bool:
    """Whether torch has a FLOP formula for an aten operator, in place or not."""
    return name.startswith("aten::") and name.removeprefix("aten::").rstrip("_") in _products()


@functools.cache
def _products() -> frozenset[str]:
    names = (str(packet).partition(".") for packet in flop_registry)
    return frozenset(name for space, _, name in names if space == "aten")


def row_of_call(inside: str | None, name: str, timed: set[tuple[str | None, str]]) -> str:
    """The row of a call that was counted.

    inside: samfast's operation around it
    timed: (operation around it, product) of products that were timed as often as counted; others,
        of another path than the one that ran, belong to the operation
    """
    if name.startswith(OWN):
        return operation(name)
    if inside is None:
        return name
    return name if is_product(name) and (inside, name) in timed else inside


def row_of_node(name: str) -> str:
    """The row of what an autograd node saved, from its name: ``AddmmBackward0`` is ``aten::addmm``,
    ``SamBlockFunctionBackward`` is ``samfast::sam_block``."""
    base = re.sub(r"Backward\d*$", "", name)
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", base.removesuffix("Function")).lower()
    if f"{OWN}{snake}" in IMPLEMENTATIONS:
        return f"{OWN}{snake}"
    if name != base and re.search(r"Backward\d+$", name):
        return f"aten::{snake}"
    return base
