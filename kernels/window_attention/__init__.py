# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.window_attention.op import window_attention

__all__ = ["window_attention"]
