# SPDX-License-Identifier: Apache-2.0
"""Correctness first: no time is reported for a provider that fails the error budget."""

import torch

from benchmarks.registry import Workload
from samfast.kernels._common.budget import over_budget

REFUSALS = (torch.OutOfMemoryError, NotImplementedError, RuntimeError)


def verify(workload: Workload, dtype: torch.dtype) -> dict[str, str]:
    """Provider -> sentence, for every provider that refuses or is outside the error budget."""
    exact, stock = workload.exact(), workload.run(workload.stock)
    found = {}
    for name, provider in workload.providers.items():
        try:
            results = workload.run(name)
        except REFUSALS as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if not provider.checked:
            continue
        for what, mine, theirs, truth in zip(workload.results, results, stock, exact, strict=True):
            if (problem := over_budget(mine, theirs, truth, dtype)) is not None:
                found[name] = f"{what}: {problem}"
                break
    return found
