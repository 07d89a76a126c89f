# SPDX-License-Identifier: Apache-2.0
"""Checks of Conv-LoRA's options; they need no torch."""

FORMULAS = ("code", "paper")


def check_experts(experts: int) -> None:
    if isinstance(experts, bool) or not isinstance(experts, int) or experts < 1:
        raise ValueError(f"experts is {experts!r}; it must be a whole number of at least 1")


def check_depthwise(depthwise: bool) -> None:
    if not isinstance(depthwise, bool):
        raise ValueError(f"depthwise is {depthwise!r}; it must be True or False")


def check_choice(top_k: int, experts: int, formula: str) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise ValueError(
            f"top_k is {top_k!r}; it must be a whole number from 1 to {experts}, the number of "
            "experts"
        )
    if formula not in FORMULAS:
        raise ValueError(f"formula is {formula!r}; it must be one of {', '.join(FORMULAS)}")
