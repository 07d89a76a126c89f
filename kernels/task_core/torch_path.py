# SPDX-License-Identifier: Apache-2.0
"""The cores of tasks and the product with them in aten calls, for any device and dtype.

cores (N, R1, R2, R3) and factors (N, T, R3) of N layers alike; m (P, T, R1, R2), P times the same;
h (tokens, R1), task (E,): row n belongs to entry n // (tokens / E). Sums are float32 (float64 for
float64). The gradient of m comes in P parts, which are its sum only together.
"""

import torch

PARTS = 1
RUN = 32  # rows


def fold(cores, factors):
    """M (N, T, R1, R2), of at least float32."""
    wide = torch.promote_types(cores.dtype, torch.float32)
    layers, rows, columns, depth = cores.shape
    flat = cores.to(wide).reshape(layers, rows * columns, depth)
    return torch.bmm(factors.to(wide), flat.mT).view(layers, factors.shape[1], rows, columns)


def fold_backward(dm, cores, factors):
    """dcores and dfactors from dm (N, P, T, R1, R2), of its dtype; in float64, for a factor's few
    numbers each add up a whole core."""
    layers, _, tasks, rows, columns = dm.shape
    depth, dtype = cores.shape[3], dm.dtype
    dm = dm.double().sum(1).view(layers, tasks, rows * columns)
    flat = cores.double().reshape(layers, rows * columns, depth)
    dcores = torch.bmm(dm.mT, factors.double()).view(cores.shape)
    return dcores.to(dtype), torch.bmm(dm, flat).to(dtype)


def product(h, m, task):
    """z (tokens, R2) of h's dtype."""
    entries = _entries(h, task)
    return torch.bmm(entries, _own(m, task).to(h.dtype)).view(h.shape[0], m.shape[3])


def product_backward(dz, h, m, task, needs):
    """dh of h's dtype and dm (P, T, R1, R2) of m's; None unless needed."""
    need_h, need_m = needs
    dz = dz.to(h.dtype)
    dh = dm = None
    if need_h:
        dh = torch.bmm(_entries(dz, task), _own(m, task).to(h.dtype).mT).view(h.shape)
    if need_m:
        wide = [_entries(t.to(m.dtype), task) for t in (h, dz)]
        shares = _shares(*wide)  # (E, R1, R2)
        tasks = torch.arange(m.shape[1], device=task.device)
        mine = (task == tasks[:, None])[:, :, None, None]  # (T, E, 1, 1)
        dm = m.new_zeros(m.shape)
        dm[0] = shares.where(mine, 0.0).sum(1)
    return dh, dm


def _shares(h, dz):
    """hᵀ dz of each entry in float64, as a sum of short runs in its own dtype: that costs no more
    time than one long sum, which would lose more."""
    entries, each, _ = h.shape
    runs = each // RUN
    ends = [t[:, runs * RUN :] for t in (h, dz)]
    shares = torch.bmm(ends[0].mT, ends[1]).double()
    if runs:
        whole = [t[:, : runs * RUN].reshape(entries * runs, RUN, -1) for t in (h, dz)]
        parts = torch.bmm(whole[0].mT, whole[1])
        shares += parts.view(entries, runs, *shares.shape[1:]).sum(1, dtype=torch.float64)
    return shares


def _entries(rows, task):
    """(tokens, R) -> (E, tokens / E, R)"""
    each = rows.shape[0] // max(1, task.shape[0])
    return rows.reshape(task.shape[0], each, rows.shape[1])


def _own(m, task):
    """The core of each entry, (E, R1, R2); NaN where there is no such task."""
    known = (task >= 0) & (task < m.shape[1])
    return m[0, task.where(known, 0)].where(known[:, None, None], torch.nan)
