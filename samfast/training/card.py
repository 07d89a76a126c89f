# SPDX-License-Identifier: Apache-2.0
"""The memory of a GPU as an option, and how much of it tensors may use.

Importing this loads no torch.
"""

import re

CONTEXT = 500_000_000  # bytes of CUDA's context and of libraries' workspaces
WASTE = 0.06  # share of the rest that the allocator leaves in pieces too small to use
_UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}
_MOST = 2**50


def card_bytes(text: str) -> int | None:
    """Parse a size such as 12GB or 16GiB into bytes; None for auto. Raises ValueError for other
    text."""
    if text == "auto":
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError(
            f"fit is {text!r}; write a GPU's memory with its unit, such as 12GB (10^9 bytes) or "
            "12GiB, or auto for the GPU at hand"
        )
    size = round(float(found[1]) * _UNITS[found[2]])
    if not CONTEXT < size <= _MOST:
        raise ValueError(
            f"fit is {text}; it must be above {decimal(CONTEXT)}, which CUDA itself takes, and at "
            f"most {decimal(_MOST)}"
        )
    return size


def room(card: int) -> int:
    """Bytes that tensors may take of a GPU's memory."""
    return int((card - CONTEXT) * (1 - WASTE))


def needed(peak: int) -> int:
    """Bytes of the smallest GPU that has room for tensors of so many."""
    return int(peak / (1 - WASTE)) + CONTEXT + 1


def decimal(size: float) -> str:
    """Bytes as GB of 10^9."""
    return f"{size / 1e9:.2f}".rstrip("0").rstrip(".") + " GB"


def readable(size: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
