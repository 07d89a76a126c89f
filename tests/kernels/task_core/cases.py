# SPDX-License-Identifier: Apache-2.0
"""Inputs for the products with cores of tasks, and the backends that run on this machine."""

import dataclasses

import torch
import torch.nn.functional as F
from draws import DEVICE, drawing
from marks import CUDA

from samfast.functional import task_core, task_cores
from samfast.kernels._common.autocast import autocast_input, without_autocast
from samfast.kernels.lora_linear.op import low_rank_linear
from samfast.kernels.task_core import example, middle_key

from ..operation import Operation, runnable_by

BACKENDS = ("torch", "cpu", "triton", CUDA)
NAMES = ("z", "dh", "dcore", "dfactor_task")
runnable = runnable_by(example)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; tensors are drawn from a seed, in float64. task: of all rows, or of the entries."""

    shape: tuple[int, ...] = (6, 5, 7)  # of h without its rank
    ranks: tuple[int, int, int] = (8, 5, 3)
    tasks: int = 3
    task: int | tuple[int, ...] = 1

    @property
    def id(self):
        of = self.task if isinstance(self.task, int) else "".join(map(str, self.task))
        return f"{'x'.join(map(str, (*self.shape, *self.ranks)))}-of{self.tasks}-t{of}"

    def tensors(self, dtype, parameter_dtype=None):
        """h, core and factor_task as leaves that want gradients, and dz."""
        draw, (rows, columns, depth) = drawing(7, parameter_dtype or dtype), self.ranks
        h = draw(*self.shape, rows, dtype=dtype)
        core = draw(rows, columns, depth, divisor=rows**0.5)
        factor = draw(self.tasks, depth)
        dz = draw(*self.shape, columns, dtype=dtype)
        return [t.requires_grad_() for t in (h, core, factor)], dz

    def given(self):
        if isinstance(self.task, int):
            return self.task
        return torch.tensor(self.task, dtype=torch.int64, device=DEVICE)

    def call(self, leaves, backend):
        return task_core(*leaves, self.given(), backend=backend)

    def run(self, dtype, backend, parameter_dtype=None):
        """z and the gradients of h, core and factor_task."""
        leaves, dz = self.tensors(dtype, parameter_dtype)
        z = self.call(leaves, backend)
        return [z, *torch.autograd.grad(z, leaves, dz)]


def literal(case, dtype, parameter_dtype=None):
    """Plain autograd through the update tensor's own formula, entry by entry."""
    leaves, dz = case.tensors(dtype, parameter_dtype)
    h, core, factor = leaves
    wide = torch.promote_types(dtype, torch.float32)
    cores = torch.einsum("abv,tv->tab", core.to(wide), factor.to(wide)).to(dtype)
    tasks = [case.task] if isinstance(case.task, int) else case.task
    each = h.shape[0] // len(tasks)
    rows = [h[i * each : (i + 1) * each] @ cores[t] for i, t in enumerate(tasks)]
    z = torch.cat(rows)
    return [z, *torch.autograd.grad(z, leaves, dz)]


CASE = Case(shape=(4, 9), ranks=(6, 5, 3), task=(2, 0))


def whole(case):
    """The function, of both operators."""
    task = case.given()

    def call(tensors, backend):
        return [task_core(*tensors, task, backend=backend)]

    def kept(tensors, wanted):
        """h and the tasks; the cores of all tasks."""
        h, core, factor = tensors
        return h.nbytes + task.nbytes, 4 * len(factor) * core[..., 0].numel()

    return Operation(
        "task_core_product",
        "function",
        lambda dtype: case.tensors(dtype)[0],
        call,
        runnable,
        ("torch", "cpu", "triton", "cuda"),
        kept,
        apart=((0,), (1, 2)),  # of the cores, both are made together
    )


def product_tensors(dtype):
    (h, core, factor), _ = CASE.tensors(dtype)
    (m,) = task_cores([core], [factor], backend="reference")
    return [h.flatten(0, -2), m[0]]


TASK = CASE.given()


def product(tensors, backend):
    """M three times, so that its gradient comes in parts."""
    h, m = tensors
    if backend == "reference":
        pairs = zip(h.chunk(len(TASK)), TASK.tolist(), strict=True)
        with without_autocast(h.device.type):
            return [torch.cat([rows @ m[task].to(rows.dtype) for rows, task in pairs])]
    return [torch.ops.samfast.task_core_product(h, m.expand(3, -1, -1, -1), TASK, backend)]


def cores_tensors(dtype):
    draw = drawing(8, dtype)
    return [draw(6, 5, 3), draw(6, 5, 3), draw(4, 3), draw(4, 3)]


def cores(tensors, backend):
    """The first part of each; there are more on a GPU."""
    return [m[0] for m in task_cores(tensors[:2], tensors[2:], backend=backend)]


def layer_tensors(dtype):
    """x, lora_a, lora_b, M, and the weight."""
    draw = drawing(9, dtype)
    return [draw(6, 10, 12), draw(8, 12, divisor=3), draw(12, 5), draw(4, 8, 5), draw(12, 12)]


LAYERS_TASK = torch.tensor([3, 0, 0, 3, 1, 1], device=DEVICE)


def layer(tensors, backend):
    """A linear layer with a task's core between lora_a and lora_b."""
    x, a, b, m, weight = tensors
    if backend == "reference":
        x, m = autocast_input(x), m.to(autocast_input(x).dtype)
        with without_autocast(x.device.type):
            a, b, weight = (t.to(x.dtype) for t in (a, b, weight))
            h = zip(F.linear(x, a), LAYERS_TASK.tolist(), strict=True)
            z = torch.stack([rows @ m[task] for rows, task in h])
            return [F.linear(x, weight) + 0.5 * F.linear(z, b)]
    y, _, _ = low_rank_linear(
        x, weight, None, a, b, 0.5, middle=middle_key(backend),
        params=[m.expand(3, -1, -1, -1), LAYERS_TASK], backend=backend,
    )  # fmt: skip
    return [y]


OPERATIONS = [
    whole(CASE),
    Operation(
        "task_core_product",
        "",
        product_tensors,
        product,
        runnable,
        ("torch", "cpu", "triton", "cuda"),
        kept=lambda tensors, wanted: (tensors[0].nbytes + TASK.nbytes, 0),
    ),
    Operation(
        "task_cores",
        "",
        cores_tensors,
        cores,
        runnable,
        ("torch", "cpu", "triton", "cuda"),
        kept=lambda tensors, wanted: (0, 0),
        activations=0,
        apart=(),  # all are made together
    ),
    Operation(
        "lora_linear",
        "task-core",
        layer_tensors,
        layer,
        runnable,
        ("torch", "cpu", "triton"),
        autocast="result",
    ),
]
FINITE = [
    dataclasses.replace(whole(Case(shape=(6, 2), ranks=(3, 2, 2), task=task)), way=f"tasks{way}")
    for way, task in {"1": 1, "012": (0, 1, 2), "200212": (2, 0, 0, 2, 1, 2)}.items()
]
