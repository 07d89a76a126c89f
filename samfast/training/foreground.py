# SPDX-License-Identifier: Apache-2.0
"""Which mask values are foreground: the rule, its texts, and the resulting masks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

ANY = "any"


@dataclass(frozen=True)
class Above:
    """Foreground is every value above the threshold.

    any: the rule was "any", which is about values of 0 and others. Files whose compression changes
    values keep no exact 0, so that only such a file tells "any" from a threshold of 0.
    """

    threshold: float
    any: bool = False


# None: masks together hold 0 and one other value, which is foreground.
Foreground = tuple[int, ...] | Above | None


def chosen_foreground(given: Any = None, threshold: float | None = None) -> Foreground:
    """The rule that an option names; ValueError for one that names none.

    given: None, "any", a sequence of values or of the text "any", or a rule already
    threshold: every value above it is foreground
    """
    if threshold is not None:
        if given is not None:
            raise ValueError(
                f"threshold is {threshold:g}, but foreground is given too; leave out one of them"
            )
        if not isfinite(threshold):
            raise ValueError(f"threshold is {threshold}; expected a finite number")
        return Above(float(threshold))
    if given is None or isinstance(given, Above):
        return given
    values = (given,) if isinstance(given, str) else tuple(given)
    if not values:
        raise ValueError("foreground is empty; give at least one mask value, or any")
    if ANY not in values:
        return values
    if len(values) > 1:
        raise ValueError(f"foreground is {', '.join(map(str, values))}; any must be the only value")
    return Above(0.0, any=True)


def chosen_ignore(given: Iterable[float] | None, rule: Foreground = None) -> tuple[float, ...]:
    """Return the mask values to ignore; () for None.

    Raises ValueError for one that is not finite, or that ``rule`` names as foreground.
    """
    values = tuple(given or ())
    for value in values:
        if not isfinite(value):
            raise ValueError(f"ignore has {value}; expected finite mask values")
        if isinstance(rule, tuple) and value in rule:
            raise ValueError(
                f"foreground and ignore both hold {value:g}; remove it from one of them"
            )
    return values


def foreground_config(rule: Foreground) -> dict[str, Any]:
    """A rule as the JSON values "foreground" and "threshold"."""
    if isinstance(rule, Above):
        return {
            "foreground": [ANY] if rule.any else None,
            "threshold": None if rule.any else rule.threshold,
        }
    return {"foreground": None if rule is None else list(rule), "threshold": None}


def binary_mask(values: np.ndarray, foreground: Foreground | Sequence[int] = None) -> np.ndarray:
    """Mask values (H, W) -> bool (H, W): above 0 or a threshold, or one of those named."""
    rule = chosen_foreground(foreground)
    if rule is None:
        return values > 0
    return values > rule.threshold if isinstance(rule, Above) else np.isin(values, rule)


def among(values: np.ndarray, named: Sequence[float]) -> np.ndarray:
    """bool, of the shape of values: which are named, as floats of the file's precision."""
    wanted = np.asarray(named)
    return np.isin(values, wanted.astype(values.dtype) if values.dtype.kind == "f" else wanted)


def counted_mask(
    values: np.ndarray, rule: Foreground, ignore: Sequence[float] = ()
) -> tuple[np.ndarray, np.ndarray | None]:
    """Mask values (H, W) -> foreground that counts, and what counts nowhere, both bool (H, W).

    The second is None without ``ignore``.
    """
    truth = binary_mask(values, rule)
    if not ignore:
        return truth, None
    ignored = among(values, ignore)
    return truth & ~ignored, ignored
