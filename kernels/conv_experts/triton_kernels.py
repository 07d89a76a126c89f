# SPDX-License-Identifier: Apache-2.0
"""``conv_experts`` as Triton kernels: three launches for a forward and backward.

A program holds a tile of outputs of one sample and the 16×16 sources Z_i that they reach. Along an
axis the enlarging, a tap of the convolution and the points that the shrinking reads are one banded
matrix L made from indices, so that all points of channel o are

    P = Σ_a L_a Σ_b (Σ_i k[o,i,a,b] Z_i) L_bᵀ + c_o

where the taps b of a line, padded to four, are one product. The products are small and exact in
float32 ("ieee"): TF32 would round kernels, weights and gradients to eleven bits. The backward makes
P again; a second launch adds the tiles' partial gradients in a fixed order: no atomics, the same
bits every time. Derivations, bytes and launches are in this folder's README.
"""

import contextlib

import torch
import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.conv_experts import costs
from samfast.kernels.conv_experts.triton_footprint import (
    any_broken,
    broken_near,
    finite,
    reach,
    spoil,
)
from samfast.kernels.conv_experts.triton_places import rows_of
from samfast.kernels.conv_experts.triton_points import (
    all_taps,
    banded,
    points,
    points_of,
    shrinking,
)

MAX_RANK = 64  # channels are loops, so nothing breaks beyond; their number squared takes the time
MAX_EXPERTS = 64  # the ratio is picked by one comparison for each expert

SOURCE = 16  # sources of a tile along an axis
NARROW = 16  # a map up to this size is one tile that needs no halo
TILE, HALO = 8, 4  # else outputs of a tile along an axis, and sources before them (3 are read)
REGISTERS = {2: 128, 4: 160}  # a thread at most, by bytes of an element; ptxas spills without
DH_COPIES = 4  # gradients of h in scratch, for each element of h, at most


@triton.jit
def normal_cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)


@triton.jit
def forward_tile(h_ptr, weight_ptr, bias_ptr, z_ptr, pad_ptr, sample, first_y, first_x, o, expert,
                 known, ratio, rank, channels, height, width, image_height, image_width, down,
                 across, PHASES: tl.constexpr, RESIDUAL: tl.constexpr, GELU: tl.constexpr,
                 DEPTHWISE: tl.constexpr, PADDED: tl.constexpr, OUT: tl.constexpr,
                 HALO: tl.constexpr, SOURCE: tl.constexpr):  # fmt: skip
    OUTS: tl.constexpr = SOURCE if PHASES == 1 else OUT  # rows of a product are at least sixteen
    POINTS: tl.constexpr = OUTS * PHASES
    y, x = first_y - HALO + tl.arange(0, SOURCE), first_x - HALO + tl.arange(0, SOURCE)
    row, _, inside, _ = rows_of(
        sample, y[:, None], x[None, :], height, width, image_height, image_width, down, across
    )
    lines = points_of(first_y, height, ratio, PHASES, OUT, POINTS)
    columns = points_of(first_x, width, ratio, PHASES, OUT, POINTS)
    columns = all_taps(columns, first_x - HALO, width, ratio, SOURCE)
    sound = tl.full((SOURCE, SOURCE), True, tl.int1)
    p, sound = points(
        h_ptr, weight_ptr, bias_ptr, row, inside, sound, lines, columns, first_y - HALO, height, o,
        expert, ratio, rank, channels, DEPTHWISE, SOURCE,
    )  # fmt: skip
    if GELU:
        p *= normal_cdf(p)
    if PHASES == 4:
        share = shrinking(PHASES)
        p = tl.reshape(p, (OUTS, PHASES, OUTS, PHASES)) * share[None, None, None, :]
        p = tl.sum(p, 3) * share[None, :, None]
        p = tl.sum(p, 1)
    out = tl.arange(0, OUTS)
    ours = (out[:, None] < OUT) & (out[None, :] < OUT)
    row, pad_row, inside, padded = rows_of(
        sample, first_y + out[:, None], first_x + out[None, :], height, width, image_height,
        image_width, down, across,
    )  # fmt: skip
    if RESIDUAL:
        p += tl.load(h_ptr + row * rank + o, inside & ours, other=0.0).to(tl.float32)
    if any_broken(sound):
        hit = broken_near(
            h_ptr, None, sample, first_y + out[:, None], first_x + out[None, :], reach(ratio), o,
            rank, height, width, image_height, image_width, down, across, not DEPTHWISE,
        )  # fmt: skip
        p = tl.where(hit, float("nan"), p)
    p = tl.where(known, p, float("nan"))
    tl.store(z_ptr + row * rank + o, p.to(z_ptr.dtype.element_ty), inside & ours)
    if PADDED:
        tl.store(pad_ptr + pad_row * rank + o, p.to(z_ptr.dtype.element_ty), padded & ours)


@triton.jit
def ratio_of(expert, RATIOS: tl.constexpr):
    """An expert's ratio, 1 for one that does not exist."""
    ratio = tl.where(expert == 0, RATIOS[0], 1)
    for m in tl.static_range(1, len(RATIOS)):
        ratio = tl.where(expert == m, RATIOS[m], ratio)
    return ratio


@triton.jit(launch_metadata=launched(__package__, costs.forward_kernel))
def forward_kernel(
    h_ptr,
    weight_ptr,
    bias_ptr,
    index_ptr,
    z_ptr,
    pad_ptr,
    rank,
    channels,
    height,
    width,
    image_height,
    image_width,
    down,
    across,
    RATIOS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    OUT: tl.constexpr,
    HALO: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """z and z_pad; one program per tile and channel."""
    o = tl.program_id(0) % rank
    tile = tl.program_id(0) // rank
    tiles_across = tl.cdiv(width, OUT)
    tiles = tl.cdiv(height, OUT) * tiles_across
    sample = tile // tiles
    first_y = (tile % tiles) // tiles_across * OUT
    first_x = (tile % tiles) % tiles_across * OUT
    expert = tl.load(index_ptr + sample)
    known = (expert >= 0) & (expert < len(RATIOS))
    expert = tl.where(known, expert, 0)
    ratio = ratio_of(expert, RATIOS)
    if EVEN:
        if ratio % 2 == 0:
            forward_tile(
                h_ptr, weight_ptr, bias_ptr, z_ptr, pad_ptr, sample, first_y, first_x, o, expert,
                known, ratio, rank, channels, height, width, image_height, image_width, down,
                across, 4, RESIDUAL, GELU, DEPTHWISE, PADDED, OUT, HALO, SOURCE,
            )  # fmt: skip
    if ODD:
        if ratio % 2 == 1:
            forward_tile(
                h_ptr, weight_ptr, bias_ptr, z_ptr, pad_ptr, sample, first_y, first_x, o, expert,
                known, ratio, rank, channels, height, width, image_height, image_width, down,
                across, 1, RESIDUAL, GELU, DEPTHWISE, PADDED, OUT, HALO, SOURCE,
            )  # fmt: skip


@triton.jit
def backward_tile(dz_ptr, dz_pad_ptr, h_ptr, weight_ptr, bias_ptr, patch_ptr, part_ptr, tile,
                  chunk, sample, first_y, first_x, expert, known, ratio, rank, channels, chunks,
                  height, width, image_height, image_width, down, across, PHASES: tl.constexpr,
                  GELU: tl.constexpr, DEPTHWISE: tl.constexpr, NEED_H: tl.constexpr,
                  NEED_WEIGHT: tl.constexpr, OUT: tl.constexpr, HALO: tl.constexpr,
                  SOURCE: tl.constexpr):  # fmt: skip
    OUTS: tl.constexpr = SOURCE if PHASES == 1 else OUT
    POINTS: tl.constexpr = OUTS * PHASES
    source = tl.arange(0, SOURCE)
    row, _, inside, _ = rows_of(
        sample, (first_y - HALO + source)[:, None], (first_x - HALO + source)[None, :], height,
        width, image_height, image_width, down, across,
    )  # fmt: skip
    out = tl.arange(0, OUTS)
    ours = (out[:, None] < OUT) & (out[None, :] < OUT)
    out_row, pad_row, out_inside, out_padded = rows_of(
        sample, first_y + out[:, None], first_x + out[None, :], height, width, image_height,
        image_width, down, across,
    )  # fmt: skip
    out_inside &= ours
    out_padded &= ours
    lines = points_of(first_y, height, ratio, PHASES, OUT, POINTS)
    columns = points_of(first_x, width, ratio, PHASES, OUT, POINTS)
    columns = all_taps(columns, first_x - HALO, width, ratio, SOURCE)
    tap = tl.arange(0, 4)
    kernel_ptr = weight_ptr + expert * (rank * channels * 9)
    size = rank * channels * 9  # of an expert's kernels; its biases follow
    if NEED_WEIGHT:
        part_ptr += tile * (size + rank)
    if NEED_H:
        slots = 1 if DEPTHWISE else chunks
        slot = 0 if DEPTHWISE else chunk
        patch_ptr += (tile * slots + slot) * rank * SOURCE * SOURCE
    patch_at = source[:, None] * SOURCE + source[None, :]

    first = chunk * tl.cdiv(rank, chunks)
    last = tl.minimum(first + tl.cdiv(rank, chunks), rank)
    sound = tl.full((SOURCE, SOURCE), True, tl.int1)
    sound_out = tl.full((OUTS, OUTS), True, tl.int1)
    for o in range(first, last):
        dout = tl.load(dz_ptr + out_row * rank + o, out_inside, other=0.0).to(tl.float32)
        if dz_pad_ptr is not None:
            dpad = tl.load(dz_pad_ptr + pad_row * rank + o, out_padded, other=0.0)
            dout += dpad.to(tl.float32)
        sound_out &= finite(dout)
        dp = tl.where(finite(dout), dout, 0.0)
        if PHASES == 4:
            share = shrinking(PHASES)
            dp = dp[:, None, :, None] * (share[:, None, None] * share[None, None, :])[None]
            dp = tl.reshape(dp, (POINTS, POINTS))
        if GELU:
            p, sound = points(
                h_ptr, weight_ptr, bias_ptr, row, inside, sound, lines, columns, first_y - HALO,
                height, o, expert, ratio, rank, channels, DEPTHWISE, SOURCE,
            )  # fmt: skip
            dp *= normal_cdf(p) + p * tl.exp(-0.5 * p * p) * 0.3989422804014327
        if NEED_WEIGHT:
            tl.store(part_ptr + size + o, tl.sum(tl.sum(dp, 1), 0))
        for a in range(0, 3):
            line = banded(
                lines[:, None], a - 1, first_y - HALO + source[None, :], height, ratio
            )  # (POINTS, SOURCE)
            t = tl.dot(tl.trans(line), dp, input_precision="ieee")  # (SOURCE, POINTS)
            dmixed = tl.dot(t, columns, input_precision="ieee")
            dmixed = tl.reshape(dmixed, (SOURCE, 4, SOURCE))
            for i in range(0, channels):
                channel = o if DEPTHWISE else i
                kernel_at = (o * channels + i) * 9 + a * 3 + tap
                if NEED_WEIGHT:
                    z = tl.load(h_ptr + row * rank + channel, inside, other=0.0).to(tl.float32)
                    dk = tl.sum(tl.sum(dmixed * z[:, None, :], 2), 0)
                    tl.store(part_ptr + kernel_at, dk, tap < 3)
                if NEED_H:
                    k = tl.load(kernel_ptr + kernel_at, tap < 3, other=0.0).to(tl.float32)
                    dsource = tl.sum(dmixed * k[None, :, None], 1)
                    at = patch_ptr + channel * SOURCE * SOURCE + patch_at
                    again = (a > 0) if DEPTHWISE else (a > 0) | (o > first)
                    dsource += tl.load(at, again & (patch_at >= 0), other=0.0)
                    tl.store(at, tl.where(known, dsource, float("nan")))
            # the next tap and channel read the patches just written: every thread has to be here
            tl.debug_barrier()
    if any_broken(sound) | any_broken(sound_out):
        spoil(
            dz_ptr, dz_pad_ptr, h_ptr, patch_ptr, part_ptr, sample, first_y, first_x, first, last,
            ratio, rank, channels, height, width, image_height, image_width, down, across, GELU,
            DEPTHWISE, NEED_H, NEED_WEIGHT, OUTS, HALO, SOURCE,
        )  # fmt: skip


@triton.jit(launch_metadata=launched(__package__, costs.backward_kernel))
def backward_kernel(
    dz_ptr,
    dz_pad_ptr,
    h_ptr,
    weight_ptr,
    bias_ptr,
    index_ptr,
    patch_ptr,
    part_ptr,
    rank,
    channels,
    chunks,
    height,
    width,
    image_height,
    image_width,
    down,
    across,
    RATIOS: tl.constexpr,
    GELU: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    NEED_H: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    OUT: tl.constexpr,
    HALO: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """Partial gradients; one program per tile and chunk of channels, one after another within.

    patch (tiles, chunks or 1 where each chunk fills its own channel, r, SOURCE, SOURCE): of h
    part (tiles, r · channels · 9 + r): of the sample's expert's kernels and biases
    """
    chunk = tl.program_id(0) % chunks
    tile = tl.program_id(0) // chunks
    tiles_across = tl.cdiv(width, OUT)
    tiles = tl.cdiv(height, OUT) * tiles_across
    sample = tile // tiles
    first_y = (tile % tiles) // tiles_across * OUT
    first_x = (tile % tiles) % tiles_across * OUT
    expert = tl.load(index_ptr + sample)
    known = (expert >= 0) & (expert < len(RATIOS))
    expert = tl.where(known, expert, 0)
    ratio = ratio_of(expert, RATIOS)
    tile = tile.to(tl.int64)
    if EVEN:
        if ratio % 2 == 0:
            backward_tile(
                dz_ptr, dz_pad_ptr, h_ptr, weight_ptr, bias_ptr, patch_ptr, part_ptr, tile, chunk,
                sample, first_y, first_x, expert, known, ratio, rank, channels, chunks, height,
                width, image_height, image_width, down, across, 4, GELU, DEPTHWISE, NEED_H,
                NEED_WEIGHT, OUT, HALO, SOURCE,
            )  # fmt: skip
    if ODD:
        if ratio % 2 == 1:
            backward_tile(
                dz_ptr, dz_pad_ptr, h_ptr, weight_ptr, bias_ptr, patch_ptr, part_ptr, tile, chunk,
                sample, first_y, first_x, expert, known, ratio, rank, channels, chunks, height,
                width, image_height, image_width, down, across, 1, GELU, DEPTHWISE, NEED_H,
                NEED_WEIGHT, OUT, HALO, SOURCE,
            )  # fmt: skip


@triton.jit
def gather(dz_ptr, dh_ptr, patch_ptr, daux_ptr, dpool_ptr, block, tokens, rank, slots, height,
           width, image_height, image_width, down, across, RESIDUAL: tl.constexpr,
           OUT: tl.constexpr, HALO: tl.constexpr, SOURCE: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """dh of BLOCK elements: the residual, the patches that hold them, and the balance's share."""
    first = block.to(tl.int64) * BLOCK
    offs = (first % rank).to(tl.int32) + tl.arange(0, BLOCK)  # from the first element's row
    channel, local = offs % rank, offs // rank
    first_row = first // rank
    live = first_row + local < tokens
    pixel = (first_row % (image_height * image_width)).to(tl.int32) + local  # may run over images
    image = first_row // (image_height * image_width) + pixel // (image_height * image_width)
    pixel %= image_height * image_width
    line, column = pixel // image_width, pixel % image_width
    sample = (image * down + line // height) * across + column // width
    y, x = line % height, column % width
    tiles_down, tiles_across = tl.cdiv(height, OUT), tl.cdiv(width, OUT)
    total = tl.zeros((BLOCK,), tl.float32)
    if RESIDUAL:
        total += tl.load(dz_ptr + first + tl.arange(0, BLOCK), live, other=0.0).to(tl.float32)
    REACH: tl.constexpr = 1 if HALO == 0 else 2  # tiles along an axis whose patches hold a source
    for down_tile in tl.static_range(REACH):
        for across_tile in tl.static_range(REACH):
            tile_y = (y + HALO) // OUT - down_tile
            tile_x = (x + HALO) // OUT - across_tile
            holds = live & (tile_y >= 0) & (tile_y < tiles_down)
            holds &= (tile_x >= 0) & (tile_x < tiles_across)
            tile = sample * (tiles_down * tiles_across) + tile_y * tiles_across + tile_x
            at = (y + HALO - tile_y * OUT) * SOURCE + x + HALO - tile_x * OUT
            for slot in range(0, slots):
                patch = ((tile * slots + slot) * rank + channel) * (SOURCE * SOURCE) + at
                total += tl.load(patch_ptr + patch, holds, other=0.0)
    if daux_ptr is not None:
        dpool = tl.load(dpool_ptr + sample * rank + channel, live, other=0.0)
        total += tl.load(daux_ptr) * dpool
    at = dh_ptr + first + tl.arange(0, BLOCK)
    tl.store(at, total.to(dh_ptr.dtype.element_ty), live)


@triton.jit
def add_parts(part_ptr, index_ptr, dweight_ptr, dbias_ptr, expert, block, samples, tiles, size,
              rank, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """Gradients of BLOCK_E of an expert's numbers: sums over the tiles of its samples, in order."""
    number = block * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, samples * tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T).to(tl.int64)
        chosen = tl.load(index_ptr + tile // tiles, tile < samples * tiles, other=-1)
        mine = (chosen == expert)[:, None] & (number < size + rank)[None, :]
        at = tile[:, None] * (size + rank) + number[None, :]
        total += tl.sum(tl.load(part_ptr + at, mine, other=0.0), 0)
    at = dweight_ptr + expert * size + number
    tl.store(at, total.to(dweight_ptr.dtype.element_ty), number < size)
    at = dbias_ptr + expert * rank + number - size
    live = (number >= size) & (number < size + rank)
    tl.store(at, total.to(dbias_ptr.dtype.element_ty), live)


@triton.jit(launch_metadata=launched(__package__))
def reduce_kernel(
    dz_ptr,
    dh_ptr,
    patch_ptr,
    part_ptr,
    index_ptr,
    dweight_ptr,
    dbias_ptr,
    daux_ptr,
    dpool_ptr,
    dgate_ptr,
    dw_gate_ptr,
    dw_noise_ptr,
    tokens,
    samples,
    rank,
    experts,
    slots,
    size,
    height,
    width,
    image_height,
    image_width,
    down,
    across,
    dh_blocks,
    number_blocks,
    RESIDUAL: tl.constexpr,
    OUT: tl.constexpr,
    HALO: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Second stages in one launch: the experts' gradients, dh, and the gate's scaled gradients."""
    pid = tl.program_id(0)
    if part_ptr is not None:
        if pid < experts * number_blocks:
            tiles = tl.cdiv(height, OUT) * tl.cdiv(width, OUT)
            add_parts(
                part_ptr, index_ptr, dweight_ptr, dbias_ptr, pid // number_blocks,
                pid % number_blocks, samples, tiles, size, rank, BLOCK_T, BLOCK_E,
            )  # fmt: skip
    block = pid - experts * number_blocks
    if dh_ptr is not None:
        if (block >= 0) & (block < dh_blocks):
            gather(
                dz_ptr, dh_ptr, patch_ptr, daux_ptr, dpool_ptr, block, tokens, rank, slots, height,
                width, image_height, image_width, down, across, RESIDUAL, OUT, HALO, SOURCE, BLOCK,
            )  # fmt: skip
    if daux_ptr is not None:
        if block >= dh_blocks:
            offs = (block - dh_blocks) * BLOCK + tl.arange(0, BLOCK)
            live = offs < rank * experts
            daux = tl.load(daux_ptr)
            tl.store(dw_gate_ptr + offs, daux * tl.load(dgate_ptr + offs, live, other=0.0), live)
            noise = tl.load(dgate_ptr + rank * experts + offs, live, other=0.0)
            tl.store(dw_noise_ptr + offs, daux * noise, live)


def forward(h, weight, bias, index, windows, ratios, residual, activation):
    h, weight, bias, index = (t.contiguous() for t in (h, weight, bias, index))
    z, z_pad = torch.empty_like(h), h.new_empty(windows.batch * windows.pads, h.shape[1])
    if windows.samples == 0:
        return z, z_pad
    tile, rank = _tile(windows), h.shape[1]
    with _on(h):
        forward_kernel[(windows.samples * _tiles(windows, tile) * rank,)](
            h, weight, bias, index, z, z_pad, rank, weight.shape[2], *_sizes(windows),
            RATIOS=tuple(ratios), RESIDUAL=residual, GELU=activation == "gelu",
            DEPTHWISE=_depthwise(weight), PADDED=windows.pads > 0, **_parities(ratios), **tile,
            num_warps=8 if tile["OUT"] == NARROW else 4, num_stages=1,
            maxnreg=REGISTERS[h.element_size()],
        )  # fmt: skip
    return z, z_pad


def backward(
    dz, dz_pad, h, weight, bias, index, windows, ratios, residual, activation, balance, needs
):
    need_h, need_weight = needs
    if windows.samples == 0:
        dweight, dbias = (torch.zeros_like(t) if need_weight else None for t in (weight, bias))
        gate = (None, None) if balance is None else tuple(balance[0] * d for d in balance[2])
        return torch.empty_like(h) if need_h else None, dweight, dbias, *gate
    dz, h, weight, bias, index = (t.contiguous() for t in (dz, h, weight, bias, index))
    dz_pad = dz_pad.contiguous() if dz_pad is not None and windows.pads else None
    daux, dpool, dgate = (None,) * 3 if balance is None else (t.contiguous() for t in balance)
    dh = torch.empty_like(h) if need_h else None
    dweight, dbias = (torch.empty_like(t) if need_weight else None for t in (weight, bias))
    dw_gate, dw_noise = (None if daux is None else torch.empty_like(dgate[0]) for _ in range(2))
    grads = (dh, dweight, dbias, dw_gate, dw_noise)
    tile, rank, samples = _tile(windows), h.shape[1], windows.samples
    tiles, depthwise = _tiles(windows, tile), _depthwise(weight)
    chunks = channel_chunks(windows, rank, depthwise)
    slots = 1 if depthwise else chunks
    size = weight[0].numel()

    def scratch(*shape):
        return h.new_empty(samples * tiles, *shape, dtype=torch.float32)

    patch = scratch(slots, rank, SOURCE, SOURCE) if need_h else None
    part = scratch(size + rank) if need_weight else None
    block, block_t, block_e = 1024, 32, 32
    dh_blocks = triton.cdiv(dh.numel(), block) if need_h else 0
    number_blocks = triton.cdiv(size + rank, block_e) if need_weight else 0
    gate_blocks = 0 if daux is None else triton.cdiv(rank * len(ratios), block)
    blocks = len(ratios) * number_blocks + dh_blocks + gate_blocks
    with _on(h):
        if need_h or need_weight:
            backward_kernel[(samples * tiles * chunks,)](
                dz, dz_pad, h, weight, bias, index, patch, part, rank, weight.shape[2], chunks,
                *_sizes(windows), RATIOS=tuple(ratios), GELU=activation == "gelu",
                DEPTHWISE=depthwise, NEED_H=need_h, NEED_WEIGHT=need_weight, **_parities(ratios),
                **tile, num_warps=8, num_stages=1, maxnreg=REGISTERS[h.element_size()],
            )  # fmt: skip
        if blocks:
            reduce_kernel[(blocks,)](
                dz, dh, patch, part, index, dweight, dbias, daux, dpool, dgate, dw_gate, dw_noise,
                windows.tokens, samples, rank, len(ratios), slots, size, *_sizes(windows),
                dh_blocks, number_blocks, RESIDUAL=residual, **tile, BLOCK=block, BLOCK_T=block_t,
                BLOCK_E=block_e, num_warps=8, num_stages=1, maxnreg=REGISTERS[h.element_size()],
            )  # fmt: skip
    return grads


def channel_chunks(windows, rank: int, depthwise: bool) -> int:
    """Programs that share a tile's channels: more run at once, but each has patches of its own."""
    if depthwise:
        return rank  # a channel's gradient fills its own patch
    patches = _tiles(windows, _tile(windows)) * SOURCE * SOURCE
    most = max(1, min(rank, DH_COPIES * windows.height * windows.width // patches))
    return triton.cdiv(rank, triton.cdiv(rank, most))  # none without a channel


def _tile(windows):
    whole = max(windows.height, windows.width) <= NARROW
    return {"OUT": NARROW if whole else TILE, "HALO": 0 if whole else HALO, "SOURCE": SOURCE}


def _tiles(windows, tile):
    return triton.cdiv(windows.height, tile["OUT"]) * triton.cdiv(windows.width, tile["OUT"])


def _sizes(windows):
    return (
        windows.height, windows.width, windows.image_height, windows.image_width, windows.down,
        windows.across,
    )  # fmt: skip


def _depthwise(weight):
    return weight.shape[2] == 1 and weight.shape[1] > 1


def _parities(ratios):
    return {"EVEN": any(s % 2 == 0 for s in ratios), "ODD": any(s % 2 for s in ratios)}


def _on(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
