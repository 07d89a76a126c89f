# SPDX-License-Identifier: Apache-2.0
"""Correctness first: no time is reported for a provider that fails the error budget."""

import torch

from benchmarks.registry import Workload
from samfast.kernels._common.budget import over_budget

REFUSALS = (torch.OutOfMemoryError, NotImplementedError, RuntimeError)


def verify(workload: Workload, dtype: torch.dtype) -> dict[str, str]:
    """Provider -> sentence, for every provider that refuses or is outside the error budget."""
    exact = workload.exact()
    stock = [workload.run(name) for name in workload.stock]
    found = {}
    for name, provider in workload.providers.items():
        try:
            results = workload.run(name)
        except REFUSALS as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
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
