# SPDX-License-Identifier: Apache-2.0
"""Rotate q and k in place. ``op`` rotates a copy; ``sam_block`` rotates inside its own node."""

import torch
from torch import Tensor

from samfast.kernels._common.table import Table
from samfast.kernels._common.windows import Windows
from samfast.kernels.rope.tables import pad_rows

__all__ = ["TABLE", "pad_rows", "path_of", "rotate_", "supports"]

TABLE = Table(
    "rope",
    __package__,
    absent={"cuda": "it has no CUDA source; triton runs it on a GPU"},
    native="rope_rotate",
)


def supports(backend: str, t: Tensor) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not.

    t: (B, H, W, n, heads, head_dim)
    """
    missing = TABLE.missing(backend, t.device, x=t.dtype)
    if missing is not None or backend != "triton":
        return missing
    from samfast.kernels.rope import triton_kernels

    return triton_kernels.missing(t)


def path_of(backend: str, t: Tensor):
    """The path that rotates t when the call asks for ``backend``."""
    return TABLE.path(TABLE.part(backend), t.device, lambda b: supports(b, t))


def rotate_(
    backend: str,
    t: Tensor,
    cos: Tensor,
    sin: Tensor,
    windows: Windows,
    halves: bool,
    inverse: bool,
) -> None:
    """Rotate t in place: (a, b) becomes (a cos − b sin, b cos + a sin) in every pair.

    t: (B, H, W, n, heads, head_dim), any strides, except that the last must be 1
    cos, sin: (height · width, head_dim / 2), any strides, float32 (float64 for float64); token
        (y, x) has row (y % height) · width + x % width
    halves: pairs are features i and i + head_dim / 2, else 2 i and 2 i + 1
    inverse: sin is negated

    Arithmetic is float32 (float64 for float64), rounded once to t's dtype. Saves nothing: the
    backward is the same call with ``inverse`` flipped. Raises ValueError when shapes, strides,
    dtypes or devices do not fit, and RuntimeError when a backend asked for by name cannot run.

        rotate_("auto", qkv[:, :, :, :2], cos, sin, windows, halves=False, inverse=False)
    """
    check(t, cos, sin, windows)
    if t.stride(-1) != 1:
        raise ValueError(
            f"t has stride {t.stride(-1)} in its last dimension, but must have 1; pass a dense t"
        )
    if 0 in [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]:
        raise ValueError(
            f"t has strides {t.stride()}, which hold several elements in one place; rotate a copy"
        )
    path_of(backend, t).rotate(t, t, cos, sin, windows, halves, inverse)


def check(t: Tensor, cos: Tensor, sin: Tensor, windows: Windows) -> None:
    """Raise ValueError when the tables do not fit t in these windows."""
    size = windows.batch, windows.image_height, windows.image_width
    if t.dim() != 6 or t.shape[:3] != size or t.shape[5] % 2 or t.shape[5] == 0:
        raise ValueError(
            f"t has shape {tuple(t.shape)}, but {size[0]} images of {size[1]}×{size[2]} tokens "
            f"need ({', '.join(map(str, size))}, n, heads, head_dim) with an even head_dim"
        )
    shape = windows.height * windows.width, t.shape[5] // 2
    dtype = torch.promote_types(t.dtype, torch.float32)
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) != shape:
            doubled = tuple(table.shape) == (shape[0], t.shape[5])
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}, but windows of {windows.height}×"
                f"{windows.width} with head_dim {t.shape[5]} need {shape}"
                + ("; tables_of takes tables with each value twice" if doubled else "")
            )
        if table.dtype != dtype:
            raise ValueError(
                f"{name} is {table.dtype}, but {t.dtype} is rotated with {dtype}; pass "
                f"{name}.to({dtype})"
            )
        if table.device != t.device:
            raise ValueError(f"{name} is on {table.device} but what it rotates is on {t.device}")
