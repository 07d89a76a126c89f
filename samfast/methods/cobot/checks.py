# SPDX-License-Identifier: Apache-2.0
"""The check of SAM-COBOT's width; it needs no torch."""

from samfast.adapters.checks import check_rank


def check_width(name: str, width: int) -> None:
    """Raise ValueError when a quaternion head cannot have this width."""
    check_rank(width)
    if width % 4:
        raise ValueError(f"{name} is {width}, but the four parts of a quaternion must divide it")
