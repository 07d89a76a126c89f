# SPDX-License-Identifier: Apache-2.0
"""SAM's transformer block as one operator: backend choice, schemas, autograd."""

from collections.abc import Sequence

from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.operator import Operator
from samfast.kernels._common.table import Table
from samfast.kernels.sam_block import torch_path
from samfast.kernels.sam_block.block import Block
from samfast.kernels.sam_block.plan import Plan, plan_of

TABLE = Table(
    "sam_block",
    __package__,
    absent={
        "cpu": "its stages have no C++ source; torch runs them on a CPU",
        "cuda": "its stages have no CUDA source; triton runs them on a GPU",
    },
)


def supports(backend: str, x: Tensor) -> str | None:
    """None when the backend takes the element-wise stages of this call, or why it does not.

    The products with low rank, the attention and the experts choose their own backends.
    """
    if backend == "reference":
        return "the block has no reference implementation; its modules run one by one instead"
    return TABLE.missing(backend, x.device, x=x.dtype)


def stages_backend(backend: str, x: Tensor) -> str:
    """The backend of the element-wise stages in a block whose parts run on ``backend``."""
    return TABLE.choose(TABLE.part(backend), x.device, lambda b: supports(b, x))


class SamBlock(Operator):
    """Saves x and what the plan's memory keeps of the forward; parameters cost nothing."""

    name = "sam_block"
    inputs = "Tensor x, Tensor?[] tensors, str plan, float[] numbers, str backend"
    makes = (
        "Tensor y, Tensor[] aux, Tensor[] kept, Tensor[] qkv, Tensor[] proj, Tensor[] lin1, "
        "Tensor[] lin2, Tensor[] side"
    )
    returns = "y aux"
    backward_inputs = (
        "Tensor dy, Tensor?[] daux, Tensor[] kept, Tensor[] qkv, Tensor[] proj, Tensor[] lin1, "
        f"Tensor[] lin2, Tensor[] side, {inputs}, bool[] needs"
    )
    gradients = "x tensors"
    fake_path = torch_path, "torch"
    planned = True

    @staticmethod
    def path(backend, x, **_):
        """The stages, and what runs the block's parts."""
        return TABLE.path(TABLE.part(backend), x.device, lambda b: supports(b, x)), backend

    @staticmethod
    def forward(path, x, tensors, plan, numbers):
        plan = plan_of(plan, numbers)
        plan.check(x, tensors)
        y, aux, kept, of_layers = _block(path, x, tensors, plan).forward(plan.memory)
        return y, aux, kept, *of_layers

    @staticmethod
    def light(path, x, tensors, plan, numbers):
        plan = plan_of(plan, numbers)
        plan.check(x, tensors)
        return _block(path, x, tensors, plan).forward(None)[:2]

    @staticmethod
    def backward(
        path, dy, daux, kept, qkv, proj, lin1, lin2, side, x, tensors, plan, numbers, needs
    ):
        block = _block(path, x, tensors, plan_of(plan, numbers), needs)
        grads = block.backward(dy, daux, kept, [qkv, proj, lin1, lin2, side])
        return [g if need else None for g, need in zip(grads, needs, strict=True)]


def _block(path, x, tensors, plan, needs=None) -> Block:
    stages, backend = path
    return Block(x, tensors, plan, backend, stages, needs)


def sam_block(
    x: Tensor, tensors: Sequence[Tensor | None], plan: Plan, backend: str = "auto"
) -> tuple[Tensor, list[Tensor]]:
    """SAM's transformer block on images in image order, with a hand-written backward.

    x: (B, H, W, D), any strides; of a dtype that products take, or plan.dtype names theirs
    tensors: as ``plan`` describes them; tables (2 · side − 1, head_dim), fitted to the window
    y: (B, H, W, D), in the wider of x's dtype and the products'
    aux: one scalar for each layer's middle map, or empty

    Saves, in elements per token, x, qkv (3 · D), the attention's out, x1 and GELU's input (4 · D),
    one number per head, and the adapters' z: a little more than 10 · D, and V more for a side.
    "balanced" saves x, out and x1, "minimal" only x. The rest is computed again, to the same bits.
    Raises ValueError when tensors are on several devices or an adapter's shapes do not fit, and
    RuntimeError when a backend asked for by name cannot run.
    """
    plan.check_constants(tensors)
    return SamBlock.call(x, list(tensors), plan.key, plan.numbers, backends.requested(backend))
