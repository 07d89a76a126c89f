# SPDX-License-Identifier: Apache-2.0
"""The operators that build a sum of Kronecker products: backend choice, declarations, checks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common.arguments import check_tensors
from samfast.kernels._common.operator import Operator
from samfast.kernels._common.table import Table, double

MAX_ELEMENTS = 2**30  # of one of the weights; the kernels count them in 32 bits
TABLE = Table(
    "hypercomplex", __package__, native="hypercomplex_build", function="hypercomplex_linear"
)


def supports(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    rules: Tensor,
    weights: Tensor,
    base: Tensor | None = None,
) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not.

    dtype: of the matrix that is built, x's
    """
    if backend in ("reference", "torch"):
        return None
    named = {"x": dtype, "rules": rules.dtype, "weights": weights.dtype}
    named |= {} if base is None else {"base": base.dtype}
    if (wide := double(**named)) is not None:
        return wide
    if (elements := weights.shape[1] * weights.shape[2]) >= MAX_ELEMENTS:
        return f"weights have {elements} elements, but the kernels take fewer than {MAX_ELEMENTS}"
    if backend == "cuda":
        from samfast.kernels.hypercomplex import cuda_path

        return cuda_path.missing(device, rules.shape[0])
    missing = TABLE.missing(backend, device, x=dtype)
    if missing is not None or backend == "cpu":
        return missing
    from samfast.kernels.hypercomplex import triton_kernels

    if rules.shape[0] > triton_kernels.MAX_TERMS:
        return f"{rules.shape[0]} terms are more than {triton_kernels.MAX_TERMS}, the widest tile"
    return None


def path_of(backend, device, dtype, rules, weights, base=None):
    return TABLE.path(backend, device, lambda b: supports(b, device, dtype, rules, weights, base))


_PARTS = "Tensor rules, Tensor weights"


class KroneckerWeight(Operator):
    """Saves rules and weights."""

    name = "kronecker_weight"
    inputs = f"{_PARTS}, float scaling, ScalarType dtype, str backend"
    makes = "Tensor h"
    backward_inputs = f"Tensor dh, {_PARTS}, float scaling, bool[] needs, str backend"
    gradients = "rules weights"
    has_forward = False

    @staticmethod
    def path(backend, rules, weights, dtype=None, dh=None, **_):
        dtype = dtype if dh is None else dh.dtype
        return path_of(backend, rules.device, dtype, rules, weights)

    @staticmethod
    def forward(path, rules, weights, scaling, dtype):
        return path.build(rules, weights, None, scaling, dtype)

    @staticmethod
    def backward(path, dh, rules, weights, scaling, needs):
        return list(path.contract(dh.contiguous(), rules, weights, scaling, needs))

    @staticmethod
    def fake(rules, weights, scaling, dtype, backend):
        n = rules.shape[1]
        return weights.new_empty(n * weights.shape[1], n * weights.shape[2], dtype=dtype)


class HypercomplexLinear(Operator):
    """Saves x, where a parameter wants a gradient, and the parameters; H is built again."""

    name = "hypercomplex_linear"
    inputs = f"Tensor x, {_PARTS}, Tensor? bias, Tensor? base, float scaling, str backend"
    makes = "Tensor y"
    backward_inputs = (
        f"Tensor dy, Tensor? x, {_PARTS}, Tensor? base, float scaling, ScalarType bias_dtype, "
        "bool[] needs, str backend"
    )
    gradients = "x rules weights bias base"
    has_forward = False

    @staticmethod
    def path(backend, x, rules, weights, base, dy=None, **_):
        x = x if dy is None else dy
        return path_of(backend, x.device, x.dtype, rules, weights, base)

    @staticmethod
    def forward(path, x, rules, weights, bias, base, scaling):
        h = path.build(rules, weights, base, scaling, x.dtype)
        y = F.linear(_rows(x), h, None if bias is None else bias.to(x.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(path, dy, x, rules, weights, base, scaling, bias_dtype, needs):
        need_x, need_rules, need_weights, need_bias, need_base = needs
        shape, dy = dy.shape, _rows(dy)
        dx = drules = dweights = dbias = dbase = None
        if need_x:
            h = path.build(rules, weights, base, scaling, dy.dtype)
            dx = torch.mm(dy, h)
            dx = dx.view(*shape[:-1], dx.shape[-1])
            del h
        if need_rules or need_weights or need_base:
            dh = torch.mm(dy.t(), _rows(x))
            drules, dweights = path.contract(
                dh, rules, weights, scaling, (need_rules, need_weights)
            )
            dbase = dh.to(base.dtype) if need_base else None
        if need_bias:
            wide = torch.promote_types(dy.dtype, bias_dtype)
            dbias = dy.sum(0, dtype=wide).to(bias_dtype)
        return [dx, drules, dweights, dbias, dbase]

    @staticmethod
    def fake(x, rules, weights, *_):
        return x.new_empty(*x.shape[:-1], rules.shape[1] * weights.shape[1])

    @staticmethod
    def fake_backward(dy, x, rules, weights, base, scaling, bias_dtype, needs, backend):
        dx = dy.new_empty(*dy.shape[:-1], rules.shape[1] * weights.shape[2])
        dbias = dy.new_empty(dy.shape[-1], dtype=bias_dtype)
        made = [None if t is None else t.new_empty(t.shape) for t in (rules, weights, base)]
        made = [dx, *made[:2], dbias, made[2]]
        return [d if need else None for d, need in zip(made, needs, strict=True)]

    @staticmethod
    def spare(need):
        return () if need["rules"] or need["weights"] or need["base"] else ("x",)

    @staticmethod
    def facts(x, bias, **_):
        return {"bias_dtype": x.dtype if bias is None else bias.dtype}


def _rows(t):
    """(tokens, features); the number of rows is spelt out for tensors without elements."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def check_parts(rules: Tensor, weights: Tensor) -> None:
    """Raise ValueError when rules (m, n, n) do not fit weights (m, P, Q)."""
    if rules.dim() != 3 or rules.shape[1] != rules.shape[2] or 0 in rules.shape:
        raise ValueError(f"rules has shape {tuple(rules.shape)}, but must be (terms, n, n)")
    if weights.dim() != 3 or 0 in weights.shape or weights.shape[0] != rules.shape[0]:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, but rules {tuple(rules.shape)} needs "
            f"({rules.shape[0]}, outputs / {rules.shape[1]}, inputs / {rules.shape[1]})"
        )


def check_linear(x, rules, part, bias, base) -> None:
    """Raise ValueError when x, bias and base do not fit weights whose parts are (P, Q)."""
    n = rules.shape[1]
    outputs, inputs = n * part[0], n * part[1]
    if x.dim() == 0:
        raise ValueError("x is a single number, but must be (..., features)")
    if x.shape[-1] % n:
        raise ValueError(f"x has {x.shape[-1]} features, but must have a multiple of n = {n}")
    if x.shape[-1] != inputs:
        raise ValueError(f"x has shape {tuple(x.shape)} but rules and weights take {inputs} inputs")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)} but there are {outputs} outputs")
    if base is not None and tuple(base.shape) != (outputs, inputs):
        raise ValueError(
            f"base has shape {tuple(base.shape)} but rules and weights make ({outputs}, {inputs})"
        )
    check_tensors({"x": x, "rules": rules, "bias": bias, "base": base})
