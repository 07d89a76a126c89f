# SPDX-License-Identifier: Apache-2.0
"""``expert_gate`` as two Triton launches: a pool per sample, then everything else in one program.

The balancing loss couples all samples through sums over them, so one program walks over the samples
twice. The first walk makes the choices and the sums, the second the loss's gradient. There are few
samples and experts; up to MAX_TOGETHER samples are one tile. Walking in order makes every sum the
same each time.
"""

import contextlib

import torch
import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.expert_gate import costs

MAX_RANK = 16  # the widest tile of pooled samples, next to
MAX_EXPERTS = 16  # as many columns of logits: tiles of 32 already spill

MAX_TOGETHER = 64  # samples of a tile; 128 spill

POOL_ROWS = 512  # positions that one program pools


@triton.jit(launch_metadata=launched(__package__))
def pool_kernel(
    h_ptr,
    pool_ptr,
    rank,
    height,
    width,
    image_height,
    image_width,
    down,
    across,
    chunks,
    area,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sums over ROWS positions of a window as a share of its area: pool (samples, chunks, r)."""
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    image = sample // (down * across)
    window = (sample % (down * across)).to(tl.int32)
    offs_r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, ROWS, BLOCK_M):
        position = chunk * ROWS + first + tl.arange(0, BLOCK_M)
        line = window // across * height + position // width
        column = window % across * width + position % width
        inside = (position < height * width) & (line < image_height) & (column < image_width)
        row = (image * image_height + line) * image_width + column
        live = inside[:, None] & (offs_r[None, :] < rank)
        h = tl.load(h_ptr + row[:, None] * rank + offs_r[None, :], live, other=0.0)
        total += h.to(tl.float32)
    total = tl.sum(tl.reshape(total, (16, BLOCK_M // 16, BLOCK_R)), 1)
    total = tl.sum(total, 0) / area
    tl.store(pool_ptr + tl.program_id(0).to(tl.int64) * rank + offs_r, total, offs_r < rank)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) and its slope. log(1 + e) is 2 artanh(e / (2 + e)), a series that keeps what
    rounding 1 + e would lose."""
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)  # at most a third
    s = z * z
    series = 1.0 / 15 + s * (1.0 / 17)
    series = 1.0 / 11 + s * (1.0 / 13 + s * series)
    series = 1.0 / 7 + s * (1.0 / 9 + s * series)
    series = 1.0 / 3 + s * (1.0 / 5 + s * series)
    value = tl.maximum(x, 0.0) + 2.0 * z * (1.0 + s * series)
    slope = tl.where(x < 0.0, e, 1.0) / (1.0 + e)
    nan = x != x
    return tl.where(nan, x, value), tl.where(nan, x, slope)


@triton.jit
def choose(pool_ptr, noise_ptr, w_gate, w_noise, first, samples, rank, experts, chunks,
           BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """For BLOCK_N samples: g (BLOCK_N, BLOCK_R), the positions of the largest and second largest
    logit (BLOCK_N, 1), and with noise what the load is made of, (BLOCK_N, BLOCK_E) each."""
    sample = first + tl.arange(0, BLOCK_N).to(tl.int64)
    offs_r, expert = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)[None, :]
    live = (sample[:, None] < samples) & (offs_r[None, :] < rank)
    g = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for chunk in range(0, chunks):
        at = (sample * chunks + chunk)[:, None] * rank + offs_r[None, :]
        g += tl.load(pool_ptr + at, live, other=0.0)
    clean = tl.dot(g, w_gate, input_precision="ieee")  # (BLOCK_N, BLOCK_E)
    noise = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    sigma, slope, logits = noise + 1.0, noise, clean
    if noise_ptr is not None:
        live = (sample[:, None] < samples) & (expert < experts)
        noise = tl.load(noise_ptr + sample[:, None] * experts + expert, live, other=0.0)
        sigma, slope = softplus(tl.dot(g, w_noise, input_precision="ieee"))
        sigma += 0.01
        logits = clean + noise * sigma
    # NaN counts as the largest, so that there always is a choice, as argmax has it
    order = tl.where(logits != logits, float("inf"), logits)
    order = tl.where(expert < experts, order, float("-inf"))
    highest = tl.max(order, 1)[:, None]
    best = tl.min(tl.where(order == highest, expert, BLOCK_E), 1)[:, None]
    others = tl.where(expert == best, float("-inf"), order)
    next_highest = tl.max(others, 1)[:, None]
    free = (others == next_highest) & (expert != best)
    second = tl.min(tl.where(free, expert, BLOCK_E), 1)[:, None]
    inside = logits > next_highest
    t = (clean - tl.where(inside, next_highest, highest)) / sigma
    return g, best, second, inside, t, sigma, slope, noise


@triton.jit
def squared_variation(v, experts, live):
    """CV² of v (BLOCK_E,), where live, and its gradient; 0 for a single expert."""
    mean = tl.sum(v, 0) / experts
    apart = tl.where(live, v - mean, 0.0)
    floor = mean * mean + 1e-10
    degrees = tl.maximum(experts - 1.0, 1.0)
    variation = tl.sum(apart * apart, 0) / degrees / floor
    slope = 2.0 * apart / (degrees * floor) - 2.0 * variation * mean / (floor * experts)
    return variation, tl.where(live, slope, 0.0)


@triton.jit(launch_metadata=launched(__package__, costs.balance_kernel))
def balance_kernel(
    pool_ptr,
    w_gate_ptr,
    w_noise_ptr,
    noise_ptr,
    given_ptr,
    index_ptr,
    aux_ptr,
    dpool_ptr,
    dgate_ptr,
    coefficient,
    samples,
    rank,
    experts,
    chunks,
    area,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The choices, the loss and its gradient from pool (samples, chunks, r); one program."""
    offs_r, offs_e = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    weight_at = offs_r[:, None] * experts + offs_e[None, :]
    weight_live = (offs_r[:, None] < rank) & (offs_e[None, :] < experts)
    w_gate = tl.load(w_gate_ptr + weight_at, weight_live, other=0.0).to(tl.float32)
    w_noise = tl.load(w_noise_ptr + weight_at, weight_live, other=0.0).to(tl.float32)
    importance = tl.zeros((BLOCK_E,), tl.float32)
    load = tl.zeros((BLOCK_E,), tl.float64)  # the slope is of differences between these sums
    for first in range(0, samples, BLOCK_N):
        _, best, _, _, t, _, _, _ = choose(
            pool_ptr, noise_ptr, w_gate, w_noise, first, samples, rank, experts, chunks, BLOCK_N,
            BLOCK_R, BLOCK_E,
        )  # fmt: skip
        sample = first + tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
        live = sample < samples
        chosen = best.to(tl.int64)
        if given_ptr is not None:
            chosen = tl.load(given_ptr + sample, live, other=-1)
        tl.store(index_ptr + sample, chosen, live)
        importance += tl.sum(((chosen == offs_e[None, :]) & live).to(tl.float32), 0)
        if noise_ptr is not None:
            within = live & (offs_e[None, :] < experts)
            p = 0.5 + 0.5 * tl.math.erf(t * 0.7071067811865476)
            load += tl.sum(tl.where(within, p, 0.0).to(tl.float64), 0)
    many, used = experts * 1.0, offs_e < experts
    aux, _ = squared_variation(tl.where(used, importance, 0.0), many, used)
    if noise_ptr is None:
        tl.store(aux_ptr, coefficient * 2.0 * aux)
    else:
        load_aux, dload = squared_variation(load, many, used)
        dload = dload.to(tl.float32)
        tl.store(aux_ptr, coefficient * (aux + load_aux.to(tl.float32)))
    dw_gate = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    dw_noise = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    for first in range(0, samples, BLOCK_N):
        sample = first + tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
        dpool = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        if noise_ptr is not None:
            g, best, second, inside, t, sigma, slope, noise = choose(
                pool_ptr, noise_ptr, w_gate, w_noise, first, samples, rank, experts, chunks,
                BLOCK_N, BLOCK_R, BLOCK_E,
            )  # fmt: skip
            # t = (clean - bar) / sigma, and the bars are the two largest noisy logits
            dclean = coefficient * dload[None, :] * tl.exp(-0.5 * t * t) * 0.3989422804014327
            within = (sample < samples) & used[None, :] & (dload != 0.0)[None, :]
            dclean = tl.where(within, dclean / sigma, 0.0)
            dsigma = tl.where(within, -dclean * t, 0.0)
            to_best = tl.sum(tl.where(inside, 0.0, dclean), 1)[:, None]
            to_second = tl.sum(tl.where(inside, dclean, 0.0), 1)[:, None]
            dlogits = tl.where(offs_e[None, :] == best, -to_best, 0.0)
            dlogits -= tl.where(offs_e[None, :] == second, to_second, 0.0)
            dclean += dlogits
            draw = (dsigma + dlogits * noise) * slope
            dw_gate += tl.dot(tl.trans(g), dclean, input_precision="ieee")
            dw_noise += tl.dot(tl.trans(g), draw, input_precision="ieee")
            dpool = tl.dot(dclean, tl.trans(w_gate), input_precision="ieee")
            dpool += tl.dot(draw, tl.trans(w_noise), input_precision="ieee")
            dpool /= area
        live = (sample < samples) & (offs_r[None, :] < rank)
        tl.store(dpool_ptr + sample * rank + offs_r[None, :], dpool, live)
    tl.store(dgate_ptr + weight_at, dw_gate, weight_live)
    tl.store(dgate_ptr + rank * experts + weight_at, dw_noise, weight_live)


def forward(h, w_gate, w_noise, noise, index, windows, coefficient):
    """index (N,), the loss, d loss / d h at any pixel of a sample (N, r), and (2, r, M) for both
    weights."""
    h, w_gate, w_noise = h.contiguous(), w_gate.contiguous(), w_noise.contiguous()
    noise = None if noise is None else noise.to(torch.float32).contiguous()
    given = None if index is None else index.contiguous()
    samples, (rank, experts) = windows.samples, w_gate.shape

    def new(*shape, dtype=torch.float32):
        return h.new_empty(shape, dtype=dtype)

    index, dpool = new(samples, dtype=torch.int64), new(samples, rank)
    if samples == 0:
        zeros = h.new_zeros(2, rank, experts, dtype=torch.float32)
        return index, h.new_zeros((), dtype=torch.float32), dpool, zeros
    aux, dgate = new(), new(2, rank, experts)
    area = windows.height * windows.width
    chunks = triton.cdiv(area, POOL_ROWS)
    pool = new(samples, chunks, rank)
    together = min(MAX_TOGETHER, max(32, triton.next_power_of_2(samples)))
    block_r, block_e = (max(16, triton.next_power_of_2(n)) for n in (rank, experts))
    with torch.cuda.device(h.device) if h.is_cuda else contextlib.nullcontext():
        pool_kernel[(samples * chunks,)](
            h, pool, rank, windows.height, windows.width, windows.image_height,
            windows.image_width, windows.down, windows.across, chunks, float(area),
            ROWS=POOL_ROWS, BLOCK_M=2048 // block_r, BLOCK_R=triton.next_power_of_2(rank),
            num_warps=4,
        )  # fmt: skip
        balance_kernel[(1,)](
            pool, w_gate, w_noise, noise, given, index, aux, dpool, dgate, float(coefficient),
            samples, rank, experts, chunks, float(area), BLOCK_N=together, BLOCK_R=block_r,
            BLOCK_E=block_e, num_warps=8, num_stages=1, maxnreg=255,
        )  # fmt: skip
    return index, aux, dpool, dgate
