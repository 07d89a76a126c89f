# SPDX-License-Identifier: Apache-2.0
"""``task_cores``: the cores of all tasks in all layers from one batched operation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import check_dtypes
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.operator import Operator
from samfast.kernels.task_core import reference
from samfast.kernels.task_core.paths import path_of


class TaskCores(Operator):
    """Saves nothing but the parameters, which cost nothing and are gathered again."""

    name = "task_cores"
    inputs = "Tensor[] cores, Tensor[] factors, str backend"
    makes = "Tensor m"
    backward_inputs = "Tensor dm, Tensor[] cores, Tensor[] factors, str backend"
    backward_makes = "(Tensor, Tensor)"
    gradients = casts = "cores factors"

    @staticmethod
    def path(backend, cores, dm=None, **_):
        return path_of(backend, cores[0], cores[0][..., 0] if dm is None else dm)

    @staticmethod
    def forward(path, cores, factors):
        return _repeated(path.fold(*_gathered(cores, factors)), path.PARTS)

    @staticmethod
    def backward(path, dm, cores, factors):
        return path.fold_backward(dm, *_gathered(cores, factors))

    @staticmethod
    def fake(cores, factors, backend):
        parts = path_of(backend, cores[0], cores[0][..., 0]).PARTS
        kind = torch.promote_types(cores[0].dtype, factors[0].dtype)
        wide = torch.promote_types(kind, torch.float32)
        shape = len(cores), len(factors[0]), *cores[0].shape[:2]
        return _repeated(cores[0].new_empty(shape, dtype=wide), parts)

    @staticmethod
    def fake_backward(dm, cores, factors, backend):
        shapes = ((len(tensors), *tensors[0].shape) for tensors in (cores, factors))
        return tuple(dm.new_empty(shape) for shape in shapes)


def _repeated(m, parts):
    """(N, T, R1, R2) -> (N, P, T, R1, R2) without memory for it."""
    return m[:, None].expand(-1, parts, -1, -1, -1)


def _gathered(cores, factors):
    """cores (N, R1, R2, R3) and factors (N, T, R3), by one launch."""
    whole = torch.cat([t.reshape(-1) for t in (*cores, *factors)])
    shapes = [(len(tensors), *tensors[0].shape) for tensors in (cores, factors)]
    parts = whole.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def task_cores(
    cores: Sequence[Tensor], factors: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """The cores of all tasks in all layers (TA-LoRA): M_t = Σ_v U3[t, v] G[:, :, v].

    cores: N of G (R1, R2, R3)   factors: N of U3 (T, R3)
    Returns N of (P, T, R1, R2), float32 (float64 for float64): M, expanded P times without memory.
    A user of such an M reads M[0] and writes P parts of its gradient. They are added here, so no
    layer has a launch for that. P is 1 on a CPU and 32 where kernels of a GPU run.
    Saves only cores and factors. Raises ValueError when the shapes do not fit, and RuntimeError
    when a backend asked for by name cannot run.

        m = task_cores([core], [factor_task])[0]

    >>> import torch
    >>> from samfast.functional import task_cores
    >>> made = task_cores([torch.randn(8, 6, 4)], [torch.randn(3, 4)], backend="reference")
    >>> made[0].shape
    torch.Size([1, 3, 8, 6])
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
    return torch.ops.samfast.task_cores(list(cores), list(factors), asked).unbind()


def check_cores(cores: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Raise ValueError when the layers' tensors differ in kind or do not fit together."""
    if len(cores) != len(factors) or not cores:
        raise ValueError(
            "expected one core and one task factor for each layer, got "
            f"{len(cores)} cores and {len(factors)} task factors"
        )
    core, factor = cores[0], factors[0]
    if core.dim() != 3 or 0 in core.shape:
        raise ValueError(f"a core has shape {tuple(core.shape)}, but must be (R1, R2, R3)")
    if factor.dim() != 2 or factor.shape[0] == 0 or factor.shape[1] != core.shape[2]:
        raise ValueError(
            f"a task factor has shape {tuple(factor.shape)}, but the core "
            f"{tuple(core.shape)} needs (tasks, {core.shape[2]})"
        )
    if core.dtype != factor.dtype:
        raise ValueError(f"cores are {core.dtype} but task factors are {factor.dtype}; cast one")
    for name, tensors in (("core", cores), ("task factor", factors)):
        for t in tensors:
            if t.shape != tensors[0].shape:
                raise ValueError(
                    f"one {name} has shape {tuple(t.shape)} and another "
                    f"{tuple(tensors[0].shape)}; give all layers one shape"
                )
            if t.dtype != tensors[0].dtype:
                raise ValueError(
                    f"one {name} is {t.dtype} and another {tensors[0].dtype}; cast all to one dtype"
                )
            if t.device != core.device:
                raise ValueError(f"a {name} is on {t.device} but the first core on {core.device}")
            check_dtypes({f"a {name}": t})
