# SPDX-License-Identifier: Apache-2.0
"""``adapt_former``: operator schemas, autograd and the public function."""

import math

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import (
    check_devices,
    check_dropout,
    check_dtypes,
    drawn_seed,
)
from samfast.kernels._common.autocast import autocast_dtype, without_autocast
from samfast.kernels._common.operator import Operator
from samfast.kernels.adapt_former import engine, reference, torch_path
from samfast.kernels.lora_linear import torch_path as up_torch_path

SIDE = ("norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias")

_TENSORS = ", ".join(f"Tensor {name}" for name in SIDE)
_OPTIONS = "float eps, float dropout, ScalarType dtype, str backend"


class AdaptFormer(Operator):
    """Saves x and z, V numbers a token; parameters cost nothing."""

    name = "adapt_former"
    inputs = f"Tensor x, Tensor base, {_TENSORS}, Tensor? seed, {_OPTIONS}"
    makes = "Tensor y, Tensor z"
    returns = "y"
    backward_inputs = f"Tensor dy, Tensor x, Tensor z, {_TENSORS}, {_OPTIONS}, bool[] needs"
    gradients = f"x {' '.join(SIDE)}"
    residual = "base"
    fake_path = fake_backward_path = torch_path, up_torch_path

    @staticmethod
    def path(backend, x, up, dtype, **_):
        """Return two paths: one computes z, the other multiplies z by ``up``."""
        z = x.new_empty(0, up.shape[1], dtype=dtype)
        return engine.path_of(backend, x, up.shape[1], dtype), engine.up_path_of(backend, z, up)

    @staticmethod
    def forward(
        paths, x, base, norm_weight, norm_bias, down, down_bias, up, up_bias, seed, *options
    ):
        (path, up_path), (eps, dropout, dtype) = paths, options
        rows, under = _flat(x), _flat(base)
        z = path.low(rows, norm_weight, norm_bias, down, down_bias, eps, dropout, seed, dtype)
        out = under.new_empty(under.shape, dtype=dtype)
        if base.dtype == dtype:
            torch.add(under, up_bias, out=out)
            engine.add_up_(up_path, out, z, up)
        else:  # each rounded in its own dtype
            engine.add_up_(up_path, out.copy_(up_bias), z, up)
            out = under + out
        return out.view(base.shape), z

    @staticmethod
    def backward(paths, dy, x, z, norm_weight, norm_bias, down, down_bias, up, up_bias, *rest):
        (path, up_path), (eps, dropout, dtype, needs) = paths, rest
        *need_low, need_up, need_up_bias = needs
        incoming, rows = _flat(dy), _flat(x)
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
        return [dx, *rest, ddown_bias, dup, dbias]

    @staticmethod
    def spare(need):
        if need["x"] or any(need[name] for name in SIDE[:4]):
            return ()
        return ("x",) if need["up"] else ("x", "z")


def _flat(t: Tensor) -> Tensor:
    """(tokens, features); the number of rows is spelt out for tensors without elements."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


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
    """AdaptFormer's branch next to an MLP (Chen et al. 2022), with the LayerNorm of SAM-COBOT.

    x: (..., D)   base: (..., D), what the branch is added to, such as the MLP's result
    norm_weight, norm_bias, up_bias: (D,)   down: (V, D)   down_bias: (V,)   up: (D, V)
    out: (..., D) = base + drop(ReLU(LN(x) downᵀ + b_down)) upᵀ + b_up

    dropout: probability of zeroing an element of the bottleneck; applied whenever it is above 0
    seed: int64 tensor of one element on x's device; drawn if dropout needs one and none is given

    Products run in x's dtype, or in the autocast dtype. The result has base's dtype if that is
    wider. The other tensors may have another dtype and are meant to stay float32; their gradients
    have their dtype. Saves x and the bottleneck z, V numbers a token; no mask.
    Raises ValueError when shapes, devices or dtypes do not fit, and RuntimeError when a backend
    asked for by name cannot run.

    >>> import torch
    >>> from samfast.functional import adapt_former
    >>> x, ones, zeros = torch.randn(2, 64), torch.ones(64), torch.zeros(64)
    >>> down, up = torch.randn(8, 64), torch.zeros(64, 8)
    >>> adapt_former(x, x, ones, zeros, down, torch.zeros(8), up, zeros).shape
    torch.Size([2, 64])
    """
    side = (norm_weight, norm_bias, down, down_bias, up, up_bias)
    check_arguments(x, base, side, dropout, seed)
    autocast = autocast_dtype(x.device.type)
    dtype = x.dtype if autocast is None or x.dtype == torch.float64 else autocast
    seed = drawn_seed(seed, dropout, x)
    if backends.requested(backend) == "reference":
        with without_autocast(x.device.type):
            return reference.adapt_former(
                x, base, *side, eps=eps, dropout=dropout, seed=seed, dtype=dtype
            )
    return torch.ops.samfast.adapt_former(
        x, base, *side, seed, float(eps), float(dropout), dtype, backends.requested(backend)
    )  # fmt: skip


def check_arguments(x, base, side, dropout, seed) -> None:
    """Raise ValueError when the arguments do not fit together."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (..., D)")
    if base.shape != x.shape:
        raise ValueError(f"base has shape {tuple(base.shape)} but x has {tuple(x.shape)}")
    named = {"x": x, "base": base, **dict(zip(SIDE, side, strict=True))}
    check_side(x.shape[-1], side)
    check_devices({**named, "seed": seed})
    check_dtypes(named)
    if autocast_dtype(x.device.type) is None and base.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} but base is {base.dtype}; cast base or use autocast")
    check_dropout(dropout, seed)


def check_side(width: int, side) -> None:
    """Raise ValueError when the six tensors of the branch do not fit rows of that width."""
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
