# SPDX-License-Identifier: Apache-2.0
"""SAM's transformer block as one operator: backend choice, schemas, autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.once import once_differentiable
from samfast.kernels.sam_block import torch_path
from samfast.kernels.sam_block.block import Block
from samfast.kernels.sam_block.plan import Plan, plan_of


def supports(backend: str, x: Tensor) -> str | None:
    """None when the backend takes the element-wise stages of this call, or why it does not.

    The products with low rank, the attention and the experts have choices of their own.
    """
    if backend == "torch":
        return None
    if backend == "reference":
        return "the block has no reference of its own; its modules run one by one for it"
    if backend == "cpu":
        return "its stages have no C++ source; torch runs them on a CPU"
    if backend == "cuda":
        return "its stages have no CUDA source; triton runs them on a GPU"
    if (missing := backends.triton_missing(x.device)) is not None:
        return missing
    if x.dtype == torch.float64:
        return "x is torch.float64, but the kernels take float32, float16 and bfloat16"
    return None


def stages_backend(backend: str, x: Tensor) -> str:
    """What runs the element-wise stages where the block's parts run on ``backend``."""
    stand_in = {"cpu": "torch", "cuda": "triton"}
    return backends.resolve(
        "sam_block", stand_in.get(backend, backend), x.device, lambda b: supports(b, x)
    )


def _stages(backend: str, x: Tensor):
    if stages_backend(backend, x) == "triton":
        from samfast.kernels.sam_block import triton_kernels

        return triton_kernels
    return torch_path


_INPUTS = "Tensor x, Tensor?[] tensors, str plan, float[] numbers, str backend"
_KEPT = "Tensor[] kept, Tensor[] qkv, Tensor[] proj, Tensor[] lin1, Tensor[] lin2, Tensor[] side"
torch.library.define("samfast::sam_block", f"({_INPUTS}) -> (Tensor, Tensor[])")
torch.library.define(
    "samfast::sam_block_forward",
    f"({_INPUTS}) -> (Tensor, Tensor[]{', Tensor[]' * _KEPT.count('[]')})",
)
torch.library.define(
    "samfast::sam_block_backward",
    f"(Tensor dy, Tensor?[] daux, {_KEPT}, {_INPUTS}, bool[] needs) -> Tensor[]",
)


def _forward(stages, x, tensors, plan, numbers, backend):
    plan = plan_of(plan, numbers)
    with without_autocast(x.device.type):
        block = Block(x, tensors, plan, backend, stages)
        y, aux, kept, of_layers = block.forward(plan.memory)
    return y, aux, kept, *of_layers


def _backward(
    stages, dy, daux, kept, qkv, proj, lin1, lin2, side, x, tensors, plan, numbers, backend, needs
):
    with without_autocast(x.device.type):
        block = Block(x, tensors, plan_of(plan, numbers), backend, stages, needs)
        grads = block.backward(dy, daux, kept, [qkv, proj, lin1, lin2, side])
    return [g for g, need in zip(grads, needs, strict=True) if need]


@implement("samfast::sam_block_forward")
def _forward_impl(x, tensors, plan, numbers, backend):
    return _forward(_stages(backend, x), x, tensors, plan, numbers, backend)


@torch.library.register_fake("samfast::sam_block_forward")
def _forward_fake(x, tensors, plan, numbers, backend):
    return _forward(torch_path, x, tensors, plan, numbers, "torch")


@implement("samfast::sam_block_backward")
def _backward_impl(dy, daux, kept, qkv, proj, lin1, lin2, side, x, *rest):
    stages = _stages(rest[3], x)
    return _backward(stages, dy, daux, kept, qkv, proj, lin1, lin2, side, x, *rest)


@torch.library.register_fake("samfast::sam_block_backward")
def _backward_fake(dy, daux, kept, qkv, proj, lin1, lin2, side, x, tensors, *rest):
    needs = rest[-1]
    return [t.new_empty(t.shape) for t, need in zip((x, *tensors), needs, strict=True) if need]


@implement("samfast::sam_block")
def _impl(x, tensors, plan, numbers, backend):
    with without_autocast(x.device.type):
        block = Block(x, tensors, plan_of(plan, numbers), backend, _stages(backend, x))
        return block.forward(None)[:2]


@torch.library.register_fake("samfast::sam_block")
def _fake(x, tensors, plan, numbers, backend):
    return _forward(torch_path, x, tensors, plan, numbers, "torch")[:2]


class SamBlockFunction(torch.autograd.Function):
    """Saves x and what the plan's memory keeps of the forward; parameters cost nothing."""

    @staticmethod
    def forward(ctx, plan, numbers, backend, x, *tensors):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            y, aux, *kept = torch.ops.samfast.sam_block_forward(x, tensors, plan, numbers, backend)
        ctx.save_for_backward(x, *tensors, *(t for part in kept for t in part))
        ctx.options, ctx.count = (plan, numbers, backend), len(tensors)
        ctx.lengths = [*map(len, kept)]
        ctx.shape, ctx.dtype = y.shape, y.dtype
        ctx.set_materialize_grads(False)
        return y, *aux

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *daux):
        x, *rest = ctx.saved_tensors
        tensors, rest = rest[: ctx.count], rest[ctx.count :]
        kept = []
        for length in ctx.lengths:
            kept.append(rest[:length])
            rest = rest[length:]
        needs = ctx.needs_input_grad[3:]
        used = next((d for d in (dy, *daux) if d is not None), None)
        if used is None:
            return (None,) * (3 + len(needs))
        if dy is None:  # only aux was used
            dy = used.new_zeros((), dtype=ctx.dtype).expand(ctx.shape)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            made = iter(
                torch.ops.samfast.sam_block_backward(
                    dy, daux, *kept, x, tensors, *ctx.options, needs
                )
            )
        return None, None, None, *(next(made) if need else None for need in needs)


@torch.library.impl("samfast::sam_block", "Autograd")
def _autograd(x, tensors, plan, numbers, backend):
    wanted = any(t is not None and t.requires_grad for t in (x, *tensors))
    if not (wanted and torch.is_grad_enabled()):  # nothing is kept, not for a moment either
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return torch.ops.samfast.sam_block(x, tensors, plan, numbers, backend)
    y, *aux = SamBlockFunction.apply(plan, numbers, backend, x, *tensors)
    return y, aux


def sam_block(
    x: Tensor, tensors: Sequence[Tensor | None], plan: Plan, backend: str = "auto"
) -> tuple[Tensor, list[Tensor]]:
    """SAM's transformer block on images in image order, forwards and backwards by hand.

    x: (B, H, W, D), of a dtype that products take as it is or plan.dtype names; any strides
    tensors: as ``plan`` describes them; tables (2 · side − 1, head_dim), fitted to the window
    y: (B, H, W, D), in the wider of x's dtype and the products'   aux: of the layers' middle maps,
        a scalar each, or empty

    Saves, in elements per token, x, qkv (3 · D), the attention's out, x1 and GELU's input (4 · D),
    one number per head, and the adapters' pieces of rank r: 10 · D and little more, V more for a
    side. "balanced" saves x, out and x1, "minimal" x; the rest is computed again, to the same bits.
    Raises ValueError when tensors are on several devices or an adapter's do not chain, RuntimeError
    when a backend asked for by name cannot run.
    """
    plan.check(x, tensors)
    return torch.ops.samfast.sam_block(
        x, list(tensors), plan.key, plan.numbers, backends.requested(backend)
    )
