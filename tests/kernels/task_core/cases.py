# SPDX-License-Identifier: Apache-2.0
"""Inputs for the products with cores of tasks, and the backends that run on this machine."""

import dataclasses

import torch

from samfast.functional import task_core
from samfast.kernels.task_core.op import supports

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "cpu", "triton", "cuda")
NAMES = ("z", "dh", "dcore", "dfactor_task")


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
        generator = torch.Generator().manual_seed(7)
        rows, columns, depth = self.ranks
        parameter_dtype = parameter_dtype or dtype

        def draw(*shape, kind, divisor=1.0):
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) / divisor
            return drawn.to(DEVICE, kind)

        h = draw(*self.shape, rows, kind=dtype)
        core = draw(rows, columns, depth, kind=parameter_dtype, divisor=rows**0.5)
        factor = draw(self.tasks, depth, kind=parameter_dtype)
        dz = draw(*self.shape, columns, kind=dtype)
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


def runnable(backend: str) -> str | None:
    """None when the backend runs on this machine's test device, else the sentence why not."""
    t = torch.empty(4, 4, device=DEVICE)
    return supports(backend, t, t)
