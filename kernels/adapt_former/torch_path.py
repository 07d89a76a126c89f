# SPDX-License-Identifier: Apache-2.0
"""The half of ``adapt_former`` before the up-projection in aten calls, for any device and dtype.

x (tokens, D) of any dtype, z (tokens, V) and its gradient of the products' dtype. What follows z is
the engine's: out += z upᵀ, and dz = dy up.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common.layer_norm import alike
from samfast.kernels._common.philox import keep_mask


def low(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, down: Tensor, down_bias: Tensor, eps: float,
    dropout: float, seed: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """z = drop(ReLU(LN(x) downᵀ + b_down)) in ``dtype``."""
    wide, weight, bias = alike(x, norm_weight, norm_bias)
    n = F.layer_norm(wide, x.shape[1:], weight, bias, eps).to(dtype)
    z = F.relu(F.linear(n, down.to(dtype), down_bias.to(dtype)))
    if dropout == 0.0:
        return z
    return torch.where(keep_mask(seed, *z.shape, dropout), z / (1.0 - dropout), 0.0)


def low_backward(
    dx: Tensor | None, add: bool, dz: Tensor, z: Tensor, x: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, down: Tensor, eps: float, dropout: float, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """x's gradient into dx where it is given, or added to what is there; returns the gradients of
    norm_weight, norm_bias, down and down_bias, None where ``needs`` does not want them.

    z > 0 tells what dropout and ReLU let through; a NaN passes, as in torch's ReLU.
    """
    dh = torch.ops.aten.threshold_backward(dz, z, 0)
    if dropout > 0.0:
        dh = dh / (1.0 - dropout)
    need_weight, need_bias, need_down, need_down_bias = needs
    wide, weight, bias = alike(x, norm_weight, norm_bias)
    n, mean, rstd = torch.native_layer_norm(wide, x.shape[1:], weight, bias, eps)
    made = [None, None]
    if dx is not None or need_weight or need_bias:
        dn = torch.mm(dh, down.to(dh.dtype)).to(wide.dtype)
        through, *made = torch.ops.aten.native_layer_norm_backward(
            dn, wide, x.shape[1:], mean, rstd, weight, bias,
            [dx is not None, need_weight, need_bias],
        )  # fmt: skip
        if dx is not None:
            dx.add_(through) if add else dx.copy_(through)
    ddown = torch.mm(dh.t(), n.to(dh.dtype)).to(down.dtype) if need_down else None
    dbias = dh.sum(0, dtype=torch.promote_types(dh.dtype, down.dtype)) if need_down_bias else None
    sources = zip(made, (norm_weight, norm_bias), (need_weight, need_bias), strict=True)
    return [*(d.to(t.dtype) if need else None for d, t, need in sources), ddown, dbias]
