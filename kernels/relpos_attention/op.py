# SPDX-License-Identifier: Apache-2.0
"""Relative-position attention: backend choice, operator schemas, autograd, public functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import check_tensors
from samfast.kernels._common.autocast import autocast_input, without_autocast
from samfast.kernels._common.operator import Operator
from samfast.kernels._common.table import Table
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import reference
from samfast.kernels.relpos_attention.padding import padding, padding_grads

HEAD_DIMS = range(16, 129, 16)  # of the compiled backends
TABLE = Table(
    "relpos_attention",
    __package__,
    absent={"cuda": "it has no CUDA source of its own; triton runs it on a GPU"},
    native="relpos_attention_forward",
)


def supports(backend: str, q: Tensor, windows: Windows) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not.

    q: (batch, H, W, heads, head_dim)
    """
    if backend in ("cpu", "triton") and q.shape[4] not in HEAD_DIMS:
        return f"head_dim {q.shape[4]} is not a multiple of 16 up to {HEAD_DIMS[-1]}"
    missing = TABLE.missing(backend, q.device, q=q.dtype)
    if missing is not None or backend != "triton":
        return missing
    from samfast.kernels.relpos_attention import triton_kernels

    return triton_kernels.missing(q, windows)


def _path(backend: str, q: Tensor, windows: Windows):
    return TABLE.path(backend, q.device, lambda b: supports(b, q, windows))


_TABLES = "Tensor table_h, Tensor table_w"
_OPTIONS = "SymInt[] windows, float scale, str backend"


class RelPosAttention(Operator):
    """Saves q, k, v, out and one number per query; all of (batch, H, W, heads, head_dim)."""

    name = "relpos_attention"
    inputs = f"Tensor q, Tensor k, Tensor v, {_TABLES}, {_OPTIONS}"
    makes = "Tensor out, Tensor lse"
    returns = "out"
    backward_inputs = f"Tensor dout, Tensor out, Tensor lse, {inputs}, bool[] needs"
    gradients = "q k v table_h table_w"

    @staticmethod
    def path(backend, q, windows, **_):
        return _path(backend, q, Windows(*windows))

    @staticmethod
    def forward(path, q, k, v, table_h, table_w, windows, scale):
        return path.forward(q, k, v, None, None, table_h, table_w, Windows(*windows), scale)

    @staticmethod
    def backward(path, dout, out, lse, q, k, v, table_h, table_w, windows, scale, needs):
        grads = [q.new_empty(q.shape) for _ in range(3)]
        tables = path.backward(
            dout, q, k, v, None, None, table_h, table_w, out, lse, Windows(*windows), scale,
            *grads, None, None, any(needs[3:]),
        )  # fmt: skip
        grads += _of_tables(tables, table_h, table_w)
        return [g if need else None for g, need in zip(grads, needs, strict=True)]

    @staticmethod
    def fake(q, *_):
        return out_and_lse(q)


class WindowRelPosAttention(Operator):
    """Saves qkv (batch, H, W, 3, heads, head_dim), out, one number per query and the sources of
    the padding, which is made from them at each call."""

    name = "window_relpos_attention"
    inputs = f"Tensor qkv, Tensor? pad_bias, Tensor? pad_h, Tensor? pad_b, {_TABLES}, {_OPTIONS}"
    makes = "Tensor out, Tensor lse"
    returns = "out"
    backward_inputs = f"Tensor dout, Tensor out, Tensor lse, {inputs}, bool[] needs"
    gradients = "qkv pad_bias pad_h pad_b table_h table_w"

    @staticmethod
    def path(backend, qkv, windows, **_):
        return _path(backend, qkv[:, :, :, 0], Windows(*windows))

    @staticmethod
    def forward(path, qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, scale):
        windows = Windows(*windows)
        pads = padding(pad_bias, pad_h, pad_b, windows, qkv)
        return path.forward(*qkv.unbind(3), *pads, table_h, table_w, windows, scale)

    @staticmethod
    def backward(
        path, dout, out, lse, qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, scale, needs
    ):  # fmt: skip
        windows, sources = Windows(*windows), (pad_bias, pad_h, pad_b)
        dqkv = qkv.new_empty(qkv.shape)
        need_pads = windows.pads > 0 and any(needs[1:4])
        dpads = qkv.new_empty(windows.batch, windows.pads, *qkv.shape[3:]) if need_pads else None
        tables = path.backward(
            dout, *qkv.unbind(3), *padding(*sources, windows, qkv), table_h, table_w, out, lse,
            windows, scale, *dqkv.unbind(3),
            *((None, None) if dpads is None else dpads.unbind(2)[1:]), any(needs[4:]),
        )  # fmt: skip
        grads = [dqkv, *padding_grads(dpads, *sources, needs[1:4])]
        grads += _of_tables(tables, table_h, table_w)
        return [g if need else None for g, need in zip(grads, needs, strict=True)]

    @staticmethod
    def fake(qkv, *_):
        return out_and_lse(qkv[:, :, :, 0])


def out_and_lse(q):
    """Empty, as ``forward`` makes them; q: (batch, H, W, heads, head_dim)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[0], q.shape[3], q.shape[1] * q.shape[2], dtype=dtype)
    return q.new_empty(q.shape), lse


def _of_tables(grads, table_h, table_w):
    """Gradients of the tables in their dtypes; None where none were made."""
    if grads is None:
        return [None, None]
    made = zip(grads, (table_h, table_w), strict=True)
    return [t.new_empty(t.shape).copy_(g) for g, t in made]


def fit_table(table: Tensor, size: int) -> Tensor:
    """A table (any length, head_dim) interpolated to (2 · size − 1, head_dim), as torch does.

    It is a product with a small matrix, because ``interpolate`` sums its gradient with atomics on a
    GPU.
    """
    if table.shape[0] == 2 * size - 1:
        return table
    wide = torch.promote_types(table.dtype, torch.float32)
    eye = torch.eye(table.shape[0], dtype=wide, device=table.device)[:, None]
    matrix = F.interpolate(eye, size=2 * size - 1, mode="linear")[:, 0].T
    with without_autocast(table.device.type):
        return (matrix @ table.to(wide)).to(table.dtype)


def relpos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention with the decomposed relative-position bias of SAM (Li et al. 2022).

    q, k, v: (B, heads, H, W, head_dim), any strides
    rel_pos_h, rel_pos_w: (2 · H − 1, head_dim), (2 · W − 1, head_dim); of another length they are
        interpolated linearly, as SAM does
    out: (B, heads, H, W, head_dim) = softmax(scale · q kᵀ + bias) v over the H · W keys,
        bias[i, j] = q_i · rel_pos_h[h_i − h_j + H − 1] + q_i · rel_pos_w[w_i − w_j + W − 1]

    scale: head_dim ** -0.5 if None; the bias takes the unscaled q.
    The result has q's dtype (the autocast dtype if autocast is on); its memory is ordered (B, H, W,
    heads, head_dim). Sums are float32 (float64 for float64). Only ``torch`` materialises attention
    logits, block by block; ``cpu`` and ``triton`` do not.
    Saves q, k, v, out and one number per query and head.
    Raises ValueError when shapes or dtypes do not fit, and RuntimeError when a backend asked for by
    name cannot run.

        out = relpos_attention(q, k, v, rel_pos_h, rel_pos_w)

    >>> import torch
    >>> from samfast.functional import relpos_attention
    >>> q, k, v = torch.randn(3, 1, 2, 7, 7, 16)
    >>> relpos_attention(q, k, v, torch.zeros(13, 16), torch.zeros(13, 16)).shape
    torch.Size([1, 2, 7, 7, 16])
    """
    if q.dim() != 5 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}, but "
            "must be alike, (B, heads, H, W, head_dim)"
        )
    named = {"q": q, "k": k, "v": v, "rel_pos_h": rel_pos_h, "rel_pos_w": rel_pos_w}
    _check(named, q.shape[2:4], q.shape[4], q.dtype)
    q, k, v = (autocast_input(t) for t in (q, k, v))
    scale = q.shape[4] ** -0.5 if scale is None else float(scale)
    batch, _, height, width, _ = q.shape
    tables = fit_table(rel_pos_h, height), fit_table(rel_pos_w, width)
    name = backends.requested(backend)
    if name == "reference":
        with without_autocast(q.device.type):
            return reference.relpos_attention(q, k, v, *tables, scale)
    windows = Windows.whole(batch, height, width)
    q, k, v = (t.movedim(1, 3) for t in (q, k, v))
    out = torch.ops.samfast.relpos_attention(q, k, v, *tables, list(windows), scale, name)
    return out.movedim(3, 1)


def window_relpos_attention(
    qkv: Tensor,
    num_heads: int,
    window: int | tuple[int, int],
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    *,
    pad_bias: Tensor | None = None,
    pad_h: Tensor | None = None,
    pad_b: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """SAM's attention within windows, on packed qkv in image order.

    qkv: (B, H, W, 3 · D), any strides   window: side, or (height, width); (H, W) is one global map
    rel_pos_h, rel_pos_w: (2 · height − 1, head_dim), (2 · width − 1, head_dim) of the window
    out: (B, H, W, D): each window attends to itself as in ``relpos_attention``

    An image whose sides are not multiples of the window is padded at the bottom and right. Padding
    tokens are keys and values, never queries. Their row of qkv is pad_bias + pad_h @ pad_bᵀ:
    pad_bias: (3 · D,), the bias of the layer that made qkv; zeros if None
    pad_h: (B · pads, r), rows of the padding, image by image, line by line   pad_b: (3 · D, r)

    Differentiable in qkv, the tables and pad_*. Dtypes, precision and errors are those of
    ``relpos_attention``. Saves qkv, out, one number per query and head, and pad_*.

        out = window_relpos_attention(qkv, 12, 14, rel_pos_h, rel_pos_w)  # qkv (1, 64, 64, 2304)

    >>> import torch
    >>> from samfast.functional import window_relpos_attention
    >>> qkv, table = torch.randn(1, 9, 11, 3 * 32), torch.zeros(13, 16)
    >>> window_relpos_attention(qkv, 2, 7, table, table).shape
    torch.Size([1, 9, 11, 32])
    """
    named = {"rel_pos_h": rel_pos_h, "rel_pos_w": rel_pos_w}
    named |= {"pad_bias": pad_bias, "pad_h": pad_h, "pad_b": pad_b}
    windows, head_dim = packed(qkv, num_heads, window, named)
    batch, columns = windows.batch, qkv.shape[3]
    qkv = autocast_input(qkv)
    scale = head_dim**-0.5 if scale is None else float(scale)
    tables = fit_table(rel_pos_h, windows.height), fit_table(rel_pos_w, windows.width)
    name = backends.requested(backend)
    if name == "reference":
        with without_autocast(qkv.device.type):
            pad = qkv.new_zeros(batch * windows.pads, columns)
            pad = pad if pad_bias is None else pad + pad_bias.to(qkv.dtype)
            pad = pad if pad_h is None else pad + pad_h.to(qkv.dtype) @ pad_b.to(qkv.dtype).T
            return reference.window_relpos_attention(qkv, pad, num_heads, windows, *tables, scale)
    parts = qkv.unflatten(3, (3, num_heads, -1))
    out = torch.ops.samfast.window_relpos_attention(
        parts, pad_bias, pad_h, pad_b, *tables, list(windows), scale, name
    )
    return out.flatten(3)


def packed(qkv, num_heads, window, named: dict[str, Tensor | None]) -> tuple[Windows, int]:
    """Windows and head_dim of a call on packed qkv (B, H, W, 3 · D), which is checked.

    named: the other tensors by name, pad_bias, pad_h and pad_b among them
    """
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads is {num_heads!r}; it must be a whole number of at least 1")
    if qkv.dim() != 4 or qkv.shape[3] % (3 * num_heads):
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, but {num_heads} heads need (B, H, W, 3 · D) with D "
            f"a multiple of {num_heads}"
        )
    batch, height, width, columns = qkv.shape
    if height == 0 or width == 0:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, but H and W must be at least 1")
    size, head_dim = _sides(window), columns // 3 // num_heads
    windows = Windows(batch, height, width, *size)
    _check({"qkv": qkv} | named, size, head_dim, qkv.dtype)
    _check_padding(named["pad_bias"], named["pad_h"], named["pad_b"], windows, columns)
    return windows, head_dim


def _sides(window) -> tuple[int, int]:
    size = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    whole = (isinstance(side, (int, torch.SymInt)) and type(side) is not bool for side in size)
    if not all(whole) or len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"window is {window!r}, but must be a side or (height, width), whole numbers of at "
            "least 1"
        )
    return size


def _check(named: dict[str, Tensor | None], size, head_dim: int, dtype: torch.dtype) -> None:
    first, x = next(iter(named.items()))
    if min(size) < 1 or head_dim < 1:
        raise ValueError(f"{first} has shape {tuple(x.shape)}, but no side may be 0")
    for name, t in named.items():
        if t is None:
            continue
        check_tensors({first: x, name: t})
        if name in ("k", "v") and t.dtype != dtype:
            raise ValueError(f"{name} is {t.dtype} but q is {dtype}")
        if name.startswith("rel_pos") and (
            t.dim() != 2 or t.shape[1] != head_dim or t.shape[0] == 0
        ):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, but head_dim {head_dim} needs "
                f"(2 · size − 1, {head_dim})"
            )


def _check_padding(pad_bias, pad_h, pad_b, windows: Windows, columns: int) -> None:
    if pad_bias is not None and tuple(pad_bias.shape) != (columns,):
        raise ValueError(
            f"pad_bias has shape {tuple(pad_bias.shape)} but qkv has {columns} columns"
        )
    if (pad_h is None) != (pad_b is None):
        given, lacking = ("pad_h", "pad_b") if pad_b is None else ("pad_b", "pad_h")
        raise ValueError(f"{given} is given without {lacking}; pass both or neither")
    if pad_h is None:
        return
    rows = windows.batch * windows.pads
    if pad_h.dim() != 2 or pad_h.shape[0] != rows:
        raise ValueError(
            f"pad_h has shape {tuple(pad_h.shape)}, but the padding has {rows} rows in all"
        )
    if tuple(pad_b.shape) != (columns, pad_h.shape[1]):
        raise ValueError(
            f"pad_b has shape {tuple(pad_b.shape)}, but pad_h and qkv need "
            f"({columns}, {pad_h.shape[1]})"
        )
