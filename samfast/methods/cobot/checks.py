# SPDX-License-Identifier: Apache-2.0
"""The check of SAM-COBOT's width. Nothing here imports torch."""

from samfast.adapters.checks import check_rank


def check_width(name: str, width: int) -> None:
    """Raise ValueError unless the width is a multiple of 4, as a quaternion head needs."""
    check_rank(width)
    if width % 4:
        raise ValueError(f"{name} is {width}, but the four parts of a quaternion must divide it")
