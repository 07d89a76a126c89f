# SPDX-License-Identifier: Apache-2.0
"""``adapt_former``: operator schemas, autograd and the public function."""

import math

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.autocast import autocast_dtype, without_autocast
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.once import once_differentiable
from samfast.kernels.adapt_former import engine, reference, torch_path
from samfast.kernels.lora_linear import torch_path as up_torch_path

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIDE = ("norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias")

_TENSORS = ", ".join(f"Tensor {name}" for name in SIDE)
_OPTIONS = "float eps, float dropout, ScalarType dtype, str backend"
_INPUTS = f"Tensor x, Tensor base, {_TENSORS}, Tensor? seed, {_OPTIONS}"
torch.library.define("samfast::adapt_former", f"({_INPUTS}) -> Tensor")
torch.library.define("samfast::adapt_former_forward", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "samfast::adapt_former_backward",
    f"(Tensor dy, Tensor x, Tensor z, {_TENSORS}, {_OPTIONS}, bool[] needs) -> Tensor[]",
)


def _forward(paths, x, base, norm_weight, norm_bias, down, down_bias, up, up_bias, seed, *options):
    eps, dropout, dtype = options
    rows, under = _flat(x), _flat(base)
    with without_autocast(x.device.type):
        path, up_path = paths
        z = path.low(rows, norm_weight, norm_bias, down, down_bias, eps, dropout, seed, dtype)
        out = under.new_empty(under.shape, dtype=dtype)
        if base.dtype == dtype:
            torch.add(under, up_bias, out=out)
            engine.add_up_(up_path, out, z, up)
        else:  # each rounded in its own dtype
            engine.add_up_(up_path, out.copy_(up_bias), z, up)
            out = under + out
    return out.view(base.shape), z


def _backward(paths, dy, x, z, norm_weight, norm_bias, down, down_bias, up, up_bias, *rest):
    eps, dropout, dtype, needs = rest
    *need_low, need_up, need_up_bias = needs
    incoming, rows = _flat(dy), _flat(x)
    with without_autocast(x.device.type):
        path, up_path = paths
        grads, dup = [None] * 5, None
        dbias = engine.column_sum(incoming, up_bias) if need_up_bias else None
        if any(need_low) or need_up:
            dz, dup = engine.up_backward(up_path, incoming.to(dtype), z, up, need_up)
        if any(need_low):
            grads = path.low_backward(
                None, dz, z, rows, norm_weight, norm_bias, down, eps, dropout, need_low
            )
    dx, *rest, ddown_bias = grads
    dx = None if dx is None else dx.view(x.shape)
    ddown_bias = None if ddown_bias is None else ddown_bias.to(down_bias.dtype)
    made = [dx, *rest, ddown_bias, dup, dbias]
    return [d for d in made if d is not None]


def _flat(t: Tensor) -> Tensor:
    """(tokens, features); the number of rows is spelt out for tensors without elements."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _paths(backend, x, up, dtype):
    z = x.new_empty(0, up.shape[1], dtype=dtype)
    return engine.path_of(backend, x, up.shape[1], dtype), engine.up_path_of(backend, z, up)


_TORCH = (torch_path, up_torch_path)


@implement("samfast::adapt_former_forward")
def _forward_impl(x, *rest):
    *arguments, dtype, backend = rest
    return _forward(_paths(backend, x, arguments[5], dtype), x, *arguments, dtype)


@torch.library.register_fake("samfast::adapt_former_forward")
def _forward_fake(*args):
    return _forward(_TORCH, *args[:-1])


@implement("samfast::adapt_former_backward")
def _backward_impl(dy, x, z, *rest):
    *arguments, dtype, backend, needs = rest
    paths = _paths(backend, x, arguments[4], dtype)
    return _backward(paths, dy, x, z, *arguments, dtype, needs)


@torch.library.register_fake("samfast::adapt_former_backward")
def _backward_fake(dy, x, z, *rest):
    *arguments, dtype, _, needs = rest
    return _backward(_TORCH, dy, x, z, *arguments, dtype, needs)


@implement("samfast::adapt_former")
def _impl(*args):
    return torch.ops.samfast.adapt_former_forward(*args)[0]


@torch.library.register_fake("samfast::adapt_former")
def _fake(*args):
    return _forward_fake(*args)[0]


class AdaptFormerFunction(torch.autograd.Function):
    """Saves x and z, V numbers a token; parameters cost nothing."""

    @staticmethod
    def forward(ctx, x, base, norm_weight, norm_bias, down, down_bias, up, up_bias, seed, *options):
        params = (norm_weight, norm_bias, down, down_bias, up, up_bias)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            y, z = torch.ops.samfast.adapt_former_forward(x, base, *params, seed, *options)
        need_x, _, *needs = ctx.needs_input_grad[:8]
        low = need_x or any(needs[:4])
        ctx.save_for_backward(x if low else None, z if low or needs[4] else None, *params)
        ctx.options, ctx.base_dtype = options, base.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, *params = ctx.saved_tensors
        need_x, need_base, *needs = ctx.needs_input_grad[:8]
        asked = [need_x, *needs]
        x = dy.new_empty(0, dy.shape[-1]) if x is None else x
        z = dy.new_empty(0, params[2].shape[0]) if z is None else z
        with torch._C._AutoDispatchBelowADInplaceOrView():
            given = iter(
                torch.ops.samfast.adapt_former_backward(dy, x, z, *params, *ctx.options, asked)
            )
        dx, *dparams = (next(given) if need else None for need in asked)
        dbase = dy.to(ctx.base_dtype) if need_base else None
        return dx, dbase, *dparams, None, None, None, None, None


@torch.library.impl("samfast::adapt_former", "Autograd")
def _autograd(*args):
    return AdaptFormerFunction.apply(*args)


def adapt_former(
    x: Tensor,
    base: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """AdaptFormer's branch beside an MLP (Chen et al. 2022), with the LayerNorm of SAM-COBOT.

    x: (..., D)   base: (..., D), what the branch is added to, such as the MLP's result
    norm_weight, norm_bias, up_bias: (D,)   down: (V, D)   down_bias: (V,)   up: (D, V)
    out: (..., D) = base + drop(ReLU(LN(x) downᵀ + b_down)) upᵀ + b_up

    dropout: probability of zeroing an element of the bottleneck (always on when above 0)
    seed: int64 tensor of one element on x's device; drawn when dropout needs one and none is given

    Products run in x's dtype, or the autocast dtype, and the result has base's if that is wider.
    The other tensors may be of another dtype (they are meant to stay float32); their gradients
    come in their own. Saves x and the bottleneck z, V numbers a token; no mask.
    Raises ValueError when shapes, devices or dtypes do not fit, RuntimeError when a backend asked
    for by name cannot run.
    """
    side = (norm_weight, norm_bias, down, down_bias, up, up_bias)
    check_arguments(x, base, side, dropout, seed)
    autocast = autocast_dtype(x.device.type)
    dtype = x.dtype if autocast is None or x.dtype == torch.float64 else autocast
    if dropout > 0.0 and seed is None:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if backends.requested(backend) == "reference":
        with without_autocast(x.device.type):
            return reference.adapt_former(
                x, base, *side, eps=eps, dropout=dropout, seed=seed, dtype=dtype
            )
    return torch.ops.samfast.adapt_former(
        x, base, *side, seed if dropout > 0.0 else None, float(eps), float(dropout), dtype,
        backends.requested(backend),
    )  # fmt: skip


def check_arguments(x, base, side, dropout, seed) -> None:
    """Raise one sentence when the arguments do not chain."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (..., D)")
    if base.shape != x.shape:
        raise ValueError(f"base has shape {tuple(base.shape)} but x has {tuple(x.shape)}")
    named = {"x": x, "base": base, **dict(zip(SIDE, side, strict=True))}
    check_side(x.shape[-1], side)
    for name, t in {**named, "seed": seed}.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device} but x is on {x.device}")
    for name, t in named.items():
        if t.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {t.dtype}, but must be float16, bfloat16, float32 or float64"
            )
    if autocast_dtype(x.device.type) is None and base.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} but base is {base.dtype}; cast base or use autocast")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, but must be at least 0 and below 1")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed must be one int64 element, but is {seed.dtype} {tuple(seed.shape)}")


def check_side(width: int, side) -> None:
    """Raise one sentence when the six tensors of the branch do not fit rows of that width."""
    down = side[2]
    if down.dim() != 2 or down.shape[1] != width or down.shape[0] == 0:
        raise ValueError(
            f"down has shape {tuple(down.shape)}, but rows of {width} features need "
            f"(bottleneck, {width})"
        )
    bottleneck = down.shape[0]
    shapes = ((width,), (width,), down.shape, (bottleneck,), (width, bottleneck), (width,))
    for name, t, shape in zip(SIDE, side, shapes, strict=True):
        if tuple(t.shape) != tuple(shape):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, but {width} features and a bottleneck of "
                f"{bottleneck} need {tuple(shape)}"
            )
