# SPDX-License-Identifier: Apache-2.0
"""The middle map f of y = x Wᵀ + b + s · f(x Aᵀ) Bᵀ.

A map is a small frozen object without tensors. Operators take only strings and tensors, so a map
travels through them as its key: its class and arguments spelled out. The operator makes the map
again from that. Nothing has to run before, in this process or while a graph is traced.
"""

import ast
import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class MiddleMap(Protocol):
    """What the engine needs of a map. h is (tokens, r_in), z is (tokens, r_out).

    geometry: (N, H, W) and whatever else the map needs to see tokens as images; empty if it needs
    nothing. Tensors in ``saved`` are fresh: not z, not an input, and not views of one another.
    Some maps also make rows of z for padding, which are not tokens; others leave them empty.
    """

    zero_preserving: bool  # rows of zeros stay zero, so padding may be skipped
    saves: int  # number of tensors in ``saved``

    def forward(
        self, h: Tensor, geometry: Sequence[int], *params: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Returns z, aux (a scalar loss, or empty), z_pad and what the backward needs."""

    def backward(
        self,
        dz: Tensor,
        daux: Tensor | None,
        dz_pad: Tensor | None,
        saved: Sequence[Tensor],
        params: Sequence[Tensor],
        geometry: Sequence[int],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Returns dh and the gradients of params; needs says which of (h, *params) want one."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """f(h) = h, plain LoRA."""

    zero_preserving = True
    saves = 0

    def forward(self, h, geometry, *params):
        return h, no_aux(h), no_pads(h), []

    def backward(self, dz, daux, dz_pad, saved, params, geometry, needs):
        return dz, []


def no_aux(h: Tensor) -> Tensor:
    """The aux of a map that has none."""
    return h.new_empty(0, dtype=torch.float32)


def no_pads(h: Tensor) -> Tensor:
    """The z_pad of a map that has none."""
    return h.new_empty(0)


_kinds: dict[str, type] = {}


def register(kind: type) -> type:
    """Class decorator: maps of this class are found by ``key_of`` their name and arguments."""
    _kinds[kind.__name__] = kind
    return kind


def key_of(kind: str, *arguments) -> str:
    """The key of a map whose class takes these arguments, Python literals."""
    return f"{kind}{arguments!r}"


@functools.lru_cache(maxsize=256)
def find(key: str) -> MiddleMap:
    kind, bracket, arguments = key.partition("(")
    return _kinds[kind](*ast.literal_eval(bracket + arguments))


IDENTITY = key_of(register(Identity).__name__)
