# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.cobot_fold.op import cobot_fold

__all__ = ["cobot_fold"]
