# SPDX-License-Identifier: Apache-2.0
"""``kronecker_factors``: a sum of Kronecker products of low rank as the two factors of LoRA."""

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.once import once_differentiable
from samfast.kernels.hypercomplex import reference, torch_factors
from samfast.kernels.hypercomplex.op import MAX_ELEMENTS, check_tensors


def supports(
    backend: str, device: torch.device, dtype: torch.dtype, elements: int = 0
) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not.

    elements: of the larger factor
    """
    if backend in ("reference", "torch"):
        return None
    if backend == "cpu":
        return "the factors have no C++ source; torch makes them on a CPU"
    if backend == "cuda":
        return "the factors have no CUDA source; triton makes them on a GPU"
    if (missing := backends.triton_missing(device)) is not None:
        return missing
    if dtype == torch.float64:
        return "the factors are torch.float64, but the kernels take float32, float16 and bfloat16"
    if elements >= MAX_ELEMENTS:
        return f"a factor has {elements} elements, but the kernels count less than {MAX_ELEMENTS}"
    return None


def factors_backend(
    backend: str, device: torch.device, dtype: torch.dtype, elements: int = 0
) -> str:
    """What makes the factors where the layer around them runs on ``backend``."""
    stand_in = {"cpu": "torch", "cuda": "triton"}
    return backends.resolve(
        "kronecker_factors",
        stand_in.get(backend, backend),
        device,
        lambda b: supports(b, device, dtype, elements),
    )


def _path(backend, rules, left, right):
    sizes = rules.shape[1] * left.shape[1], rules.shape[1] * right.shape[1]
    elements = rules.shape[0] * rules.shape[1] * left.shape[2] * max(sizes)
    if factors_backend(backend, rules.device, _dtype(rules, left, right), elements) == "triton":
        from samfast.kernels.hypercomplex import triton_factors

        return triton_factors
    return torch_factors


def _dtype(rules, left, right):
    return torch.promote_types(rules.dtype, torch.promote_types(left.dtype, right.dtype))


_PARTS = "Tensor rules, Tensor left, Tensor right"
torch.library.define("samfast::kronecker_factors", f"({_PARTS}, str backend) -> (Tensor, Tensor)")
torch.library.define(
    "samfast::kronecker_factors_backward",
    f"(Tensor? da, Tensor? db, {_PARTS}, bool[] needs, str backend) -> Tensor[]",
)


@implement("samfast::kronecker_factors")
def _impl(rules, left, right, backend):
    path = _path(backend, rules, left, right)
    with without_autocast(rules.device.type):
        return path.forward(rules, left, right, _dtype(rules, left, right))


@torch.library.register_fake("samfast::kronecker_factors")
def _fake(rules, left, right, backend):
    (terms, n, _), (_, rows, rank), columns = rules.shape, left.shape, right.shape[1]
    width, dtype = terms * n * rank, _dtype(rules, left, right)
    return (
        rules.new_empty(width, n * columns, dtype=dtype),
        rules.new_empty(n * rows, width, dtype=dtype),
    )


@implement("samfast::kronecker_factors_backward")
def _backward_impl(da, db, rules, left, right, needs, backend):
    path = _path(backend, rules, left, right)
    da, db = (None if d is None else d.contiguous() for d in (da, db))
    with without_autocast(rules.device.type):
        grads = path.backward(da, db, rules, left, right, needs)
    return [g for g in grads if g is not None]


@torch.library.register_fake("samfast::kronecker_factors_backward")
def _backward_fake(da, db, rules, left, right, needs, backend):
    parts = zip((rules, left, right), needs, strict=True)
    return [t.new_empty(t.shape) for t, need in parts if need]


class KroneckerFactorsFunction(torch.autograd.Function):
    """Saves its three inputs, which are parameters."""

    @staticmethod
    def forward(ctx, rules, left, right, backend):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            made = torch.ops.samfast.kronecker_factors(rules, left, right, backend)
        ctx.save_for_backward(rules, left, right)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx, da, db):
        # rules and left stand in lora_b alone, right in lora_a alone
        given = (db is not None, db is not None, da is not None)
        needs = [need and there for need, there in zip(ctx.needs_input_grad, given, strict=False)]
        if not any(needs):
            return (None,) * 4
        saved = ctx.saved_tensors  # a checkpoint computes again here, with autograd
        with torch._C._AutoDispatchBelowADInplaceOrView():
            grads = iter(
                torch.ops.samfast.kronecker_factors_backward(da, db, *saved, needs, ctx.backend)
            )
        return *(next(grads) if need else None for need in needs), None


@torch.library.impl("samfast::kronecker_factors", "Autograd")
def _autograd(*args):
    return KroneckerFactorsFunction.apply(*args)


def kronecker_factors(
    rules: Tensor, left: Tensor, right: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Factors of Σ_i rules_i ⊗ (left_i right_iᵀ), so that plain LoRA runs it.

    rules: (m, n, n)   left: (m, P, k)   right: (m, Q, k)
    lora_a: (m · n · k, n · Q) = the blocks of I_n ⊗ right_iᵀ below each other
    lora_b: (n · P, m · n · k) = the blocks rules_i ⊗ left_i beside each other
    lora_b @ lora_a = Σ_i rules_i ⊗ (left_i right_iᵀ), of the widest of the three dtypes

    Saves its inputs. Raises ValueError when the shapes do not chain.
    """
    check_factors(rules, left, right)
    if backends.requested(backend) == "reference":
        dtype = _dtype(rules, left, right)
        with without_autocast(rules.device.type):
            return reference.kronecker_factors(*(t.to(dtype) for t in (rules, left, right)))
    return torch.ops.samfast.kronecker_factors(rules, left, right, backends.requested(backend))


def check_factors(rules: Tensor, left: Tensor, right: Tensor) -> None:
    """Raise one sentence when the three do not chain."""
    if rules.dim() != 3 or rules.shape[1] != rules.shape[2] or 0 in rules.shape:
        raise ValueError(f"rules has shape {tuple(rules.shape)}, but must be (terms, n, n)")
    terms = rules.shape[0]
    for name, t in (("left", left), ("right", right)):
        if t.dim() != 3 or 0 in t.shape or t.shape[0] != terms or t.shape[2] != left.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, but {terms} terms need ({terms}, size, rank), "
                "of one rank for left and right"
            )
    check_tensors({"rules": rules, "left": left, "right": right})
