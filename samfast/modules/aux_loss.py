# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for the modules below."""

from samfast.adapters.aux_loss import aux_loss
from samfast.adapters.latest_loss import LatestLoss, recomputing

__all__ = ["LatestLoss", "aux_loss", "recomputing"]
