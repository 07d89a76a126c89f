# SPDX-License-Identifier: Apache-2.0
"""Correctness first: no time is reported for a provider that fails the error budget."""

from functools import partial

import torch

from benchmarks.registry import Workload
from samfast.kernels._common.budget import Budget


def _triton_errors() -> tuple[type[Exception], ...]:
    """No kernel, or one too large for this device."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


# NotImplementedError, a compiler's and memory's errors among them: a provider that cannot is a row.
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, *_triton_errors())


def refusal(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["without a word"]
    return f"{type(error).__name__}: {lines[0]}"


def verify(workload: Workload, dtype: torch.dtype) -> dict[str, str]:
    """Provider -> sentence, for every provider that refuses or is outside the error budget."""
    budgets, found = [], {}
    for name in workload.stock:
        try:
            workload.run(name)
        except REFUSALS as error:
            found[name] = refusal(error)
            continue
        budgets.append(Budget(partial(workload.run, name), workload.exact, dtype))
    if not budgets:
        raise RuntimeError(f"no peer's errors set the budget of {workload.name}: {found}")
    for name, provider in workload.providers.items():
        if name in found:
            continue
        try:
            results = workload.run(name)
        except REFUSALS as error:
            found[name] = refusal(error)
            continue
        if not provider.checked:
            broken = [i for i, t in enumerate(results) if not bool(t.isfinite().all())]
            if broken:
                found[name] = f"{workload.results[broken[0]]} is not finite"
            continue
        problems = [budget.problems(results) for budget in budgets]
        if all(problems):
            place, text = next(iter(problems[0].items()))
            found[name] = f"{workload.results[int(place)]}: {text}"
    return found


WITHIN, OTHER = "within budget", "another result, finite"


def verdict(workload: Workload, name: str, wrong: dict[str, str]) -> str:
    """What ``verify`` found of a provider, in the words of a row; wrong: what it returned.

    Empty for a provider that was not seen to be right, whose times no row may hold.
    """
    if name in wrong or name not in workload.providers:
        return ""
    return WITHIN if workload.providers[name].checked else OTHER
