# SPDX-License-Identifier: Apache-2.0
"""``hypercomplex_linear`` and ``kronecker_weight``: backend choice, operator schemas, autograd and
the public functions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.autocast import autocast_input, without_autocast
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.once import once_differentiable
from samfast.kernels.hypercomplex import reference, torch_path

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_ELEMENTS = 2**30  # of one of the weights; the kernels count them in 32 bits


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
    for name, kind in named.items():
        if kind == torch.float64:
            return f"{name} is {kind}, but the kernels take float32, float16 and bfloat16"
    if (elements := weights.shape[1] * weights.shape[2]) >= MAX_ELEMENTS:
        return f"weights are of {elements} elements, but the kernels count less than {MAX_ELEMENTS}"
    if backend == "cpu":
        return backends.cpu_missing(device, dtype, "hypercomplex_build")
    if backend == "cuda":
        from samfast.kernels.hypercomplex import cuda_path

        return cuda_path.missing(device, rules.shape[0])
    if (missing := backends.triton_missing(device)) is not None:
        return missing
    from samfast.kernels.hypercomplex import triton_kernels

    if rules.shape[0] > triton_kernels.MAX_TERMS:
        return f"{rules.shape[0]} terms are more than {triton_kernels.MAX_TERMS}, the widest tile"
    return None


def path_of(backend, device, dtype, rules, weights, base=None):
    name = backends.resolve(
        "hypercomplex",
        backend,
        device,
        lambda b: supports(b, device, dtype, rules, weights, base),
    )
    if name == "reference":
        raise RuntimeError("backend 'reference' is plain autograd; call hypercomplex_linear for it")
    if name == "cpu":
        from samfast.kernels.hypercomplex import cpu_path

        return cpu_path
    if name == "cuda":
        from samfast.kernels.hypercomplex import cuda_path

        return cuda_path
    if name == "triton":
        from samfast.kernels.hypercomplex import triton_kernels

        return triton_kernels
    return torch_path


_PARTS = "Tensor rules, Tensor weights"
_LINEAR = f"Tensor x, {_PARTS}, Tensor? bias, Tensor? base, float scaling, str backend"
torch.library.define(
    "samfast::kronecker_weight",
    f"({_PARTS}, float scaling, ScalarType dtype, str backend) -> Tensor",
)
torch.library.define(
    "samfast::kronecker_weight_backward",
    f"(Tensor dh, {_PARTS}, float scaling, bool[] needs, str backend) -> Tensor[]",
)
torch.library.define("samfast::hypercomplex_linear", f"({_LINEAR}) -> Tensor")
torch.library.define(
    "samfast::hypercomplex_linear_backward",
    f"(Tensor dy, Tensor? x, {_PARTS}, Tensor? base, float scaling, ScalarType bias_dtype, "
    "bool[] needs, str backend) -> Tensor[]",
)


@implement("samfast::kronecker_weight")
def _weight_impl(rules, weights, scaling, dtype, backend):
    path = path_of(backend, rules.device, dtype, rules, weights)
    with without_autocast(rules.device.type):
        return path.build(rules, weights, None, scaling, dtype)


@torch.library.register_fake("samfast::kronecker_weight")
def _weight_fake(rules, weights, scaling, dtype, backend):
    n = rules.shape[1]
    return weights.new_empty(n * weights.shape[1], n * weights.shape[2], dtype=dtype)


@implement("samfast::kronecker_weight_backward")
def _weight_backward_impl(dh, rules, weights, scaling, needs, backend):
    path = path_of(backend, dh.device, dh.dtype, rules, weights)
    with without_autocast(dh.device.type):
        grads = path.contract(dh.contiguous(), rules, weights, scaling, needs)
    return [g for g in grads if g is not None]


@torch.library.register_fake("samfast::kronecker_weight_backward")
def _weight_backward_fake(dh, rules, weights, scaling, needs, backend):
    return [t.new_empty(t.shape) for t, need in zip((rules, weights), needs, strict=True) if need]


class KroneckerWeightFunction(torch.autograd.Function):
    """Saves rules and weights."""

    @staticmethod
    def forward(ctx, rules, weights, scaling, dtype, backend):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            h = torch.ops.samfast.kronecker_weight(rules, weights, scaling, dtype, backend)
        ctx.save_for_backward(rules, weights)
        ctx.options = scaling, backend
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        scaling, backend = ctx.options
        needs = ctx.needs_input_grad[:2]
        saved = ctx.saved_tensors  # a checkpoint computes again here, with autograd
        with torch._C._AutoDispatchBelowADInplaceOrView():
            grads = iter(
                torch.ops.samfast.kronecker_weight_backward(dh, *saved, scaling, needs, backend)
            )
        return *(next(grads) if need else None for need in needs), None, None, None


@torch.library.impl("samfast::kronecker_weight", "Autograd")
def _weight_autograd(*args):
    return KroneckerWeightFunction.apply(*args)


@implement("samfast::hypercomplex_linear")
def _impl(x, rules, weights, bias, base, scaling, backend):
    path = path_of(backend, x.device, x.dtype, rules, weights, base)
    with without_autocast(x.device.type):
        h = path.build(rules, weights, base, scaling, x.dtype)
        y = F.linear(_rows(x), h, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], y.shape[-1])


@torch.library.register_fake("samfast::hypercomplex_linear")
def _fake(x, rules, weights, *rest):
    return x.new_empty(*x.shape[:-1], rules.shape[1] * weights.shape[1])


@implement("samfast::hypercomplex_linear_backward")
def _backward_impl(dy, x, rules, weights, base, scaling, bias_dtype, needs, backend):
    need_x, need_rules, need_weights, need_bias, need_base = needs
    path = path_of(backend, dy.device, dy.dtype, rules, weights, base)
    shape, dy, grads = dy.shape, _rows(dy), []
    with without_autocast(dy.device.type):
        if need_x:
            h = path.build(rules, weights, base, scaling, dy.dtype)
            dx = torch.mm(dy, h)
            grads.append(dx.view(*shape[:-1], dx.shape[-1]))
            del h
        if need_rules or need_weights or need_base:
            dh = torch.mm(dy.t(), _rows(x))
            grads += path.contract(dh, rules, weights, scaling, (need_rules, need_weights))
        if need_bias:
            wide = torch.promote_types(dy.dtype, bias_dtype)
            grads.append(dy.sum(0, dtype=wide).to(bias_dtype))
        if need_base:
            grads.append(dh.to(base.dtype))
    return [g for g in grads if g is not None]


@torch.library.register_fake("samfast::hypercomplex_linear_backward")
def _backward_fake(dy, x, rules, weights, base, scaling, bias_dtype, needs, backend):
    inputs = rules.shape[1] * weights.shape[2]
    need_x, need_rules, need_weights, need_bias, need_base = needs
    made = [dy.new_empty(*dy.shape[:-1], inputs)] if need_x else []
    made += [rules.new_empty(rules.shape)] if need_rules else []
    made += [weights.new_empty(weights.shape)] if need_weights else []
    made += [dy.new_empty(dy.shape[-1], dtype=bias_dtype)] if need_bias else []
    return made + ([base.new_empty(base.shape)] if need_base else [])


class HypercomplexLinearFunction(torch.autograd.Function):
    """Saves x, where a parameter wants a gradient, and the parameters; H is built again."""

    @staticmethod
    def forward(ctx, x, rules, weights, bias, base, scaling, backend):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            y = torch.ops.samfast.hypercomplex_linear(
                x, rules, weights, bias, base, scaling, backend
            )
        _, need_rules, need_weights, _, need_base = ctx.needs_input_grad[:5]
        wanted = need_rules or need_weights or need_base
        ctx.save_for_backward(x if wanted else None, rules, weights, base)
        ctx.bias_dtype = x.dtype if bias is None else bias.dtype
        ctx.options = scaling, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        scaling, backend = ctx.options
        needs = ctx.needs_input_grad[:5]
        saved = ctx.saved_tensors  # a checkpoint computes again here, with autograd
        with torch._C._AutoDispatchBelowADInplaceOrView():
            grads = iter(
                torch.ops.samfast.hypercomplex_linear_backward(
                    dy, *saved, scaling, ctx.bias_dtype, needs, backend
                )
            )
        return *(next(grads) if need else None for need in needs), None, None


@torch.library.impl("samfast::hypercomplex_linear", "Autograd")
def _autograd(*args):
    return HypercomplexLinearFunction.apply(*args)


def _rows(t):
    """(tokens, features); the number of rows is spelt out for tensors without elements."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


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

    m = n is PHM, m = n = 4 with fixed rules a quaternion layer, m = 1 beside a frozen base KronA,
    ΔW = scaling · (A ⊗ B) with rules A[None] and weights B[None].
    weights as a pair (left (m, P, k), right (m, Q, k)) is weights_i = left_i right_iᵀ (Compacter,
    Mahabadi et al. 2021). Where that is fewer FLOP a token it runs as two products of rank
    m · n · k, no matrix is made, and x, their bottleneck and both factors are saved; where not,
    weights are made and saved with x.
    The result has x's dtype, or the autocast dtype; the matrix is summed in float32 (float64 for
    float64), rounded once to that dtype for the product, and never kept. Rules, weights, base and
    bias may be of other dtypes than x; their gradients come in their own.
    Saves x and the parameters. Raises ValueError when shapes or dtypes do not fit, RuntimeError
    when a backend asked for by name cannot run.
    """
    if isinstance(weights, (tuple, list)):
        left, right = check_pair(weights)
        asked = backends.requested(backend)
        return _factored().linear(x, rules, left, right, bias, base, float(scaling), asked)
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
    Saves rules and weights. Raises ValueError when the shapes do not chain.
    """
    if isinstance(weights, (tuple, list)):
        left, right = check_pair(weights)
        return _factored().weight(rules, left, right, float(scaling), backends.requested(backend))
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


def _factored():
    from samfast.kernels.hypercomplex import factored  # which calls the operators of this file

    return factored


def check_pair(weights) -> tuple[Tensor, Tensor]:
    """Raise one sentence when these are not the two factors of weights."""
    if len(weights) != 2 or not all(isinstance(t, Tensor) for t in weights):
        raise ValueError(
            f"weights is a {type(weights).__name__} of {len(weights)}, but must be a tensor or the "
            "pair (left, right)"
        )
    return tuple(weights)


def check_parts(rules: Tensor, weights: Tensor) -> None:
    """Raise one sentence when rules (m, n, n) do not go with weights (m, P, Q)."""
    if rules.dim() != 3 or rules.shape[1] != rules.shape[2] or 0 in rules.shape:
        raise ValueError(f"rules has shape {tuple(rules.shape)}, but must be (terms, n, n)")
    if weights.dim() != 3 or 0 in weights.shape or weights.shape[0] != rules.shape[0]:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, but rules {tuple(rules.shape)} needs "
            f"({rules.shape[0]}, outputs / {rules.shape[1]}, inputs / {rules.shape[1]})"
        )


def check_tensors(named: dict[str, Tensor | None]) -> None:
    """Raise one sentence when they are not on the first one's device or of no known dtype."""
    first, *_ = named
    for name, t in named.items():
        if t is None:
            continue
        if t.device != named[first].device:
            raise ValueError(f"{name} is on {t.device} but {first} is on {named[first].device}")
        if t.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {t.dtype}, but must be float16, bfloat16, float32 or float64"
            )


def check_linear(x, rules, part, bias, base) -> None:
    """Raise one sentence when x, bias and base do not go with weights whose parts are (P, Q)."""
    n = rules.shape[1]
    outputs, inputs = n * part[0], n * part[1]
    if x.dim() == 0:
        raise ValueError("x is a single number, but must be (..., features)")
    if x.shape[-1] % n:
        raise ValueError(f"x has {x.shape[-1]} features, which n = {n} does not divide")
    if x.shape[-1] != inputs:
        raise ValueError(f"x has shape {tuple(x.shape)} but rules and weights take {inputs} inputs")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)} but there are {outputs} outputs")
    if base is not None and tuple(base.shape) != (outputs, inputs):
        raise ValueError(
            f"base has shape {tuple(base.shape)} but rules and weights make ({outputs}, {inputs})"
        )
    check_tensors({"x": x, "rules": rules, "bias": bias, "base": base})
