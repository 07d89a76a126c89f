# SPDX-License-Identifier: Apache-2.0
"""Checks of Conv-LoRA's options. Nothing here imports torch."""

from samfast.adapters.checks import check_flag, check_whole

FORMULAS = ("code", "paper")
MOST_EXPERTS = 64  # the last one enlarges a map 64 times, the most that kernels take


def check_experts(experts: int) -> None:
    """Raise ValueError unless the number of experts is a whole number of at least 1."""
    check_whole("experts", experts)
    if experts > MOST_EXPERTS:
        raise ValueError(f"experts is {experts}; it must be at most {MOST_EXPERTS}")


def check_depthwise(depthwise: bool) -> None:
    """Raise ValueError unless depthwise is True or False."""
    check_flag("depthwise", depthwise)


def check_choice(top_k: int, experts: int, formula: str) -> None:
    """Raise ValueError if top_k or the formula does not exist."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise ValueError(
            f"top_k is {top_k!r}; it must be a whole number from 1 to {experts}, the number of "
            "experts"
        )
    if formula not in FORMULAS:
        raise ValueError(f"formula is {formula!r}; it must be one of {', '.join(FORMULAS)}")
