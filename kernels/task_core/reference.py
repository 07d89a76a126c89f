# SPDX-License-Identifier: Apache-2.0
"""A product with a core that belongs to a task, with plain autograd, for any dtype and device.

The core of task t is M_t = Σ_v U3[t, v] G[:, :, v]; every entry of a batch has one task.
"""

import torch


def task_cores(core, factor_task):
    """M (T, R1, R2). core: G (R1, R2, R3)   factor_task: U3 (T, R3)"""
    return torch.stack([(core * row).sum(2) for row in factor_task])


def task_core(h, core, factor_task, task):
    """z (B, …, R2) of h (B, …, R1); task: (E,), and row b belongs to entry b · E / B."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return product(h, task_cores(core.to(wide), factor_task.to(wide)), task)


def product(h, m, task):
    """The same from cores m (T, R1, R2)."""
    m = m.to(h.dtype)
    if h.numel() == 0:
        return h @ m[0]
    entries = h.chunk(len(task))
    return torch.cat([entry @ m[t] for entry, t in zip(entries, task.tolist(), strict=True)])
