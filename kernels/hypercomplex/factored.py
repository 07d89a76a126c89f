# SPDX-License-Identifier: Apache-2.0
"""Sums of Kronecker products whose weights are of low rank: by LoRA's two products, or built."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common.autocast import autocast_input, without_autocast
from samfast.kernels.hypercomplex import costs, reference
from samfast.kernels.hypercomplex.built import check_linear
from samfast.kernels.hypercomplex.factors import check_factors, kronecker_factors
from samfast.kernels.lora_linear.op import TABLE as PRODUCTS
from samfast.kernels.lora_linear.op import lora_linear


def by_factors(rules: Tensor, left: Tensor, right: Tensor, base: Tensor | None = None) -> bool:
    """Whether two products of rank m · n · k take fewer FLOP a token than one with the matrix.

    It depends only on sizes and on which tensors are trained. So any number of tokens gets the same
    products, with and without autograd.
    """
    (terms, n, _), (_, rows, rank), columns = rules.shape, left.shape, right.shape[1]
    trained = None if base is None else base.requires_grad
    factored, built = costs.token(n * columns, n * rows, n, terms, rank, trained)
    return factored < built


def whole(left: Tensor, right: Tensor) -> Tensor:
    """left_i right_iᵀ: (m, P, Q), at least float32."""
    wide = functools.reduce(torch.promote_types, (left.dtype, right.dtype, torch.float32))
    with without_autocast(left.device.type):
        return torch.bmm(left.to(wide), right.to(wide).mT)


def weight(rules: Tensor, left: Tensor, right: Tensor, scaling: float, backend: str) -> Tensor:
    """``kronecker_weight`` of factored weights, of the widest of the three dtypes."""
    check_factors(rules, left, right)
    kinds = (rules.dtype, left.dtype, right.dtype)
    dtype, weights = functools.reduce(torch.promote_types, kinds), whole(left, right)
    if backend == "reference":
        with without_autocast(rules.device.type):
            made = reference.kronecker_weight(rules.to(weights.dtype), weights, scaling)
        return made.to(dtype)
    return torch.ops.samfast.kronecker_weight(rules, weights, scaling, dtype, backend)


def linear(
    x: Tensor, rules: Tensor, left: Tensor, right: Tensor, bias: Tensor | None,
    base: Tensor | None, scaling: float, backend: str,
) -> Tensor:  # fmt: skip
    """``hypercomplex_linear`` of factored weights."""
    check_factors(rules, left, right)
    check_linear(x, rules, (left.shape[1], right.shape[1]), bias, base)
    x = autocast_input(x)
    if backend == "reference":
        with without_autocast(x.device.type):
            return reference.hypercomplex_linear(x, rules, whole(left, right), bias, base, scaling)
    if not by_factors(rules, left, right, base):
        return torch.ops.samfast.hypercomplex_linear(
            x, rules, whole(left, right), bias, base, scaling, backend
        )
    lora_a, lora_b = kronecker_factors(rules, left, right, backend)
    with without_autocast(x.device.type):
        if base is not None:
            engine = PRODUCTS.part(backend)
            base = base.to(x.dtype)
            return lora_linear(x, base, bias, lora_a, lora_b, scaling, backend=engine)
        h = F.linear(x, lora_a.to(x.dtype))
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(h, (scaling * lora_b).to(x.dtype), bias)
