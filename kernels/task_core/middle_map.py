# SPDX-License-Identifier: Apache-2.0
"""TA-LoRA's middle map f(h) = h M_t, t the task that a row belongs to."""

import dataclasses

import torch

from samfast.kernels._common import middle
from samfast.kernels._common.middle import no_aux, no_pads


@middle.register
@dataclasses.dataclass(frozen=True)
class TaskCore:
    """params: m (P, T, R1, R2), as task_cores gives it, and task (E,), int64; E divides the rows.

    One entry is a batch of one task, T entries a batch repeated for each task, B entries a batch
    of B samples with tasks of their own, in windows or not.
    """

    backend: str
    zero_preserving = True
    saves = 1

    def forward(self, h, geometry, m, task):
        z = torch.ops.samfast.task_core_product_forward(h, m, task, self.backend)
        return z, no_aux(h), no_pads(h), [h]

    def backward(self, dz, daux, dz_pad, saved, params, geometry, needs):
        m, task = params
        need_h, need_m, _ = needs
        grads = iter(
            torch.ops.samfast.task_core_product_backward(
                dz, saved[0], m, task, [need_h, need_m], self.backend
            )
        )
        dh = next(grads) if need_h else None
        return dh, [next(grads) if need_m else None, None]


def middle_key(backend: str) -> str:
    """The map's key; backend: as the user asked."""
    return middle.key_of("TaskCore", backend)
