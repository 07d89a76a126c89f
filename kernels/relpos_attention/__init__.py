# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.relpos_attention.op import relpos_attention, window_relpos_attention

__all__ = ["relpos_attention", "window_relpos_attention"]
