# SPDX-License-Identifier: Apache-2.0
"""Runs before any test module is imported."""

import os
import sys
from pathlib import Path

import torch

# Triton decides at import whether kernels are interpreted; without a GPU that is how they run.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))

from samfast.integrations.torchvision import declare_missing_schemas

declare_missing_schemas()
