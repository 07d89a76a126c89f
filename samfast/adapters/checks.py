# SPDX-License-Identifier: Apache-2.0
"""Checks of options that methods and layers share. Nothing here imports torch."""

import re
from typing import Any

QKV = ("q", "k", "v")
MOST = 2**31 - 1  # the largest whole number allowed


def check_whole(name: str, value: int) -> None:
    """Raise ValueError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    if value > MOST:
        raise ValueError(f"{name} is {value}; it must be at most {MOST}")


def check_flag(name: str, value: bool) -> None:
    """Raise ValueError unless the value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be True or False")


def check_rank(rank: int) -> None:
    """Raise ValueError unless the rank is a whole number of at least 1."""
    check_whole("rank", rank)


def check_bottleneck(bottleneck: int) -> None:
    """Raise ValueError unless the bottleneck is a whole number of at least 1."""
    check_whole("bottleneck", bottleneck)


def check_linear_rank(in_features: int, out_features: int, rank: int) -> None:
    """Raise ValueError if the rank exceeds the smaller side of the layer."""
    check_rank(rank)
    if rank > min(in_features, out_features):
        raise ValueError(
            f"rank {rank} is above {min(in_features, out_features)}, the smaller side of a "
            f"linear layer with {in_features} inputs and {out_features} outputs"
        )


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless the dropout is a probability below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; it must be at least 0 and below 1")


def check_alpha(alpha: float | None) -> None:
    """Raise ValueError unless alpha is None or a finite number above 0."""
    if alpha is None:
        return
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not number or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha!r}; it must be a finite number above 0")


def checked_slices(slices: tuple[str, ...]) -> tuple[str, ...]:
    """Sort the slices as the packed layer has them; raise ValueError for unknown ones."""
    if not isinstance(slices, (tuple, list)) or not slices:
        raise ValueError(f"slices is {slices!r}; it must name at least one of 'q', 'k' and 'v'")
    for name in slices:
        if name not in QKV:
            raise ValueError(f"slices has {name!r}; only 'q', 'k' and 'v' exist")
    if len(set(slices)) < len(slices):
        raise ValueError(f"slices {slices!r} names a slice twice")
    return tuple(name for name in QKV if name in slices)


def checked_target(target: Any) -> str | tuple[str, ...]:
    """Return the target, with lists as tuples; raise ValueError if it names no layer."""
    entries = (target,) if isinstance(target, str) else target
    entries = tuple(entries) if isinstance(entries, list) else entries
    if not isinstance(entries, tuple) or not entries:
        raise ValueError(f"target is {target!r}; it must name at least one layer")
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise ValueError(f"target has {entry!r}, which is not the name of a layer")
        try:
            re.compile(entry)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"target {entry!r} is neither a layer's name nor a regular expression: {error}"
            ) from None
    return target if isinstance(target, str) else entries
