# SPDX-License-Identifier: Apache-2.0
"""What attention without a bias launches at real sizes, on tensors without data.

The kernels are relpos_attention's with REL = 0. Some GPUs have tiles of their own, so each call is
there for theirs and for everyone else's.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common import without_data
from samfast.kernels._common.windows import Windows
from samfast.kernels._common.without_data import in_tf32
from samfast.kernels.relpos_attention import triton_kernels as kernels
from samfast.kernels.relpos_attention.launches import Calls, tiled
from samfast.kernels.relpos_attention.triton_kernels import FLOAT32_HEAD


def launches(quick: bool) -> Iterator[tuple[str, Calls]]:
    """SAM 3's windows of 24, which divide its map, and SAM's of 14, which need padding.

    quick: a call for a GPU with WGMMA and one for a GPU with HMMA
    """
    bf16 = torch.bfloat16
    even, padded = Windows(4, 72, 72, 24, 24), Windows(4, 64, 64, 14, 14)
    for name, only, call in (
        ("hd64 windows", "sm_90", partial(run, even, 16, 64, bf16)),
        ("hd80 padded", "sm_86", partial(run, padded, 16, 80, bf16)),
    ):
        yield f"window_attention bfloat16 {name}", tiled(call, [only] if quick else None)
    if not quick:
        for name, call in _others(even, padded):
            yield f"window_attention {name}", tiled(call)


def _others(even, padded) -> Iterator[tuple[str, Callable[[], None]]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    whole, odd = Windows.whole(1, 72, 72), Windows.whole(4, 9, 13)
    for head_dim in (16, 48, 64, 80, 112, 128):
        yield f"bfloat16 hd{head_dim} padded", partial(run, padded, 16, head_dim, bf16)
    for head_dim in (64, 80, 128):
        yield f"bfloat16 hd{head_dim} windows", partial(run, even, 16, head_dim, bf16)
    yield "bfloat16 hd80 odd", partial(run, odd, 16, 80, bf16)
    yield "float16 hd64 padded", partial(run, padded, 16, 64, fp16)
    yield "float32 hd48 padded", partial(run, padded, 16, 48, fp32)
    for name, form in (("windows", even), ("padded", padded), ("global", whole)):
        yield f"float32 hd64 {name}", partial(run, form, 16, FLOAT32_HEAD, fp32)
        yield f"tf32 hd64 {name}", in_tf32(partial(run, form, 16, 64, fp32))
    for pads in ("rows", "none"):
        for wanted in (True, False):
            name = f"bfloat16 pads {pads}{'' if wanted else ' fixed'}"
            yield name, partial(run, padded, 16, 80, bf16, pads, wanted)
    yield "bfloat16 hd64 fixed", partial(run, padded, 12, 64, bf16, "bias", False)


def run(windows, heads, head_dim, dtype, pads="bias", want_pads=True) -> None:
    """A forward and backward on packed qkv."""
    meta = partial(without_data.meta, dtype=dtype)
    shape = (windows.batch, windows.image_height, windows.image_width)
    qkv, dqkv = (meta(*shape, 3, heads, head_dim).unbind(3) for _ in range(2))
    rows = (windows.batch, windows.pads, heads, head_dim)
    pad, dpad = (None, None), (None, None)
    if windows.pads and pads == "rows":
        pad = meta(*rows), meta(*rows)
    if windows.pads and pads == "bias":
        pad = [meta(heads, head_dim).expand(rows) for _ in range(2)]
    if windows.pads and want_pads:
        dpad = meta(windows.batch, windows.pads, 3, heads, head_dim).unbind(2)[1:]
    inputs = (*qkv, *pad, None, None)
    out, lse = kernels.forward(*inputs, windows, 0.125)
    kernels.backward(
        meta(*shape, heads, head_dim), *inputs, out, lse, windows, 0.125, *dqkv, *dpad, False
    )
