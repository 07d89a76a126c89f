# SPDX-License-Identifier: Apache-2.0
"""The half of ``adapt_former`` before the up-projection in aten calls, for any device and dtype.

x (tokens, D) has any dtype; z (tokens, V) and its gradient have the products' dtype. The engine
does the rest: out += z upᵀ, and dz = dy up.
"""

from collections.abc import Sequence

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
    onto: Tensor | None, dz: Tensor, z: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    down: Tensor, eps: float, dropout: float, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, norm_weight, norm_bias, down and down_bias; None where ``needs`` is False.

    onto: an existing gradient of x, to which this one is added in place
    z > 0 shows what dropout and ReLU let through; a NaN passes, as in torch's ReLU.
    """
    dh = torch.ops.aten.threshold_backward(dz, z, 0)
    if dropout > 0.0:
        dh = dh / (1.0 - dropout)
    *needs_norm, need_down, need_down_bias = needs
    wide, weight, bias = alike(x, norm_weight, norm_bias)
    n, mean, rstd = torch.native_layer_norm(wide, x.shape[1:], weight, bias, eps)
    made = [None] * 3
    if any(needs_norm):
        dn = torch.mm(dh, down.to(dh.dtype)).to(wide.dtype)
        made = torch.ops.aten.native_layer_norm_backward(
            dn, wide, x.shape[1:], mean, rstd, weight, bias, needs_norm
        )
        sources = zip(made, (x, norm_weight, norm_bias), needs_norm, strict=True)
        made = [d.to(t.dtype) if need else None for d, t, need in sources]
        if onto is not None and needs[0]:
            made[0] = onto.add_(made[0])
    ddown = torch.mm(dh.t(), n.to(dh.dtype)).to(down.dtype) if need_down else None
    dbias = dh.sum(0, dtype=torch.promote_types(dh.dtype, down.dtype)) if need_down_bias else None
    return [*made, ddown, dbias]
