# SPDX-License-Identifier: Apache-2.0
"""The tables of angles: made, taken from a model's own, and by position of an image or padding."""

import math

import torch
from torch import Tensor

from samfast.kernels._common.windows import Windows

PAIRS = ("interleaved", "halves")
ORDERS = ("xy", "yx")


def axial_tables(
    height: int,
    width: int,
    head_dim: int,
    *,
    theta: float = 10000.0,
    scale: float = 1.0,
    offset: float = 0.0,
    order: str = "xy",
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of axial 2-D rotary embedding (Heo et al. 2024), as SAM 3 makes them.

    Returns cos and sin, (height · width, head_dim / 2) float32; row y · width + x is position
    (y, x). Pair i of the first half turns by (x · scale + offset) · theta ** (−4 i / head_dim)
    radians, that of the second half by the same of y.

    height, width: of the window, or of the map where attention is global
    scale, offset: of positions; SAM 3 scales its global maps by window / map
    order: which coordinate the first half has, "xy" (SAM 3) or "yx"

    Raises ValueError when a size is below 1, head_dim is not a multiple of 4, theta is not
    a finite number above 0 or order is unknown.

    >>> from samfast.functional import axial_tables
    >>> cos, sin = axial_tables(24, 24, 64)
    >>> cos.shape
    torch.Size([576, 32])
    """
    for name, size in (("height", height), ("width", width), ("head_dim", head_dim)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be a whole number of at least 1")
    if head_dim % 4:
        raise ValueError(f"head_dim is {head_dim}; two axes of pairs need a multiple of 4")
    if not 0.0 < theta < math.inf:
        raise ValueError(f"theta is {theta}; it must be a finite number above 0")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it must be one of {', '.join(ORDERS)}")
    powers = torch.arange(0, head_dim, 4, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**powers
    y, x = (
        torch.outer(
            torch.arange(n, dtype=torch.float32, device=device) * scale + offset, frequencies
        )
        for n in (height, width)
    )  # (size, head_dim / 4)
    y = y[:, None].expand(height, width, -1)
    x = x[None, :].expand(height, width, -1)
    angles = torch.cat([x, y] if order == "xy" else [y, x], 2).flatten(0, 1)
    return angles.cos(), angles.sin()


def tables_of(
    freqs: Tensor, sin: Tensor | None = None, *, pairs: str = "interleaved", check: bool = True
) -> tuple[Tensor, Tensor]:
    """cos and sin of a model's own tables, (L, head_dim / 2), as views: nothing is copied.

    freqs without sin: (L, head_dim / 2) complex64, cos + i sin, as facebookresearch/sam3 keeps them
    freqs and sin: cos and sin, (L, head_dim), as Hugging Face gives them. Each value appears
        twice, side by side for "interleaved" (Sam3) and head_dim / 2 apart for "halves" (DINOv3).
    A leading dimension of 1 is dropped.

    check: compare both copies of each value, so that tables of the other kind are refused. This
        reads them and synchronises with a GPU; pass False for tables that were checked before.
    Raises ValueError when shapes, dtypes or values are not of either form.

    >>> import torch
    >>> from samfast.functional import tables_of
    >>> freqs = torch.polar(torch.ones(9, 8), torch.rand(9, 8))
    >>> cos, sin = tables_of(freqs)
    >>> cos.shape
    torch.Size([9, 8])
    """
    if pairs not in PAIRS:
        raise ValueError(f"pairs is {pairs!r}; it must be one of {', '.join(PAIRS)}")
    if sin is None:
        table = _rows(freqs)
        if table is None or not table.is_complex():
            raise ValueError(
                f"expected complex (L, head_dim / 2), or cos and sin (L, head_dim), got one "
                f"{freqs.dtype} tensor {tuple(freqs.shape)}"
            )
        return table.real, table.imag
    cos, sin_rows = _rows(freqs), _rows(sin)
    alike = freqs.shape == sin.shape and freqs.dtype == sin.dtype
    if cos is None or not alike or not freqs.is_floating_point() or freqs.shape[-1] % 2:
        raise ValueError(
            f"expected cos and sin (L, head_dim) of one dtype and even head_dim, got {freqs.dtype} "
            f"{tuple(freqs.shape)} and {sin.dtype} {tuple(sin.shape)}"
        )
    if freqs.device != sin.device:
        raise ValueError(f"cos is on {freqs.device} but sin is on {sin.device}")
    made = []
    for name, table in (("cos", cos), ("sin", sin_rows)):
        first, second = table.chunk(2, 1) if pairs == "halves" else (table[:, 0::2], table[:, 1::2])
        if check and not table.is_meta and not torch.equal(first, second):
            raise ValueError(
                f"{name} does not have each value twice, as pairs={pairs!r} needs; pass the other "
                f"of {', '.join(PAIRS)}, or tables (L, head_dim / 2) to rope itself"
            )
        made.append(first)
    return made[0], made[1]


def _rows(table: Tensor) -> Tensor | None:
    """The table without a leading dimension of 1; None where it is not a matrix then."""
    table = table[0] if table.dim() == 3 and table.shape[0] == 1 else table
    return table if table.dim() == 2 else None


def image_rows(table: Tensor, windows: Windows) -> Tensor:
    """The rows of an image's tokens, (H, W, head_dim / 2); a view where the window is the map."""
    size = windows.image_height, windows.image_width
    if windows[3:] == size:
        return table.unflatten(0, size)
    return _spread(table, windows)[0].unflatten(0, size)


def pad_rows(table: Tensor, windows: Windows) -> Tensor:
    """The rows of the padding's positions, (pads, head_dim / 2), in the order of a pad buffer.

    table: (height · width, head_dim / 2)   windows: of which the batch does not matter
    """
    return _spread(table, windows)[1]


def _spread(table: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """The rows of the tokens and of the pads of one image."""
    one = windows._replace(batch=1)
    samples = table.unflatten(0, (windows.height, windows.width))
    return one.paste(samples.expand(one.samples, -1, -1, -1))
