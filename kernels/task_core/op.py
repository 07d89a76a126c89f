# SPDX-License-Identifier: Apache-2.0
"""``task_core``: operator schemas, autograd and the public function."""

import math

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import check_devices, check_dtypes
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.operator import Operator
from samfast.kernels.task_core import reference
from samfast.kernels.task_core.cores import check_cores, task_cores
from samfast.kernels.task_core.paths import core_backend, path_of, supports

__all__ = ["core_backend", "supports", "task_core"]


class TaskCoreProduct(Operator):
    """Saves h, for the gradient of the cores; cores and tasks cost nothing."""

    name = "task_core_product"
    inputs = "Tensor h, Tensor m, Tensor task, str backend"
    makes = "Tensor z"
    backward_inputs = "Tensor dz, Tensor h, Tensor m, Tensor task, bool[] needs, str backend"
    gradients = "h m"

    @staticmethod
    def path(backend, h, m, **_):
        return path_of(backend, h, m)

    @staticmethod
    def forward(path, h, m, task):
        _check_entries(h, m, task)
        return path.product(h, m, task)

    @staticmethod
    def backward(path, dz, h, m, task, needs):
        return list(path.product_backward(dz, h, m, task, tuple(needs)))

    @staticmethod
    def fake(h, m, task, backend):
        return h.new_empty(h.shape[0], m.shape[3])


def _check_entries(h: Tensor, m: Tensor, task: Tensor) -> None:
    """Raise ValueError when entries do not divide the rows, or for an unknown task on a CPU."""
    rows, entries = h.shape[0], task.shape[0]
    if rows and (entries == 0 or rows % entries):
        raise ValueError(f"{entries} tasks do not divide the {rows} rows of h")
    if task.device.type == "cpu" and entries:
        values = task.detach().numpy()
        for value in (int(values.min()), int(values.max())):
            check_task(value, m.shape[-3])


def check_task(value: int, tasks: int) -> None:
    """Raise ValueError when there is no such task."""
    if not 0 <= value < tasks:
        raise ValueError(f"task is {value}, but there are tasks 0 to {tasks - 1}")


def task_core(
    h: Tensor,
    core: Tensor,
    factor_task: Tensor,
    task: int | Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Multiply a bottleneck by the core of its task (TA-LoRA, a Tucker decomposition over tasks).

    h: (B, …, R1)   core: G (R1, R2, R3)   factor_task: U3 (T, R3)
    task: one task for all of h, or (E,) int64 where E divides B. Row b belongs to entry b · E / B:
        T entries are a batch repeated task by task, B entries a task for each sample
    out: (B, …, R2) = h M_t with M_t = Σ_v U3[t, v] G[:, :, v]

    The result has h's dtype; M is float32 (float64 for float64); gradients have their tensor's
    dtype. Saves h and M. Raises ValueError when shapes or tasks do not fit, and RuntimeError when a
    backend asked for by name cannot run. Tasks on a GPU are not read back: rows of a task that does
    not exist become NaN.

        z = task_core(h, core, factor_task, torch.tensor([0, 2]))

    >>> import torch
    >>> from samfast.functional import task_core
    >>> h, core, factor_task = torch.randn(2, 5, 8), torch.randn(8, 6, 4), torch.randn(3, 4)
    >>> task_core(h, core, factor_task, 1).shape
    torch.Size([2, 5, 6])
    """
    task = _check(h, core, factor_task, task)
    asked = backends.requested(backend)
    if asked == "reference":
        if task.device.type == "cpu":
            for value in task.tolist():
                check_task(value, len(factor_task))
        with without_autocast(h.device.type):
            return reference.task_core(h, core, factor_task, task)
    (m,) = task_cores([core], [factor_task], backend=asked)
    rows = h.reshape(math.prod(h.shape[:-1]), h.shape[-1])
    z = torch.ops.samfast.task_core_product(rows, m, task, asked)
    return z.view(*h.shape[:-1], m.shape[3])


def _check(h, core, factor_task, task) -> Tensor:
    """Return task as a tensor; raise ValueError when arguments do not fit."""
    check_cores([core], [factor_task])
    if h.dim() < 2:
        raise ValueError(f"h has shape {tuple(h.shape)}, but must be (B, …, R1)")
    if h.shape[-1] != core.shape[0]:
        raise ValueError(f"h has rank {h.shape[-1]} but the core {tuple(core.shape)} takes rank "
                         f"{core.shape[0]}")  # fmt: skip
    check_dtypes({"h": h})
    check_devices({"h": h, "core": core})
    if isinstance(task, int) and not isinstance(task, bool):
        check_task(task, len(factor_task))
        return torch.full((1,), task, dtype=torch.int64, device=h.device)
    if not isinstance(task, Tensor) or task.dtype != torch.int64 or task.dim() != 1:
        given = f"{task.dtype} {tuple(task.shape)}" if isinstance(task, Tensor) else repr(task)
        raise ValueError(f"task must be a whole number or int64 of shape (E,), but is {given}")
    check_devices({"h": h, "task": task})
    batch, entries = h.shape[0], task.shape[0]
    if batch and (entries == 0 or batch % entries):
        raise ValueError(
            f"expected a number of tasks that divides the batch of {batch}, got {entries}"
        )
    return task
