# SPDX-License-Identifier: Apache-2.0
"""Correctness first: no time is reported for a provider that fails the error budget."""

import torch

from benchmarks.registry import Workload
from samfast.kernels._common.budget import over_budget


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
    exact, stock, found = workload.exact(), [], {}
    for name in workload.stock:
        try:
            stock.append(workload.run(name))
        except REFUSALS as error:
            found[name] = refusal(error)
    if not stock:
        raise RuntimeError(f"nobody's errors make the budget of {workload.name}: {found}")
    for name, provider in workload.providers.items():
        if name in found:
            continue
        try:
            results = workload.run(name)
        except REFUSALS as error:
            found[name] = refusal(error)
            continue
        if not provider.checked:
            continue
        rows = zip(workload.results, results, exact, *stock, strict=True)
        for what, mine, truth, *theirs in rows:
            problems = [over_budget(mine, other, truth, dtype) for other in theirs]
            if None not in problems:
                found[name] = f"{what}: {problems[0]}"
                break
    return found
