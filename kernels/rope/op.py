# SPDX-License-Identifier: Apache-2.0
"""``rope``: operator schemas, autograd and the public function."""

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import check_dtypes
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.operator import Operator
from samfast.kernels._common.windows import Windows
from samfast.kernels.rope import engine, reference
from samfast.kernels.rope.engine import supports
from samfast.kernels.rope.tables import PAIRS

__all__ = ["rope", "supports"]


class Rope(Operator):
    """Saves the tables, which are the caller's; qkv is (batch, H, W, 3, heads, head_dim)."""

    name = "rope"
    inputs = (
        "Tensor qkv, Tensor cos, Tensor sin, SymInt[] windows, int parts, bool halves, str backend"
    )
    makes = "Tensor out"
    backward_inputs = inputs.replace("qkv", "dout") + ", bool[] needs"
    gradients = "qkv"

    @staticmethod
    def path(backend, parts, qkv=None, dout=None, **_):
        return engine.path_of(backend, (dout if qkv is None else qkv)[:, :, :, :parts])

    @staticmethod
    def forward(path, qkv, cos, sin, windows, parts, halves):
        return _rotated(path, qkv, cos, sin, windows, parts, halves, False)

    @staticmethod
    def backward(path, dout, cos, sin, windows, parts, halves, needs):
        return [_rotated(path, dout, cos, sin, windows, parts, halves, True) if needs[0] else None]

    @staticmethod
    def fake(qkv, *_):
        return qkv.new_empty(qkv.shape)

    @staticmethod
    def fake_backward(dout, *_):
        return [dout.new_empty(dout.shape)]


def _rotated(path, qkv, cos, sin, windows, parts, halves, inverse):
    """A dense copy; what is not rotated is copied by the library."""
    out, windows = qkv.new_empty(qkv.shape), Windows(*windows)
    given, made = qkv[:, :, :, :parts], out[:, :, :, :parts]
    path.rotate(given, made, cos, sin, windows, halves, inverse)
    if parts < qkv.shape[3]:
        out[:, :, :, parts:].copy_(qkv[:, :, :, parts:])
    return out


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    window: int | tuple[int, int] | None = None,
    pairs: str = "interleaved",
    parts: int = 2,
    backend: str = "auto",
) -> Tensor:
    """Rotary position embedding of q and k in packed qkv (Su et al. 2021), as in SAM 3.

    qkv: (B, H, W, 3 · D), any strides, D = heads · head_dim with an even head_dim
    cos, sin: (height · width, head_dim / 2), any strides, float32 (float64 for float64 qkv), of the
        window's positions; ``axial_tables`` makes them, ``tables_of`` takes a model's own
    out: (B, H, W, 3 · D), dense: each pair (a, b) of the first ``parts`` thirds is
        (a cos − b sin, b cos + a sin), the rest is copied

    window: side, or (height, width), in which positions are counted; None is the whole map. Images
        that windows do not divide need no padding here.
    pairs: "interleaved": features 2 i and 2 i + 1 (SAM 3, EVA); "halves": features i and
        i + head_dim / 2 of a head (DINOv3)
    parts: 1 rotates q, 2 q and k, 3 all

    The result has qkv's dtype, also under autocast. Arithmetic is float32 (float64 for float64),
    rounded once. Differentiable in qkv; saves only the tables, 8 bytes for each position and pair.
    Raises ValueError when shapes, dtypes or devices do not fit or a table requires a gradient, and
    RuntimeError when a backend asked for by name cannot run.

    >>> import torch
    >>> from samfast.functional import axial_tables, rope
    >>> cos, sin = axial_tables(24, 24, 64)
    >>> rope(torch.randn(1, 48, 48, 3 * 128), cos, sin, heads=2, window=24).shape
    torch.Size([1, 48, 48, 384])
    """
    parts_of = _unpacked(qkv, heads)
    windows = Windows(*qkv.shape[:3], *_sides(window, qkv))
    check_dtypes({"qkv": qkv})
    if pairs not in PAIRS:
        raise ValueError(f"pairs is {pairs!r}; it must be one of {', '.join(PAIRS)}")
    if type(parts) is not int or parts not in (1, 2, 3):
        raise ValueError(f"parts is {parts!r}; it must be 1 (q), 2 (q and k) or 3")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad:
            raise ValueError(f"{name} requires a gradient, but rope has none; pass {name}.detach()")
    engine.check(parts_of, cos, sin, windows)
    asked, halves = backends.requested(backend), pairs == "halves"
    if asked == "reference":
        with without_autocast(qkv.device.type):
            return reference.rope(parts_of, cos, sin, windows, parts, halves).flatten(3)
    out = torch.ops.samfast.rope(parts_of, cos, sin, list(windows), parts, halves, asked)
    return out.flatten(3)


def _unpacked(qkv: Tensor, heads: int) -> Tensor:
    """qkv as (B, H, W, 3, heads, head_dim)."""
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads is {heads!r}; it must be a whole number of at least 1")
    if qkv.dim() != 4 or qkv.shape[3] % (6 * heads) or 0 in qkv.shape[1:]:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, but {heads} heads need (B, H, W, 3 · D) with D a "
            f"multiple of {2 * heads} and no side of 0"
        )
    return qkv.unflatten(3, (3, heads, -1))


def _sides(window, qkv: Tensor) -> tuple[int, int]:
    if window is None:
        return qkv.shape[1], qkv.shape[2]
    size = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    whole = (isinstance(side, (int, torch.SymInt)) and type(side) is not bool for side in size)
    if not all(whole) or len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"window is {window!r}; it must be None, a side or (height, width), whole numbers "
            "of at least 1"
        )
    return size
