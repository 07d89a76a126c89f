# SPDX-License-Identifier: Apache-2.0
"""The gate's backends that run on this machine."""

import torch

from samfast import backends
from samfast.kernels.expert_gate.op import supports

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton")


def runnable(backend: str) -> str | None:
    """None when the backend runs on this machine's test device, else the sentence why not."""
    if backend == "triton" and (missing := backends.triton_missing(DEVICE)) is not None:
        return missing
    return supports(backend, torch.empty(1, 3, device=DEVICE), torch.empty(3, 4, device=DEVICE))
