# SPDX-License-Identifier: Apache-2.0
"""What rope launches at real sizes, on tensors without data."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common.windows import Windows
from samfast.kernels._common.without_data import meta
from samfast.kernels.rope import triton_kernels as kernels
from samfast.kernels.rope.triton_kernels import MAX_HEAD

WINDOWS, WHOLE = Windows(4, 72, 72, 24, 24), Windows.whole(4, 72, 72)


def launches(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """SAM 3's windows and global maps; each width of a head, both kinds of pairs, tables that are
    views of complex numbers, q by itself, an image beyond int32."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield "rope bfloat16 hd64 windows", partial(run, WINDOWS, 16, 64, bf16)
    if quick:
        return
    for halves in (False, True):
        kind = "halves" if halves else "interleaved"
        for dtype, widths in (
            (bf16, (2, 48, 64, 80, 128, MAX_HEAD)),
            (fp16, (64,)),
            (fp32, (64, 80, MAX_HEAD)),
        ):
            for head_dim in widths:
                name = f"rope {str(dtype)[6:]} hd{head_dim} {kind}"
                yield name, partial(run, WHOLE, 16, head_dim, dtype, halves, back=head_dim == 64)
        yield f"rope bfloat16 complex {kind}", partial(run, WINDOWS, 16, 64, bf16, halves, 2)
        yield f"rope bfloat16 q {kind}", partial(run, WHOLE, 12, 64, bf16, halves, parts=1)
        large = Windows.whole(1, 1 << 13, 1 << 13)
        yield f"rope bfloat16 large {kind}", partial(run, large, 16, 64, bf16, halves)
        yield f"rope float32 1 head {kind}", partial(run, WINDOWS, 1, 30, fp32, halves, parts=3)


def run(windows, heads, head_dim, dtype, halves=False, stride=1, parts=2, back=True) -> None:
    """In place and, with ``back``, from one tensor to another and back.

    stride: between a table's pairs
    """
    shape = windows.batch, windows.image_height, windows.image_width, 3, heads, head_dim
    x, out = (meta(*shape, dtype=dtype)[:, :, :, :parts] for _ in range(2))
    positions = windows.height * windows.width
    cos, sin = (meta(positions, head_dim // 2, stride)[..., 0] for _ in range(2))
    kernels.rotate(x, x, cos, sin, windows, halves, False)
    if back:
        kernels.rotate(x, out, cos, sin, windows, halves, True)
