# SPDX-License-Identifier: Apache-2.0
"""Cores and products as Triton kernels, one launch each; see torch_path for what each computes.

A tile has rows of one entry, and so one task. Part p of the gradient of a core adds, in order,
every P-th tile from tile p on that belongs to the task: no atomics, the same bits every time. The
kernel that makes the gradients of cores and factors adds the parts, in order too.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.task_core import costs

PARTS = 32
MAX_RANK = 64
BLOCK_I, BLOCK_V = 128, 16  # elements of a core, columns of a task factor
# Rows of a tile, by bytes per element, and of a core's gradient in one program: on sm_100 float32
# products of 64 rows would go to tensor cores, in TF32.
ROWS = {2: 64, 4: 32}
CORE_ROWS = 32
WARPS = 8  # with four, some targets spill
REGISTERS = 128  # a thread, in the backward; without a bound ptxas may stop at 48 and spill


@triton.jit
def load_core(m_ptr, task_ptr, entry, tasks, rows, columns, BLOCK_A: tl.constexpr,
              BLOCK_B: tl.constexpr):  # fmt: skip
    """The core of an entry's task, (BLOCK_A, BLOCK_B), and whether there is such a task."""
    t = tl.load(task_ptr + entry)
    known = (t >= 0) & (t < tasks)
    offs_a, offs_b = tl.arange(0, BLOCK_A)[:, None], tl.arange(0, BLOCK_B)[None, :]
    inside = (offs_a < tl.where(known, rows, 0)) & (offs_b < columns)
    place = (tl.where(known, t, 0) * rows + offs_a) * columns + offs_b
    return tl.load(m_ptr + place, inside, other=0.0), known


@triton.jit
def load_rows(x_ptr, first, offs, each, width, BLOCK: tl.constexpr):
    """Rows ``offs`` of the entry whose first row is ``first``, (rows, BLOCK)."""
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (offs[:, None] < each) & (cols < width)
    return tl.load(x_ptr + (first + offs[:, None]) * width + cols, inside, other=0.0)


@triton.jit
def store_rows(x_ptr, x, first, offs, each, width, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (offs[:, None] < each) & (cols < width)
    place = (first + offs[:, None]) * width + cols
    tl.store(x_ptr + place, x.to(x_ptr.dtype.element_ty), inside)


@triton.jit(launch_metadata=launched(__package__, costs.product_kernel, "h_ptr"))
def product_kernel(
    h_ptr,
    m_ptr,
    task_ptr,
    z_ptr,
    each,
    tiles_of_entry,
    tasks,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """z = h M_t for one tile."""
    tile = tl.program_id(0)
    entry = tile // tiles_of_entry
    first = entry.to(tl.int64) * each
    offs = tile % tiles_of_entry * BLOCK_M + tl.arange(0, BLOCK_M)
    m, known = load_core(m_ptr, task_ptr, entry, tasks, rows, columns, BLOCK_A, BLOCK_B)
    h = load_rows(h_ptr, first, offs, each, rows, BLOCK_A)
    z = tl.dot(h, m.to(h.dtype), input_precision="ieee")
    z = tl.where(known, z, float("nan"))
    store_rows(z_ptr, z, first, offs, each, columns, BLOCK_B)


@triton.jit(launch_metadata=launched(__package__, costs.product_backward_kernel, "h_ptr"))
def product_backward_kernel(
    dz_ptr,
    h_ptr,
    m_ptr,
    task_ptr,
    dh_ptr,
    dm_ptr,
    sums,
    parts,
    each,
    tiles,
    tiles_of_entry,
    tasks,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The first ``sums`` programs: BLOCK_C rows of a part of dM_t; the others: a tile of dh."""
    program = tl.program_id(0)
    if program < sums:
        if dm_ptr is not None:
            blocks = tl.cdiv(rows, BLOCK_C)
            block, whose = program % blocks, program // blocks  # (part, task)
            part, task = whose // tasks, whose % tasks
            offs_c, cols = block * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_B)
            total = tl.zeros((BLOCK_C, BLOCK_B), tl.float32)
            for tile in range(part, tiles, parts):
                entry = tile // tiles_of_entry
                if tl.load(task_ptr + entry) == task:
                    first = entry.to(tl.int64) * each
                    offs = tile % tiles_of_entry * BLOCK_M + tl.arange(0, BLOCK_M)
                    inside = (offs_c[:, None] < rows) & (offs[None, :] < each)
                    place = (first + offs[None, :]) * rows + offs_c[:, None]
                    h = tl.load(h_ptr + place, inside, other=0.0)  # (BLOCK_C, BLOCK_M)
                    dz = load_rows(dz_ptr, first, offs, each, columns, BLOCK_B)
                    total += tl.dot(h, dz, input_precision="ieee")
            place = (whose.to(tl.int64) * rows + offs_c[:, None]) * columns + cols[None, :]
            inside = (offs_c[:, None] < rows) & (cols[None, :] < columns)
            tl.store(dm_ptr + place, total, inside)
    else:
        if dh_ptr is not None:
            tile = program - sums
            entry = tile // tiles_of_entry
            first = entry.to(tl.int64) * each
            offs = tile % tiles_of_entry * BLOCK_M + tl.arange(0, BLOCK_M)
            m, known = load_core(m_ptr, task_ptr, entry, tasks, rows, columns, BLOCK_A, BLOCK_B)
            dz = load_rows(dz_ptr, first, offs, each, columns, BLOCK_B)
            dh = tl.dot(dz, tl.trans(m.to(dz.dtype)), input_precision="ieee")
            dh = tl.where(known, dh, float("nan"))
            store_rows(dh_ptr, dh, first, offs, each, rows, BLOCK_A)


@triton.jit(launch_metadata=launched(__package__, costs.fold_kernel))
def fold_kernel(cores_ptr, factors_ptr, m_ptr, tasks, core, depth, BLOCK: tl.constexpr):
    """BLOCK elements of M of one layer and task."""
    row = tl.program_id(0)  # layer · tasks + task
    layer = (row // tasks).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for v in range(0, depth):
        place = (layer * core + offs) * depth + v
        g = tl.load(cores_ptr + place, offs < core, other=0.0).to(tl.float32)
        u = tl.load(factors_ptr + row.to(tl.int64) * depth + v).to(tl.float32)
        total += u * g
    tl.store(m_ptr + row.to(tl.int64) * core + offs, total, offs < core)


@triton.jit
def sum_of_parts(dm_ptr, layer, task, offs, parts, tasks, core, BLOCK: tl.constexpr):
    """dM (BLOCK,) of one layer and task, from dm (layers, parts, tasks, core)."""
    total = tl.zeros((BLOCK,), tl.float32)
    for p in range(0, parts):
        place = ((layer * parts + p) * tasks + task) * core + offs
        total += tl.load(dm_ptr + place, offs < core, other=0.0)
    return total


@triton.jit(launch_metadata=launched(__package__, costs.fold_backward_kernel))
def fold_backward_kernel(
    dm_ptr,
    cores_ptr,
    factors_ptr,
    dcores_ptr,
    dfactors_ptr,
    sums,
    parts,
    tasks,
    core,
    depth,
    BLOCK_I: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The first ``sums`` programs: columns of dU3 of a layer and task; the others: of a block of
    dG."""
    program = tl.program_id(0)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    if program < sums:
        layer, task = (program // tasks).to(tl.int64), program % tasks
        du = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, core, BLOCK_I):
            rows = start + tl.arange(0, BLOCK_I)
            whole = sum_of_parts(dm_ptr, layer, task, rows, parts, tasks, core, BLOCK_I)
            at = (layer * core + rows)[:, None] * depth + v[None, :]
            there = (rows < core)[:, None] & (v < depth)[None, :]
            g = tl.load(cores_ptr + at, there, other=0.0).to(tl.float32)
            du += tl.sum(whole[:, None] * g, 0)
        tl.store(dfactors_ptr + (layer * tasks + task) * depth + v, du, v < depth)
    else:
        blocks = tl.cdiv(core, BLOCK_I)
        block = program - sums
        layer = (block // blocks).to(tl.int64)
        offs = block % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
        dg = tl.zeros((BLOCK_I, BLOCK_V), tl.float32)
        for task in range(0, tasks):
            dm = sum_of_parts(dm_ptr, layer, task, offs, parts, tasks, core, BLOCK_I)
            u_at = factors_ptr + (layer * tasks + task) * depth + v
            u = tl.load(u_at, v < depth, other=0.0).to(tl.float32)
            dg += dm[:, None] * u[None, :]
        place = (layer * core + offs)[:, None] * depth + v[None, :]
        inside = (offs < core)[:, None] & (v < depth)[None, :]
        tl.store(dcores_ptr + place, dg, inside)


def fold(cores, factors):
    """M (N, T, R1, R2) in float32."""
    cores, factors = cores.contiguous(), factors.contiguous()
    layers, rows, columns, depth = cores.shape
    tasks, core = factors.shape[1], rows * columns
    m = cores.new_empty(layers, tasks, rows, columns, dtype=torch.float32)
    with _on(cores):
        fold_kernel[(layers * tasks, triton.cdiv(core, BLOCK_I))](
            cores, factors, m, tasks, core, depth, BLOCK=BLOCK_I
        )
    return m


def fold_backward(dm, cores, factors):
    """dcores and dfactors from dm (N, P, T, R1, R2), float32."""
    cores, factors = cores.contiguous(), factors.contiguous()
    layers, rows, columns, depth = cores.shape
    parts, tasks, core = dm.shape[1], factors.shape[1], rows * columns
    dcores = torch.empty_like(cores, dtype=torch.float32)
    dfactors = torch.empty_like(factors, dtype=torch.float32)
    sums = layers * tasks
    grid = sums + layers * triton.cdiv(core, BLOCK_I), triton.cdiv(depth, BLOCK_V)
    with _on(cores):
        fold_backward_kernel[grid](
            dm.contiguous(), cores, factors, dcores, dfactors, sums, parts, tasks, core, depth,
            BLOCK_I=BLOCK_I, BLOCK_V=BLOCK_V, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return dcores, dfactors


def product(h, m, task):
    """z (tokens, R2) of h's dtype."""
    z = h.new_empty(h.shape[0], m.shape[3])
    sizes = _sizes(h, m, task)
    if sizes.tiles:
        with _on(h):
            product_kernel[(sizes.tiles,)](
                h.contiguous(), m[0].contiguous(), task.contiguous(), z, sizes.each,
                sizes.of_entry, *m.shape[1:], **sizes.blocks, num_warps=WARPS,
            )  # fmt: skip
    return z


def product_backward(dz, h, m, task, needs):
    """dh of h's dtype and dm (P, T, R1, R2) of m's; None unless needed."""
    need_h, need_m = needs
    sizes = _sizes(h, m, task)
    parts, tasks, rows, _ = m.shape
    dh = h.new_empty(h.shape) if need_h else None
    dm = m.new_empty(m.shape, dtype=torch.float32) if need_m else None
    block_c = min(CORE_ROWS, sizes.blocks["BLOCK_A"])
    sums = parts * tasks * triton.cdiv(rows, block_c) if need_m else 0
    programs = sums + (sizes.tiles if need_h else 0)
    if programs:
        with _on(h):
            product_backward_kernel[(programs,)](
                dz.to(h.dtype).contiguous(), h.contiguous(), m[0].contiguous(), task.contiguous(),
                dh, dm, sums, parts, sizes.each, sizes.tiles, sizes.of_entry, *m.shape[1:],
                **sizes.blocks, BLOCK_C=block_c, num_warps=WARPS, maxnreg=REGISTERS,
            )  # fmt: skip
    return dh, None if dm is None else dm.to(m.dtype)


class _Sizes(NamedTuple):
    """Rows and tiles of an entry, tiles of all, and the blocks of a launch."""

    each: int
    of_entry: int
    tiles: int
    blocks: dict[str, int]


def _sizes(h, m, task):
    block, entries = ROWS[h.element_size()], task.shape[0]
    each = h.shape[0] // max(1, entries)
    of_entry = triton.cdiv(each, block)
    a, b = (max(16, triton.next_power_of_2(rank)) for rank in m.shape[2:])
    return _Sizes(
        each, of_entry, entries * of_entry, {"BLOCK_M": block, "BLOCK_A": a, "BLOCK_B": b}
    )


def _on(t):
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
