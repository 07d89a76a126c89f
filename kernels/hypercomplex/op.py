# SPDX-License-Identifier: Apache-2.0
"""``hypercomplex_linear`` and ``kronecker_weight``: the public functions."""

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import check_tensors
from samfast.kernels._common.autocast import autocast_input, without_autocast
from samfast.kernels.hypercomplex import factored, reference
from samfast.kernels.hypercomplex.built import check_linear, check_parts, supports

__all__ = ["hypercomplex_linear", "kronecker_weight", "supports"]


def hypercomplex_linear(
    x: Tensor,
    rules: Tensor,
    weights: Tensor | tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    *,
    base: Tensor | None = None,
    scaling: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Linear layer whose matrix is a sum of Kronecker products (PHM, Zhang et al. 2021).

    x: (..., n · Q)   rules: (m, n, n)   weights: (m, P, Q)   bias: (n · P,) or None
    base: (n · P, n · Q) or None
    out: (..., n · P) = x (base + scaling · Σ_i rules_i ⊗ weights_i)ᵀ + bias

    m = n is PHM. m = n = 4 with fixed rules is a quaternion layer. m = 1 with a frozen base is
    KronA, ΔW = scaling · (A ⊗ B) with rules A[None] and weights B[None].
    weights as a pair (left (m, P, k), right (m, Q, k)) is weights_i = left_i right_iᵀ (Compacter,
    Mahabadi et al. 2021). If that takes fewer FLOP a token, it runs as two products of rank
    m · n · k: no matrix is made, and x, their bottleneck and both factors are saved. Otherwise
    weights are made and saved with x.
    The result has x's dtype, or the autocast dtype. The matrix is summed in float32 (float64 for
    float64), rounded once to that dtype for the product, and never kept. Rules, weights, base and
    bias may have other dtypes than x; their gradients have their dtype.
    Saves x and the parameters. Raises ValueError when shapes or dtypes do not fit, and RuntimeError
    when a backend asked for by name cannot run.

        y = hypercomplex_linear(x, rules, weights)

    >>> import torch
    >>> from samfast.functional import hypercomplex_linear
    >>> x, rules, weights = torch.randn(2, 8), torch.randn(4, 4, 4), torch.randn(4, 3, 2)
    >>> hypercomplex_linear(x, rules, weights).shape
    torch.Size([2, 12])
    """
    if isinstance(weights, (tuple, list)):
        left, right = check_pair(weights)
        asked = backends.requested(backend)
        return factored.linear(x, rules, left, right, bias, base, float(scaling), asked)
    check_parts(rules, weights)
    check_linear(x, rules, weights.shape[1:], bias, base)
    check_tensors({"x": x, "weights": weights})
    x = autocast_input(x)
    if backends.requested(backend) == "reference":
        with without_autocast(x.device.type):
            return reference.hypercomplex_linear(x, rules, weights, bias, base, scaling)
    return torch.ops.samfast.hypercomplex_linear(
        x, rules, weights, bias, base, float(scaling), backends.requested(backend)
    )


def kronecker_weight(
    rules: Tensor,
    weights: Tensor | tuple[Tensor, Tensor],
    *,
    scaling: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """scaling · Σ_i rules_i ⊗ weights_i: (n · P, n · Q), of the widest of the dtypes.

    rules: (m, n, n)   weights: (m, P, Q), or a pair (left (m, P, k), right (m, Q, k)) for
        weights_i = left_i right_iᵀ
    Saves rules and weights. Raises ValueError when the shapes do not fit, and RuntimeError when a
    backend asked for by name cannot run.

    >>> import torch
    >>> from samfast.functional import kronecker_weight
    >>> kronecker_weight(torch.randn(4, 4, 4), torch.randn(4, 3, 2)).shape
    torch.Size([12, 8])
    """
    if isinstance(weights, (tuple, list)):
        left, right = check_pair(weights)
        return factored.weight(rules, left, right, float(scaling), backends.requested(backend))
    check_parts(rules, weights)
    check_tensors({"rules": rules, "weights": weights})
    dtype = torch.promote_types(rules.dtype, weights.dtype)
    if backends.requested(backend) == "reference":
        wide = torch.promote_types(dtype, torch.float32)
        with without_autocast(rules.device.type):
            return reference.kronecker_weight(rules.to(wide), weights.to(wide), scaling).to(dtype)
    return torch.ops.samfast.kronecker_weight(
        rules, weights, float(scaling), dtype, backends.requested(backend)
    )


def check_pair(weights) -> tuple[Tensor, Tensor]:
    """Raise ValueError when these are not the two factors of weights."""
    if len(weights) != 2 or not all(isinstance(t, Tensor) for t in weights):
        raise ValueError(
            f"weights is a {type(weights).__name__} of {len(weights)}, but must be a tensor or the "
            "pair (left, right)"
        )
    return tuple(weights)
