# SPDX-License-Identifier: Apache-2.0
"""Cores and products in C++ (csrc/cpu/task_core.cpp); the interface is that of torch_path."""

import torch

PARTS = 1
_native = torch.ops.samfast_native


def fold(cores, factors):
    """M (N, T, R1, R2) in float32."""
    cores, factors = _dense(cores), _dense(factors)
    m = cores.new_empty(len(cores), factors.shape[1], *cores.shape[1:3])
    _native.task_core_fold(cores, factors, m)
    return m


def fold_backward(dm, cores, factors):
    """dcores and dfactors from dm (N, P, T, R1, R2), float32."""
    cores, factors = _dense(cores), _dense(factors)
    made = torch.empty_like(cores), torch.empty_like(factors)
    _native.task_core_fold_backward(_dense(dm), cores, factors, *made, dm.shape[1])
    return made


def product(h, m, task):
    """z (tokens, R2) of h's dtype."""
    z = h.new_empty(h.shape[0], m.shape[3])
    _native.task_core_product(h.contiguous(), _dense(m[0]), task.contiguous(), z)
    return z


def product_backward(dz, h, m, task, needs):
    """dh of h's dtype and dm (P, T, R1, R2) of m's; None unless needed."""
    need_h, need_m = needs
    dh = h.new_empty(h.shape) if need_h else None
    dm = m.new_empty(m.shape, dtype=torch.float32) if need_m else None
    if need_h or need_m:
        _native.task_core_product_backward(
            dz.to(h.dtype).contiguous(), h.contiguous(), _dense(m[0]), task.contiguous(), dh, dm,
            m.shape[0],
        )  # fmt: skip
    return dh, None if dm is None else dm.to(m.dtype)


def _dense(t):
    return t.float().contiguous()
