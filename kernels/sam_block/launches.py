# SPDX-License-Identifier: Apache-2.0
"""What a block's element-wise stages launch at real sizes, on tensors without data."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common import without_data
from samfast.kernels._common.without_data import in_tf32
from samfast.kernels.lora_linear.engine import Sums
from samfast.kernels.lora_linear.triton_kernels import add_up
from samfast.kernels.sam_block import triton_kernels as kernels
from samfast.kernels.sam_block.triton_kernels import MAX_RANK


def launches(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """The stages of ViT-H and ViT-B at batch 4; every tile, of each kind of rows."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield "sam_block bfloat16 r4", partial(run, 1280, 4, bf16, bf16, others=not quick)
    yield "sam_block bfloat16 r16", partial(run, 1280, 16, bf16, bf16, others=not quick)
    if quick:
        return
    yield "sam_block bfloat16 r4 768 wide", partial(run, 768, 4, bf16, bf16)
    yield "sam_block bfloat16 r4 float32 residual", partial(run, 768, 4, bf16, fp32)
    for rank in (8, 32, 64, MAX_RANK[2]):
        yield f"sam_block bfloat16 r{rank}", partial(run, 1280, rank, bf16, bf16)
    name = f"sam_block bfloat16 r{MAX_RANK[2]} float32 residual"
    yield name, partial(run, 1280, MAX_RANK[2], bf16, fp32)
    for rank in (3, MAX_RANK[4]):
        call = partial(run, 1280, rank, fp32, fp32)
        yield f"sam_block float32 r{rank}", call
        yield f"sam_block tf32 r{rank}", in_tf32(call)
    yield "sam_block float16 r4 float32 residual", partial(run, 1280, 4, fp16, fp32)
    yield "sam_block float16 r4", partial(run, 1280, 4, fp16, fp16)
    odd = 4 * 4096 - 1
    yield "sam_block bfloat16 r1 odd", partial(run, 100, 1, bf16, bf16, odd)
    yield "sam_block bfloat16 r128 odd", partial(run, 100, MAX_RANK[2], bf16, fp32, odd)
    yield "sam_block float32 r32 odd", partial(run, 100, MAX_RANK[4], fp32, fp32, odd)
    yield "sam_block bfloat16 r4 narrow", partial(run, 192, 4, bf16, fp32)  # less than a chunk
    yield "sam_block float32 r8", partial(run, 1280, 8, fp32, fp32)
    yield "sam_block bfloat16 r3 bfloat16 norm", partial(run, 1024, 3, bf16, bf16, affine=bf16)


def run(width, rank, dtype, residual, tokens=4 * 4096, affine=torch.float32, others=True) -> None:
    """The stages of an adapted layer; with ``others``, also with more and less wanted, and without
    an adapter."""
    meta = partial(without_data.meta, dtype=dtype)
    x, update = meta(tokens, width, dtype=residual), meta(tokens, width)
    norm = (meta(width, dtype=affine), meta(width, dtype=affine), 1e-6)
    u, dh = meta(tokens, 4 * width), meta(tokens, rank)
    adapters = [[without_data.meta(rank, n) for n in (width, 4 * width)], (None, None)]
    of_u = (dh, without_data.meta(4 * width, rank), 0.5)
    wanted = ((False, True), (True, True), (False, False))
    if others:
        kernels.gelu_backward(u, u, (dh, adapters[0][1], True), False, (None, *of_u[1:]))
    for lora_a, wide in adapters if others else adapters[:1]:
        room = 0 if lora_a is None else kernels.room(lora_a, lora_a.t(), tokens, dtype)
        for columns in dict.fromkeys((room, 0) if others else (room,)):
            kernels.norm(x, *norm, dtype, lora_a, columns)
        if room:  # with qkv's weight
            for kind in dict.fromkeys((dtype, torch.float32)) if others else (dtype,):
                weight = without_data.meta(3 * width, width, dtype=kind)
                lora_b = without_data.meta(3 * width, rank)
                kernels.joint_weight(weight, lora_b, 0.5, room, dtype)
        taken = lora_a is not None and kernels.takes_up(lora_a.t(), lora_a)
        if others or not taken:
            kernels.add_norm(x, update, *norm, dtype, lora_a)
        if taken:
            up = (dh, without_data.meta(rank, width), 0.5)
            kernels.add_norm(x, update, *norm, dtype, lora_a, up)
            if room and others:
                kernels.add_norm(x, update, *norm, dtype, lora_a, up, room)
            kernels.add(x, update, up)
        lacks = of_u if wide is not None and kernels.left_to_gelu(of_u[1]) else None
        for left in dict.fromkeys((lacks, None) if others else (lacks,)):
            kernels.gelu(u, wide, left)
        for want, need_a in wanted if others else wanted[:1]:
            low = None if lora_a is None else (dh, lora_a, need_a)
            kernels.norm_backward(update, x, *norm, x, low, want)
            low = None if wide is None else (dh, wide, need_a)
            sums = Sums()
            kernels.gelu_backward(u, u, low, want, of_u, sums, lacks)
            if others:
                kernels.gelu_backward(u, u, low, want)
            _rest(sums, rank, width, tokens, dtype)


def _rest(sums: Sums, rank: int, width: int, tokens: int, dtype: torch.dtype) -> None:
    """Add up the gradients that wait: three with a dz of the block's width, the last by itself."""
    dz = without_data.meta(tokens, rank, dtype=dtype)
    for n in (width, 3 * width):
        sums.add(without_data.meta(32, rank, n), without_data.meta(rank, n), add_up)
    add_up(sums, without_data.meta(-(-width // 128), tokens, rank), dz, 1, rank)
    sums.add(without_data.meta(32, rank, width), without_data.meta(rank, width), add_up)
    sums.finish()
