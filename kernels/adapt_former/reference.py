# SPDX-License-Identifier: Apache-2.0
"""The specification of ``adapt_former``: eager PyTorch, any dtype and device, plain autograd."""

import torch.nn.functional as F

from samfast.kernels._common.layer_norm import alike
from samfast.kernels._common.philox import keep_mask


def adapt_former(
    x, base, norm_weight, norm_bias, down, down_bias, up, up_bias,
    *, eps=1e-5, dropout=0.0, seed=None, dtype=None,
):  # fmt: skip
    """out = base + drop(ReLU(LN(x) downᵀ + b_down)) upᵀ + b_up.

    x, base: (..., D)   norm_weight, norm_bias, up_bias: (D,)
    down: (V, D)   down_bias: (V,)   up: (D, V)
    dtype: of the products, x's by default
    """
    dtype = x.dtype if dtype is None else dtype
    wide, weight, bias = alike(x, norm_weight, norm_bias)
    n = F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(dtype)
    z = F.relu(F.linear(n, down.to(dtype), down_bias.to(dtype)))
    if dropout > 0.0:
        keep = keep_mask(seed, x.shape[:-1].numel(), down.shape[0], dropout)
        z = z * keep.view(z.shape) / (1.0 - dropout)
    return base + F.linear(z, up.to(dtype), up_bias.to(dtype))
