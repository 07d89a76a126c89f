# SPDX-License-Identifier: Apache-2.0
"""Relative-position attention: backend choice, operator schemas, autograd, public functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.autocast import autocast_input, without_autocast
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.once import once_differentiable
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import reference, torch_path

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_DIMS = range(16, 129, 16)  # of the compiled backends


def supports(backend: str, q: Tensor, windows: Windows) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not.

    q: (batch, H, W, heads, head_dim)
    """
    if backend in ("reference", "torch"):
        return None
    if backend == "cuda":
        return "it has no CUDA source of its own; triton runs it on a GPU"
    if q.shape[4] not in HEAD_DIMS:
        return f"head_dim {q.shape[4]} is not a multiple of 16 up to {HEAD_DIMS[-1]}"
    if backend == "cpu":
        return backends.cpu_missing(q.device, q.dtype, "relpos_attention_forward")
    if (missing := backends.triton_missing(q.device)) is not None:
        return missing
    if q.dtype == torch.float64:
        return "q is torch.float64, but the kernels take float32, float16 and bfloat16"
    from samfast.kernels.relpos_attention import triton_kernels

    return triton_kernels.missing(q, windows)


def _path(backend, q, windows):
    name = backends.resolve(
        "relpos_attention", backend, q.device, lambda b: supports(b, q, windows)
    )
    if name == "reference":
        raise RuntimeError("backend 'reference' is plain autograd; call relpos_attention for it")
    if name == "cpu":
        from samfast.kernels.relpos_attention import cpu_path

        return cpu_path
    if name == "triton":
        from samfast.kernels.relpos_attention import triton_kernels

        return triton_kernels
    return torch_path


# ``apart`` takes q, k and v as three tensors, ``packed`` as one; both see (batch, H, W, …, heads,
# head_dim) with any strides. The padding of ``packed`` is made from its three sources at each call.
_OPTIONS = "SymInt[] windows, float scale, str backend"
_TABLES = "Tensor table_h, Tensor table_w"
_APART = f"Tensor q, Tensor k, Tensor v, {_TABLES}, {_OPTIONS}"
_PACKED = f"Tensor qkv, Tensor? pad_bias, Tensor? pad_h, Tensor? pad_b, {_TABLES}, {_OPTIONS}"
_KINDS = (("relpos_attention", _APART), ("window_relpos_attention", _PACKED))
for _name, _inputs in _KINDS:
    torch.library.define(f"samfast::{_name}", f"({_inputs}) -> Tensor")
    torch.library.define(f"samfast::{_name}_forward", f"({_inputs}) -> (Tensor, Tensor)")
    torch.library.define(
        f"samfast::{_name}_backward",
        f"(Tensor dout, Tensor out, Tensor lse, {_inputs}, bool[] needs) -> Tensor[]",
    )


def _out_and_lse(q, windows):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[0], q.shape[3], q.shape[1] * q.shape[2], dtype=dtype)
    return q.new_empty(q.shape), lse


@implement("samfast::relpos_attention_forward")
def _apart_forward(q, k, v, table_h, table_w, windows, scale, backend):
    windows = Windows(*windows)
    with without_autocast(q.device.type):
        return _path(backend, q, windows).forward(
            q, k, v, None, None, table_h, table_w, windows, scale
        )


@torch.library.register_fake("samfast::relpos_attention_forward")
def _apart_forward_fake(q, k, v, table_h, table_w, windows, scale, backend):
    return _out_and_lse(q, windows)


@implement("samfast::relpos_attention_backward")
def _apart_backward(
    dout, out, lse, q, k, v, table_h, table_w, windows, scale, backend, needs
):  # fmt: skip
    windows = Windows(*windows)
    grads = [q.new_empty(q.shape) for _ in range(3)]
    with without_autocast(q.device.type):
        tables = _path(backend, q, windows).backward(
            dout, q, k, v, None, None, table_h, table_w, out, lse, windows, scale, *grads, None,
            None, needs[3] or needs[4],
        )  # fmt: skip
    return grads + _table_grads(tables, table_h, table_w)


@torch.library.register_fake("samfast::relpos_attention_backward")
def _apart_backward_fake(
    dout, out, lse, q, k, v, table_h, table_w, windows, scale, backend, needs
):  # fmt: skip
    tables = (table_h, table_w) if needs[3] or needs[4] else None
    return [q.new_empty(q.shape) for _ in range(3)] + _table_grads(tables, table_h, table_w)


def _table_grads(grads, table_h, table_w):
    if grads is None:
        return []
    made = zip(grads, (table_h, table_w), strict=True)
    return [torch.empty_like(t).copy_(g) for g, t in made]


def _dense(t, dtype):
    """Libraries round a product by another route where a factor lies otherwise in memory."""
    return t.to(dtype).contiguous()


def _padding(pad_bias, pad_h, pad_b, windows, qkv):
    """The padding's k and v, (batch, pads, heads, head_dim); None where there is none to see.

    The rows of pad_h differ, so they are multiplied out; a bias alone is one row, seen everywhere.
    """
    heads, head_dim = qkv.shape[4:]
    if windows.pads == 0 or (pad_bias is None and pad_h is None):
        return None, None
    width = heads * head_dim
    kv = None if pad_bias is None else pad_bias[width:].to(qkv.dtype)
    if pad_h is not None:
        factor = _dense(pad_b[width:], qkv.dtype).T
        rows = _dense(pad_h, qkv.dtype)
        kv = rows @ factor if kv is None else torch.addmm(kv, rows, factor)
        kv = kv.view(windows.batch, windows.pads, 2, heads, head_dim)
    else:
        kv = kv.view(2, heads, head_dim).expand(windows.batch, windows.pads, -1, -1, -1)
    return kv[:, :, 0], kv[:, :, 1]


@implement("samfast::window_relpos_attention_forward")
def _packed_forward(qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, scale, backend):
    windows = Windows(*windows)
    q, k, v = qkv.unbind(3)
    with without_autocast(qkv.device.type):
        pads = _padding(pad_bias, pad_h, pad_b, windows, qkv)
        return _path(backend, q, windows).forward(q, k, v, *pads, table_h, table_w, windows, scale)


@torch.library.register_fake("samfast::window_relpos_attention_forward")
def _packed_forward_fake(qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, *rest):
    return _out_and_lse(qkv[:, :, :, 0], windows)


@implement("samfast::window_relpos_attention_backward")
def _packed_backward(
    dout, out, lse, qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, scale, backend, needs
):  # fmt: skip
    windows = Windows(*windows)
    _, need_bias, need_h, need_b, *need_tables = needs
    dqkv = qkv.new_empty(qkv.shape)
    need_pads = windows.pads > 0 and (need_bias or need_h or need_b)
    dpads = qkv.new_empty(windows.batch, windows.pads, *qkv.shape[3:]) if need_pads else None
    with without_autocast(qkv.device.type):
        pads = _padding(pad_bias, pad_h, pad_b, windows, qkv)
        tables = _path(backend, qkv[:, :, :, 0], windows).backward(
            dout, *qkv.unbind(3), *pads, table_h, table_w, out, lse, windows, scale,
            *dqkv.unbind(3), *((None, None) if dpads is None else dpads.unbind(2)[1:]),
            any(need_tables),
        )  # fmt: skip
        grads = [dqkv, *_padding_grads(dpads, pad_bias, pad_h, pad_b, windows, needs[1:4])]
    return grads + _table_grads(tables, table_h, table_w)


def _padding_grads(dpads, pad_bias, pad_h, pad_b, windows, needs):
    """Gradients of pad_bias, pad_h and pad_b, those that are needed; the queries' third is 0."""
    sources = (pad_bias, pad_h, pad_b)
    if dpads is None:
        return [torch.zeros_like(t) for t, need in zip(sources, needs, strict=True) if need]
    rows = dpads.flatten(0, 1).flatten(1)  # (batch · pads, 3 · D)
    width = rows.shape[1] // 3
    rows = rows[:, width:]
    grads = []
    if needs[0]:
        total = rows.sum(0, dtype=torch.promote_types(rows.dtype, pad_bias.dtype))
        grads.append(torch.cat([total.new_zeros(width), total]).to(pad_bias.dtype))
    if needs[1]:
        grads.append((rows @ _dense(pad_b[width:], rows.dtype)).to(pad_h.dtype))
    if needs[2]:
        update = (rows.T @ _dense(pad_h, rows.dtype)).to(pad_b.dtype)
        grads.append(torch.cat([update.new_zeros(width, update.shape[1]), update]))
    return grads


@torch.library.register_fake("samfast::window_relpos_attention_backward")
def _packed_backward_fake(
    dout, out, lse, qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, scale, backend, needs
):  # fmt: skip
    sources = zip((pad_bias, pad_h, pad_b), needs[1:4], strict=True)
    grads = [qkv.new_empty(qkv.shape)] + [t.new_empty(t.shape) for t, need in sources if need]
    tables = (table_h, table_w) if needs[4] or needs[5] else None
    return grads + _table_grads(tables, table_h, table_w)


class ApartFunction(torch.autograd.Function):
    """Saves q, k, v, out and one number per query."""

    @staticmethod
    def forward(ctx, q, k, v, table_h, table_w, options):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            out, lse = torch.ops.samfast.relpos_attention_forward(
                q, k, v, table_h, table_w, *options
            )
        ctx.save_for_backward(out, lse, q, k, v, table_h, table_w)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        needs = ctx.needs_input_grad[:5]
        saved = ctx.saved_tensors  # which a checkpoint makes again, with autograd
        with torch._C._AutoDispatchBelowADInplaceOrView():
            made = torch.ops.samfast.relpos_attention_backward(dout, *saved, *ctx.options, needs)
        grads = (*made, None, None)[:5]
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


class PackedFunction(torch.autograd.Function):
    """Saves qkv, out, one number per query and the sources of the padding."""

    @staticmethod
    def forward(ctx, qkv, pad_bias, pad_h, pad_b, table_h, table_w, options):
        inputs = (qkv, pad_bias, pad_h, pad_b, table_h, table_w)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            out, lse = torch.ops.samfast.window_relpos_attention_forward(*inputs, *options)
        ctx.save_for_backward(out, lse, *inputs)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        needs = ctx.needs_input_grad[:6]
        saved = ctx.saved_tensors  # which a checkpoint makes again, with autograd
        with torch._C._AutoDispatchBelowADInplaceOrView():
            made = torch.ops.samfast.window_relpos_attention_backward(
                dout, *saved, *ctx.options, needs
            )
        given = iter(made)
        dqkv = next(given)
        pads = [next(given) if need else None for need in needs[1:4]]
        tables = [next(given), next(given)] if needs[4] or needs[5] else [None, None]
        grads = (dqkv, *pads, *tables)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


@implement("samfast::relpos_attention")
def _apart_impl(*args):
    return torch.ops.samfast.relpos_attention_forward(*args)[0]


@torch.library.register_fake("samfast::relpos_attention")
def _apart_fake(*args):
    return _apart_forward_fake(*args)[0]


@torch.library.impl("samfast::relpos_attention", "Autograd")
def _apart_autograd(q, k, v, table_h, table_w, windows, scale, backend):
    return ApartFunction.apply(q, k, v, table_h, table_w, (windows, scale, backend))


@implement("samfast::window_relpos_attention")
def _packed_impl(*args):
    return torch.ops.samfast.window_relpos_attention_forward(*args)[0]


@torch.library.register_fake("samfast::window_relpos_attention")
def _packed_fake(*args):
    return _packed_forward_fake(*args)[0]


@torch.library.impl("samfast::window_relpos_attention", "Autograd")
def _packed_autograd(qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, scale, backend):
    return PackedFunction.apply(
        qkv, pad_bias, pad_h, pad_b, table_h, table_w, (windows, scale, backend)
    )


def fit_table(table: Tensor, size: int) -> Tensor:
    """A table (any length, head_dim) interpolated to (2 · size − 1, head_dim), as torch does.

    A product with a small matrix: the gradient of ``interpolate`` is added up by atomics on a GPU.
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

    scale: head_dim ** -0.5 where None; the bias takes the unscaled q.
    The result has q's dtype (the autocast dtype where autocast is on) and lies as (B, H, W, heads,
    head_dim); sums are float32 (float64 for float64). On ``cpu`` and ``triton`` no H·W × H·W
    tensor exists, on ``torch`` blocks of it do.
    Saves q, k, v, out and one number per query and head.
    Raises ValueError when shapes or dtypes do not fit, RuntimeError when a backend asked for by
    name cannot run.
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

    An image whose sides are no multiples of the window is padded at the bottom and right. Pads are
    keys and values, never queries. Their row of qkv is pad_bias + pad_h @ pad_bᵀ:
    pad_bias: (3 · D,), the bias of the layer that made qkv; zeros where None
    pad_h: (B · pads, r), rows of the padding, image by image, line by line   pad_b: (3 · D, r)

    Differentiable in qkv, the tables and pad_*. Dtypes, precision and errors as in
    ``relpos_attention``. Saves qkv, out, one number per query and head, and pad_*.
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
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, a map without tokens")
    size = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    whole = (isinstance(side, (int, torch.SymInt)) and type(side) is not bool for side in size)
    if not all(whole) or len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"window is {window!r}, but must be a side or (height, width), whole numbers of at "
            "least 1"
        )
    windows = Windows(batch, height, width, *size)
    named = {"qkv": qkv, "rel_pos_h": rel_pos_h, "rel_pos_w": rel_pos_w}
    named |= {"pad_bias": pad_bias, "pad_h": pad_h, "pad_b": pad_b}
    _check(named, size, columns // 3 // num_heads, qkv.dtype)
    _check_padding(pad_bias, pad_h, pad_b, windows, columns)
    qkv = autocast_input(qkv)
    scale = (columns // 3 // num_heads) ** -0.5 if scale is None else float(scale)
    tables = fit_table(rel_pos_h, size[0]), fit_table(rel_pos_w, size[1])
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


def _check(named: dict[str, Tensor | None], size, head_dim: int, dtype: torch.dtype) -> None:
    first, x = next(iter(named.items()))
    if min(size) < 1 or head_dim < 1:
        raise ValueError(f"{first} has shape {tuple(x.shape)}, a map without tokens")
    for name, t in named.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} but {first} is on {x.device}")
        if t.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {t.dtype}, but must be float16, bfloat16, float32 or float64"
            )
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
        raise ValueError(f"{given} is given without {lacking}")
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
