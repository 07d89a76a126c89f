# SPDX-License-Identifier: Apache-2.0
"""``task_cores``: the cores of all tasks in all layers from one batched operation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samfast import backends
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.once import once_differentiable
from samfast.kernels.task_core import reference
from samfast.kernels.task_core.paths import DTYPES, path_of

# The gathered cores and factors of all layers are what the backward needs: no second gathering.
_INPUTS = "Tensor[] cores, Tensor[] factors, int parts, str backend"
torch.library.define("samfast::task_cores", f"({_INPUTS}) -> Tensor")
torch.library.define("samfast::task_cores_forward", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "samfast::task_cores_backward", "(Tensor dm, Tensor gathered, str backend) -> (Tensor, Tensor)"
)


@implement("samfast::task_cores_forward")
def _forward_impl(cores, factors, parts, backend):
    gathered = torch.cat([t.reshape(-1) for t in (*cores, *factors)])
    path = path_of(backend, gathered, cores[0][..., 0])
    with without_autocast(gathered.device.type):
        m = path.fold(*_views(gathered, len(cores), *cores[0].shape[:2], len(factors[0])))
    return _repeated(m, parts), gathered


@torch.library.register_fake("samfast::task_cores_forward")
def _forward_fake(cores, factors, parts, backend):
    (rows, columns, _), kinds = cores[0].shape, (cores[0].dtype, factors[0].dtype)
    kind = torch.promote_types(*kinds)
    gathered = cores[0].new_empty(sum(t.numel() for t in (*cores, *factors)), dtype=kind)
    wide = torch.promote_types(kind, torch.float32)
    m = gathered.new_empty(len(cores), len(factors[0]), rows, columns, dtype=wide)
    return _repeated(m, parts), gathered


@implement("samfast::task_cores_backward")
def _backward_impl(dm, gathered, backend):
    layers, _, tasks, rows, columns = dm.shape
    path = path_of(backend, gathered, dm)
    with without_autocast(dm.device.type):
        return path.fold_backward(dm, *_views(gathered, layers, rows, columns, tasks))


@torch.library.register_fake("samfast::task_cores_backward")
def _backward_fake(dm, gathered, backend):
    layers, _, tasks, rows, columns = dm.shape
    cores, factors = _views(gathered, layers, rows, columns, tasks)
    return dm.new_empty(cores.shape), dm.new_empty(factors.shape)


@implement("samfast::task_cores")
def _impl(*args):
    return torch.ops.samfast.task_cores_forward(*args)[0]


@torch.library.register_fake("samfast::task_cores")
def _fake(*args):
    return _forward_fake(*args)[0]


class TaskCoresFunction(torch.autograd.Function):
    """Saves the parameters, gathered."""

    @staticmethod
    def forward(ctx, count, parts, backend, *tensors):
        cores, factors = tensors[:count], tensors[count:]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            m, gathered = torch.ops.samfast.task_cores_forward(cores, factors, parts, backend)
        ctx.save_for_backward(gathered)
        ctx.count, ctx.backend, ctx.dtypes = count, backend, (cores[0].dtype, factors[0].dtype)
        return m

    @staticmethod
    @once_differentiable
    def backward(ctx, dm):
        (gathered,) = ctx.saved_tensors  # a checkpoint computes again here, with autograd
        with torch._C._AutoDispatchBelowADInplaceOrView():
            stacked = torch.ops.samfast.task_cores_backward(dm, gathered, ctx.backend)
        grads = [g.to(dtype) for g, dtype in zip(stacked, ctx.dtypes, strict=True)]
        given = (part for whole in grads for part in whole.unbind())
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *(g if n else None for g, n in zip(given, needs, strict=True))


@torch.library.impl("samfast::task_cores", "Autograd")
def _autograd(cores, factors, parts, backend):
    return TaskCoresFunction.apply(len(cores), parts, backend, *cores, *factors)


def _repeated(m, parts):
    """(N, T, R1, R2) -> (N, P, T, R1, R2) without memory for it."""
    return m[:, None].expand(-1, parts, -1, -1, -1)


def _views(gathered, layers, rows, columns, tasks):
    """cores (N, R1, R2, R3) and factors (N, T, R3) of what was gathered."""
    depth = gathered.numel() // (layers * (rows * columns + tasks))
    cores, factors = gathered.split([layers * rows * columns * depth, layers * tasks * depth])
    return cores.view(layers, rows, columns, depth), factors.view(layers, tasks, depth)


def task_cores(
    cores: Sequence[Tensor], factors: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """The cores that tasks have in layers (TA-LoRA): M_t = Σ_v U3[t, v] G[:, :, v].

    cores: N of G (R1, R2, R3)   factors: N of U3 (T, R3)
    Returns N of (P, T, R1, R2), float32 (float64 for float64): M, P times without memory for it.
    Whoever uses such an M reads M[0] and writes P parts of its gradient, which are added here: so
    no layer has a launch for that. P is 1 on a CPU and 32 where kernels of a GPU run.
    Saves a gathered copy of cores and factors. Raises ValueError when the shapes do not fit.
    """
    check_cores(cores, factors)
    asked = backends.requested(backend)
    if asked == "reference":
        wide = torch.promote_types(
            torch.promote_types(cores[0].dtype, factors[0].dtype), torch.float32
        )
        with without_autocast(cores[0].device.type):
            pairs = zip(cores, factors, strict=True)
            return tuple(reference.task_cores(g.to(wide), u.to(wide))[None] for g, u in pairs)
    parts = path_of(asked, cores[0], cores[0][..., 0]).PARTS
    return torch.ops.samfast.task_cores(list(cores), list(factors), parts, asked).unbind()


def check_cores(cores: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Raise one sentence when the layers' tensors are not alike or do not chain."""
    if len(cores) != len(factors) or not cores:
        raise ValueError(
            f"{len(cores)} cores and {len(factors)} factors are not of the same layers"
        )
    core, factor = cores[0], factors[0]
    if core.dim() != 3 or 0 in core.shape:
        raise ValueError(f"a core has shape {tuple(core.shape)}, but must be (R1, R2, R3)")
    if factor.dim() != 2 or factor.shape[0] == 0 or factor.shape[1] != core.shape[2]:
        raise ValueError(
            f"a task factor has shape {tuple(factor.shape)}, but the core "
            f"{tuple(core.shape)} needs (tasks, {core.shape[2]})"
        )
    for name, tensors in (("core", cores), ("task factor", factors)):
        for t in tensors:
            if t.shape != tensors[0].shape:
                raise ValueError(
                    f"one {name} has shape {tuple(t.shape)} and another "
                    f"{tuple(tensors[0].shape)}; they must be alike"
                )
            if t.dtype != tensors[0].dtype:
                raise ValueError(
                    f"one {name} is {t.dtype} and another {tensors[0].dtype}; they must be alike"
                )
            if t.device != core.device:
                raise ValueError(f"a {name} is on {t.device} but the first core on {core.device}")
            if t.dtype not in DTYPES:
                raise ValueError(
                    f"a {name} is {t.dtype}, but must be float16, bfloat16, float32 or float64"
                )
