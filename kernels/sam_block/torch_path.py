# SPDX-License-Identifier: Apache-2.0
"""The element-wise stages of the block in aten calls, for any device and dtype.

Rows are (tokens, features). ``dtype`` is that of the products next to a stage. Statistics and sums
are float32 (float64 for float64), whatever the rows are. Gradients of weights may wait in ``sums``.

lora_a (R, features): if it is given, and a path can make h = rows Aᵀ while it holds the rows, it
    returns h with them. This path returns None, and the caller makes h.
low = (dh, lora_a, need_a): dh A is added to the gradient of the rows. need_a asks for lora_a's. A
    path that makes that gradient on its way returns it; other paths return the rows.
up = (z, factor, scaling): the update and scaling · z factor are added; factor (R, features) is the
    transposed lora_b. Only if ``takes_up`` says so.
back = (z, lora_b, scaling): of the layer whose result u is, all of which gets its update. A path
    that can makes dz = s · du B and, if z is given, dB = s · duᵀ z with du, and returns them last.
    This path returns None, and the caller makes them.
lacks = (z, lora_b, scaling): s · z Bᵀ is yet to be added to u. Only if ``left_to_gelu`` says so.
room: columns behind a norm's rows for z of the layer that reads them, which are h and then zeros;
    as many as ``room`` says.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common.layer_norm import alike

Low = tuple[Tensor, Tensor, bool] | None
Up = tuple[Tensor, Tensor, float] | None
Back = tuple[Tensor | None, Tensor, float] | None


def takes_up(lora_b: Tensor, lora_a: Tensor | None = None) -> bool:
    """Whether a sum takes lora_b's update, before a norm that makes h of lora_a, if any.

    On this path a separate pass costs as much.
    """
    return False


def left_to_gelu(lora_b: Tensor) -> bool:
    """Whether GELU takes the update of the layer before."""
    return False


def room(lora_a: Tensor, lora_b: Tensor, tokens: int, dtype: torch.dtype) -> int:
    """Columns behind the rows for z, if a layer had better make its result and update by one
    product with ``joint_weight``; else 0.

    On this path a weight's copy costs more than a pass over the result.
    """
    return 0


def joint_weight(weight: Tensor, lora_b: Tensor, scaling: float, room: int, dtype) -> Tensor:
    """[W | s · B | 0] in ``dtype``, with so many columns behind W."""
    factor = F.pad(scaling * lora_b, (0, room - lora_b.shape[1]))
    return torch.cat([weight.to(dtype), factor.to(dtype)], 1)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, lora_a=None,
    room: int = 0,
) -> tuple[Tensor, None]:  # fmt: skip
    """LayerNorm over the features, in ``dtype``, and h."""
    x, weight, bias = alike(x, weight, bias)
    n = F.layer_norm(x, x.shape[1:], weight, bias, eps).to(dtype)
    return F.pad(n, (0, room)) if room else n, None


def add_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
    lora_a=None, up: Up = None, room: int = 0,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """x + update in the wider dtype of the two, its LayerNorm, and h. update may be overwritten."""
    total = x + _updated(update, up)
    return total, *norm(total, weight, bias, eps, dtype, None, room)


def add(x: Tensor, update: Tensor, up: Up = None) -> Tensor:
    """x + update in the wider dtype of the two; in update's memory where that is its dtype."""
    update = _updated(update, up)
    if torch.promote_types(x.dtype, update.dtype) == update.dtype:
        return update.add_(x)
    return x + update


def norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor, low: Low,
    want: bool, sums=None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """residual + the gradient through the LayerNorm, in x's dtype, its rows and lora_a's gradient.

    dn may be overwritten.
    """
    want = want or (low is not None and low[2])
    dn, dtype = _with(dn, low), dn.dtype
    wide, weight, bias = alike(x, weight, bias)
    rows, mean, rstd = torch.native_layer_norm(wide, x.shape[1:], weight, bias, eps)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dn.to(wide.dtype), wide, x.shape[1:], mean, rstd, weight, bias, [True, False, False]
    )
    return (dx + residual).to(x.dtype), rows.to(dtype) if want else None, None


def norm_parameters(
    dn: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, needs: tuple[bool, bool]
) -> list[Tensor | None]:
    """Gradients of the LayerNorm's weight and bias, None where not needed; dn is all of it."""
    wide, scale, shift = alike(x, weight, bias)
    _, mean, rstd = torch.native_layer_norm(wide, x.shape[1:], scale, shift, eps)
    _, *made = torch.ops.aten.native_layer_norm_backward(
        dn.to(wide.dtype), wide, x.shape[1:], mean, rstd, scale, shift, [False, *needs]
    )
    sources = zip(made, (weight, bias), needs, strict=True)
    return [d.to(t.dtype) if need else None for d, t, need in sources]


def gelu(u: Tensor, lora_a=None, lacks: Back = None) -> tuple[Tensor, None]:
    """gelu(u), and h."""
    return F.gelu(_whole(u, lacks)), None


def gelu_backward(
    dg: Tensor, u: Tensor, low: Low, want: bool, back: Back = None, sums=None, lacks: Back = None
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, Tensor | None] | None]:
    """du, gelu(u), lora_a's gradient, and dz and dB of back. dg may be overwritten."""
    want = want or (low is not None and low[2])
    dg, u = _with(dg, low), _whole(u, lacks)
    du = torch.ops.aten.gelu_backward.grad_input(dg, u, grad_input=dg)
    return du, F.gelu(u) if want else None, None, None


def _whole(u: Tensor, lacks: Back) -> Tensor:
    if lacks is None:
        return u
    z, lora_b, scaling = lacks
    return torch.addmm(u, z, lora_b.t().to(u.dtype), alpha=scaling)


def _with(d: Tensor, low: Low) -> Tensor:
    if low is None:
        return d
    dh, lora_a, _ = low
    return d.addmm_(dh, lora_a.to(d.dtype))


def _updated(update: Tensor, up: Up) -> Tensor:
    if up is None:
        return update
    z, factor, scaling = up
    return update.addmm_(z, factor.to(update.dtype), alpha=scaling)
