# SPDX-License-Identifier: Apache-2.0
"""Correctness first: no time is reported for a provider that fails the error budget."""

import torch

from benchmarks.registry import RESULTS, Workload
from samfast.kernels._common.budget import over_budget


def problems(workload: Workload, dtype: torch.dtype) -> dict[str, str]:
    """Provider -> sentence, for every provider outside the error budget."""
    exact, stock = workload.exact(), workload.providers[workload.stock]()
    found = {}
    for name, call in workload.providers.items():
        if name == workload.baseline:
            continue
        for what, mine, theirs, truth in zip(RESULTS, call(), stock, exact, strict=True):
            if (problem := over_budget(mine, theirs, truth, dtype)) is not None:
                found[name] = f"{what}: {problem}"
                break
    return found
