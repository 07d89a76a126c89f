# SPDX-License-Identifier: Apache-2.0
"""Checks of the number of Kronecker products. Nothing here imports torch."""

from samfast.adapters.checks import check_whole


def check_n(n: int) -> None:
    """Raise ValueError unless n is a whole number of at least 1."""
    check_whole("n", n)


def check_divides(n: int, in_features: int, out_features: int) -> None:
    """Raise ValueError unless n divides both sizes of the layer."""
    check_n(n)
    for size, what in ((in_features, "inputs"), (out_features, "outputs")):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"a linear layer has a whole number of {what} above 0, not {size!r}")
        if size % n:
            raise ValueError(f"n is {n}, which does not divide the {size} {what} of a linear layer")
