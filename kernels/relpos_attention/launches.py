# SPDX-License-Identifier: Apache-2.0
"""What attention launches at real sizes, on tensors without data.

Some GPUs have tiles of their own, so each call is there for theirs and for everyone else's.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common import without_data
from samfast.kernels._common.windows import Windows
from samfast.kernels._common.without_data import in_tf32
from samfast.kernels.relpos_attention import tiling
from samfast.kernels.relpos_attention import triton_kernels as kernels
from samfast.kernels.relpos_attention.triton_kernels import FLOAT32_HEAD

Calls = dict[str, Callable[[], None]]


def launches(quick: bool) -> Iterator[tuple[str, Calls]]:
    """ViT-H's windows and ViT-B's global maps; each width of a head, way of the bias and padding.

    quick: a call for a GPU with WGMMA and one for a GPU with HMMA
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    windows, whole = Windows(4, 64, 64, 14, 14), Windows.whole(4, 64, 64)
    for name, only, call in (
        ("hd80 windows", "sm_90", partial(run, windows, 16, 80, bf16)),
        ("hd64 global", "sm_86", partial(run, whole, 12, 64, bf16)),
    ):
        yield f"relpos_attention bfloat16 {name}", tiled(call, [only] if quick else None)
    if not quick:
        for name, call in _others(windows, whole, bf16, fp16, fp32):
            yield f"relpos_attention {name}", tiled(call)


def _others(windows, whole, bf16, fp16, fp32) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, form in (("windows", windows), ("global", whole)):
        for head_dim in (16, 48, 64, 80, 112, 128):
            yield f"bfloat16 hd{head_dim} {name}", partial(run, form, 16, head_dim, bf16)
        for head_dim in (48, FLOAT32_HEAD):
            yield f"float32 hd{head_dim} {name}", partial(run, form, 16, head_dim, fp32)
        yield f"float16 hd80 {name}", partial(run, form, 16, 80, fp16)
        yield f"tf32 hd64 {name}", in_tf32(partial(run, form, 12, 64, fp32))
    odd, long = Windows.whole(4, 9, 13), Windows.whole(1, 96, 160)
    for head_dim in (16, 48, 64, 80, 112, 128):
        yield f"bfloat16 hd{head_dim} odd", partial(run, odd, 16, head_dim, bf16)
    yield "bfloat16 hd80 small", partial(run, Windows.whole(4, 14, 14), 16, 80, bf16)
    yield "bfloat16 hd64 long", partial(run, long, 12, 64, bf16)
    yield "bfloat16 hd80 lines", partial(run, Windows(4, 64, 64, 20, 20), 16, 80, bf16)
    for pads in ("rows", "none"):
        for wanted in (True, False):
            name = f"bfloat16 pads {pads}{'' if wanted else ' fixed'}"
            yield name, partial(run, windows, 16, 80, bf16, pads, wanted, wanted)
    yield "bfloat16 hd64 fixed", partial(run, windows, 12, 64, bf16, "bias", False, False)


def tiled(call: Callable[[], None], targets: list[str] | None = None) -> Calls:
    """The call by target: those with tiles of their own and "default", or only these."""
    if targets is None:
        targets = [name for name in tiling.targets() if name.startswith("sm_")] + ["default"]
    return {target: partial(_on, target, call) for target in targets}


def _on(target: str, call: Callable[[], None]) -> None:
    with tiles_of(target):
        call()


@contextlib.contextmanager
def tiles_of(target: str):
    """Tiles are those of this target."""
    before = tiling.target
    tiling.target = lambda x: target
    try:
        yield
    finally:
        tiling.target = before


def run(windows, heads, head_dim, dtype, pads="bias", want_pads=True, want_tables=True) -> None:
    """A forward and backward on packed qkv."""
    meta = partial(without_data.meta, dtype=dtype)
    shape = (windows.batch, windows.image_height, windows.image_width)
    qkv, dqkv = (meta(*shape, 3, heads, head_dim).unbind(3) for _ in range(2))
    rows = (windows.batch, windows.pads, 3, heads, head_dim)
    pad = (None, None, None)
    if windows.pads and pads != "none":
        pad = (meta(*rows) if pads == "rows" else meta(3, heads, head_dim).expand(rows)).unbind(2)
    dpad = meta(*rows).unbind(2) if windows.pads and want_pads else (None, None, None)
    sizes = windows.height, windows.width
    tables = [without_data.meta(2 * size - 1, head_dim) for size in sizes]
    inputs = (*qkv, *pad[1:], *tables)
    out, lse = kernels.forward(*inputs, windows, 0.125)
    kernels.backward(
        meta(*shape, heads, head_dim), *inputs, out, lse, windows, 0.125, *dqkv, *dpad[1:],
        want_tables,
    )  # fmt: skip
