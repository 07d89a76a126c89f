# SPDX-License-Identifier: Apache-2.0
"""Relative-position attention in Triton; see torch_path for what forward and backward compute.

The forward is one launch and the backward two. float32 takes one more, and gradients of the tables
two more. Windows larger than 16 by 16 take one more each way, for the factors of the bias. Without
tables (None) there is no bias, and it takes no memory. One program makes each sum in one order, or
it is made of partials in a fixed order: no atomics, the same bits every time.
"""

import contextlib

import torch
import triton

from samfast.kernels.relpos_attention.tiling import (
    SMALL,
    blocks,
    factor_terms,
    one_hot,
    pitch,
    power_of_two,
    split,
)
from samfast.kernels.relpos_attention.triton_backward import dkv_kernel, dq_kernel
from samfast.kernels.relpos_attention.triton_forward import (
    forward_kernel,
    prepare_kernel,
)
from samfast.kernels.relpos_attention.triton_places import (
    GIVEN_PADS,
    NO_PADS,
    ZERO_PADS,
)
from samfast.kernels.relpos_attention.triton_tables import reduce_kernel, tables_kernel

MOST = 2**31 - 1  # programs of a grid; what the kernels count in int32
FLOAT32_HEAD = 64  # float32 products are made without tensor cores; wider heads spill
WARP = 32  # threads
LEAST = 16  # keys of a tile, at least
MAX_CHUNKS = 64  # partials of the gradients of the tables
TABLE_BLOCK = {2: 32, 4: 16}  # rows of a table at a time in the epilogue of dq, by bytes


def missing(q, windows, tables=True) -> str | None:
    """None when the kernels take this call, or the sentence that says why not.

    tables: whether there is a bias
    """
    if q.dtype == torch.float32 and q.shape[4] > FLOAT32_HEAD:
        return f"q is torch.float32 with head_dim {q.shape[4]}, above {FLOAT32_HEAD}"
    heads, tokens = q.shape[3], windows.image_height * windows.image_width
    programs = heads * windows.samples * windows.height * triton.cdiv(windows.width, LEAST)
    if programs > MOST:
        return f"{programs} programs are more than one grid holds"
    if tables and (short := _tables_missing(q, windows, tokens)) is not None:
        return short
    if tokens + windows.pads > MOST:
        return f"{tokens} tokens and {windows.pads} pads of an image are more than int32 can count"
    return None


def _tables_missing(q, windows, tokens) -> str | None:
    if tokens * max(factor_terms(windows)) > MOST:
        return (
            f"{tokens} tokens in windows of {windows.height}×{windows.width} have more factors of "
            "the bias than int32 can count"
        )
    rows = 2 * max(windows.height, windows.width) - 1
    if rows * q.shape[4] > MOST:
        return f"a table of {rows} rows of {q.shape[4]} has more elements than int32 can count"
    return None


def forward(q, k, v, pad_k, pad_v, table_h, table_w, windows, scale):
    q, k, v = (_dense(t) for t in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], q.shape[3], windows.image_height * windows.image_width,
                      dtype=torch.float32)  # fmt: skip
    if windows.samples == 0:
        return out, lse
    pads = _padding(windows, pad_k, pad_v)
    with _on(q):
        tables = [t if t is None else t.contiguous() for t in (table_h, table_w)]
        factors = None, None, 0
        if table_h is not None and not one_hot(windows):
            factors = _prepare(q, *tables, windows)
        _attend(q, k, v, *pads, *tables, *factors, out, lse, None, None, None, windows, scale)
    return out, lse


def backward(
    dout, q, k, v, pad_k, pad_v, table_h, table_w, out, lse, windows, scale, dq, dk, dv, dpad_k,
    dpad_v, need_tables,
):  # fmt: skip
    rows_h, rows_w = 2 * windows.height - 1, 2 * windows.width - 1
    tables = table_h is not None
    if windows.samples == 0:
        return _split_tables(q.new_zeros(rows_h + rows_w, q.shape[4]), rows_h, need_tables)
    if windows.height == windows.width == 1:  # all weight on one key, whatever its logit
        dq.zero_(), dk.zero_(), dv.copy_(dout)
        return _split_tables(q.new_zeros(rows_h + rows_w, q.shape[4]), rows_h, need_tables)
    dout, q, k, v, out = (_dense(t) for t in (dout, q, k, v, out.contiguous()))
    lse = lse.contiguous()
    pads, pad_k, pad_v = _padding(windows, pad_k, pad_v)
    given = [dq, dk, dv, dpad_k, dpad_v]
    dq, dk, dv, dpad_k, dpad_v = made = [_writable(t) for t in given]
    delta = torch.empty_like(lse)
    groups, sizes = _groups(q, windows), _sizes(q, windows)
    with _on(q):
        exact = q.dtype == torch.float32
        table_h, table_w = (t if t is None else t.contiguous() for t in (table_h, table_w))
        rel_h, rel_w, terms = None, None, 0
        if tables and not one_hot(windows):
            rel_h, rel_w, terms = _prepare(q, table_h, table_w, windows, lse)
        share = torch.empty_like(delta) if exact else None
        if exact:
            _attend(
                q, k, v, pads, pad_k, pad_v, table_h, table_w, rel_h, rel_w, terms, None, lse, dout,
                delta, share, windows, scale,
            )  # fmt: skip
        if tables and one_hot(windows):
            rel_h, terms = _small_factors(q, windows)
        block = blocks("dq", q, windows, tables)
        options = _options(q, windows, pads, block, tables)
        tiles = _query_tiles(windows, block, options["PITCH"] > 0)
        several = rel_w is not None and windows.width > block["BLOCK_N"]
        drel_h = drel_w = None
        if rel_w is not None or need_tables:
            drel_h = torch.empty_like(rel_h, dtype=torch.float32 if several else q.dtype)
            drel_w = _like(rel_w)
        dq_kernel[(tiles * groups,)](
            dout, None if exact else out, q, k, v, pad_k, pad_v, table_h, table_w,
            rel_h, rel_w, lse, delta, share, drel_h, drel_w, dq, *_strides(dout, q, k, v),
            *_pad_strides(pad_k, pad_v), *_strides(dq), *sizes, tiles, terms, scale,
            FLAT=_flat(windows, tables, (q, dout), (k, v)),
            WIDE=_wide(dout, q, k, v, pad_k, pad_v, dq), SEVERAL=several,
            BLOCK_T=_table_block(q, windows), **options, **block,
        )  # fmt: skip

        block = blocks("dkv", q, windows, tables)
        options = _options(q, windows, pads, block, tables)
        tiles = _key_tiles(windows, options, block["BLOCK_N"])
        dkv_kernel[(tiles * groups,)](
            dout, q, k, v, pad_k, pad_v, rel_h, rel_w, lse, delta, share, dk, dv, dpad_k, dpad_v,
            *_strides(dout, q, k, v), *_pad_strides(pad_k, pad_v), *_strides(dk, dv),
            *_pad_strides(dpad_k, dpad_v), *sizes, tiles, terms, scale,
            NEED_K=NO_PADS.value if dpad_k is None else GIVEN_PADS.value,
            NEED_V=NO_PADS.value if dpad_v is None else GIVEN_PADS.value,
            PAIR=2 * block["BLOCK_M"] >= WARP * block["num_warps"],
            FLAT=_flat(windows, tables, (q, dout), (k, v, dk, dv)),
            WIDE=_wide(dout, q, k, v, pad_k, pad_v, dk, dv, dpad_k, dpad_v), **options, **block,
        )  # fmt: skip
        for wanted, tensor in zip(given, made, strict=True):
            if wanted is not tensor:
                wanted.copy_(tensor)
        if not need_tables:
            return None
        return _table_grads(q, drel_h, drel_w, windows, terms)


def _prepare(q, table_h, table_w, windows, lse=None):
    """The factors by rows, and the elements of a line of rel_w.

    lse: for the backward, whose rel_h is float32 and less lse
    """
    batch, height, width, heads, _ = q.shape
    of_h, terms = factor_terms(windows)
    kind = q.dtype if lse is None else torch.float32
    rel_h = q.new_empty(batch, heads, of_h, height * width, dtype=kind)
    rel_w = q.new_empty(batch, heads, height * width, terms)
    block = blocks("prepare", q, windows)
    block["BLOCK_T"] = min(block.pop("BLOCK_N"), _table_block(q, windows))
    tiles = _query_tiles(windows, block)
    prepare_kernel[(tiles * _groups(q, windows),)](
        q, table_h, table_w, rel_h, rel_w, lse, *_strides(q), *_sizes(q, windows), tiles, terms,
        WIDE=_wide(q), FULL=_full(windows, block), NATURAL=q.dtype == torch.float32,
        PRECISION=_precision(q), **_heads(q), **block,
    )  # fmt: skip
    return rel_h, rel_w, terms


def _small_factors(q, windows):
    """Where dq puts the factors of small windows, and the elements of a token."""
    batch, height, width, heads, _ = q.shape
    terms, _ = factor_terms(windows)
    return q.new_empty(batch, heads, height * width, terms), terms


def _attend(
    q, k, v, pads, pad_k, pad_v, table_h, table_w, rel_h, rel_w, terms, out, lse, dout, delta,
    share, windows, scale,
):  # fmt: skip
    """out and lse, or with dout delta and share from lse."""
    tables = table_h is not None
    block = blocks("forward", q, windows, tables)
    lines = block.pop("LINES", 1)
    block["LINES"] = lines if dout is None and windows.height % lines == 0 else 1
    options = _options(q, windows, pads, block, tables)
    tiles = _query_tiles(windows, block, options["PITCH"] > 0)
    forward_kernel[(tiles * _groups(q, windows),)](
        q, k, v, pad_k, pad_v, table_h, table_w, rel_h, rel_w, out, lse, dout, delta, share,
        *_strides(q, k, v), *_pad_strides(pad_k, pad_v),
        *((0,) * 4 if dout is None else _strides(dout)), *_sizes(q, windows), tiles, terms, scale,
        FLAT=_flat(windows, tables, (q, dout), (k, v)),
        WIDE=_wide(q, k, v, out, dout, pad_k, pad_v), **options, **block,
    )  # fmt: skip


def _table_grads(q, drel_h, drel_w, windows, terms):
    block = blocks("tables", q, windows)
    rows_h, rows_w = 2 * windows.height - 1, 2 * windows.width - 1
    longest = power_of_two(max(rows_h, rows_w))
    block["BLOCK_T"] = min(block.pop("BLOCK_N"), longest)
    row_blocks = triton.cdiv(rows_h, block["BLOCK_T"]) + triton.cdiv(rows_w, block["BLOCK_T"])
    tiles = _query_tiles(windows, block)
    every = tiles * _groups(q, windows)
    chunk = triton.cdiv(every, MAX_CHUNKS)
    chunks = triton.cdiv(every, chunk)
    part = q.new_empty(chunks, rows_h + rows_w, q.shape[4], dtype=torch.float32)
    grads = torch.empty_like(part[0])
    tables_kernel[(chunks * row_blocks,)](
        q, drel_h, drel_w, part, *_strides(q), *_sizes(q, windows), tiles, terms, every, chunk,
        ONE_HOT=drel_w is None, WIDE=_wide(q), FULL=_full(windows, block),
         PRECISION=_precision(q), **_heads(q), **block,
    )  # fmt: skip
    reduce_kernel[(triton.cdiv(grads.numel(), 256),)](
        part, grads, grads.numel(), chunks, BLOCK=256, num_warps=4, num_stages=1
    )
    # Over one line or column a factor is one number for each query, which moves no weight.
    if windows.height == 1:
        grads[:rows_h] = 0.0
    if windows.width == 1:
        grads[rows_h:] = 0.0
    return _split_tables(grads, rows_h, True)


def _split_tables(grads, rows_h, need_tables):
    return (grads[:rows_h].float(), grads[rows_h:].float()) if need_tables else None


def _options(q, windows, pads, block, tables):
    """Constants of the three large kernels; makes BLOCK_N no wider than a line where it is one."""
    small = tables and one_hot(windows)
    through = small or not tables  # keys of a tile run through the window
    taken = pitch(windows.width) if small else 0
    if not through:
        block["BLOCK_N"] = min(block["BLOCK_N"], power_of_two(windows.width))
    keys = windows.height * (taken or windows.width) if through else windows.width
    even, dense = keys % block["BLOCK_N"] == 0, taken in (0, windows.width)
    return {
        "FULL": _full(windows, block) and dense, "ONE_HOT": through,
        "REL": SMALL if tables else 0, "PADS": pads,
        "EVEN": even and dense and pads != ZERO_PADS.value, "NATURAL": q.dtype == torch.float32,
        "HEIGHT": windows.height if small else 0, "WIDTH": windows.width if small else 0,
        "PITCH": taken, "PRECISION": _precision(q), **_heads(q),
    }  # fmt: skip


def _heads(q):
    first, rest = split(q.shape[4])
    return {"HEAD": q.shape[4], "HEAD_A": first, "HEAD_B": rest}


def _table_block(q, windows):
    longest = power_of_two(2 * max(windows.height, windows.width) - 1)
    return min(TABLE_BLOCK[q.element_size()], longest)


def _padding(windows, pad_k, pad_v):
    """How the padding is seen, and its keys and values."""
    if windows.pads == 0:
        return NO_PADS.value, None, None
    if pad_k is None and pad_v is None:
        return ZERO_PADS.value, None, None
    return GIVEN_PADS.value, *(_dense(t) for t in (pad_k, pad_v))


def _query_tiles(windows, block, small=False):
    """Tiles of queries of the fullest window; small: its lines take their pitch."""
    lines = min(windows.height, windows.image_height)
    columns = min(windows.width, windows.image_width)
    return triton.cdiv(lines * (pitch(columns) if small else columns), block["BLOCK_M"])


def _key_tiles(windows, options, block_n):
    if options["ONE_HOT"]:
        return triton.cdiv(windows.height * (options["PITCH"] or windows.width), block_n)
    return windows.height * triton.cdiv(windows.width, block_n)


def _groups(q, windows):
    return windows.samples * q.shape[3]


def _sizes(q, windows):
    return (
        q.shape[3], windows.height, windows.width, windows.image_height, windows.image_width,
        windows.down, windows.across,
    )  # fmt: skip


def _strides(*tensors):
    return [s for t in tensors for s in t.stride()[:4]]


def _pad_strides(*tensors):
    return [s for t in tensors for s in ((0,) * 3 if t is None else t.stride()[:3])]


def _flat(windows, tables, of_queries, of_keys):
    """Whether windows are whole maps, whose tokens lie as one line in these tensors.

    The bias needs lines and columns of the keys; without it keys are counted as queries are.
    """
    tensors = of_queries if tables else (*of_queries, *of_keys)
    whole = windows.down == windows.across == 1 and windows.pads == 0
    lines = (t.stride(1) == t.shape[2] * t.stride(2) for t in tensors if t is not None)
    return whole and all(lines)


def _full(windows, block):
    """Whether every tile of queries is full."""
    lines, columns = windows.image_height % windows.height, windows.image_width % windows.width
    tokens = windows.height * windows.width
    return lines == columns == 0 and tokens % block["BLOCK_M"] == 0


def _wide(*tensors):
    """Whether an image, or its padding, spans more elements than int32 counts in one of these."""
    return any(_span(t) >= 2**31 for t in tensors if t is not None)


def _span(t):
    return sum(max(n - 1, 0) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True))


def _dense(t):
    """t, or a copy whose elements of a head lie side by side."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _like(t, dtype=None):
    return None if t is None else torch.empty_like(t, dtype=dtype)


def _writable(t):
    return t if t is None or t.stride(-1) == 1 else t.new_empty(t.shape)


def _precision(q):
    """float32 products in TF32 where the user allowed it for matrix products, else exactly."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if q.dtype == torch.float32 and allowed else "ieee"


def _on(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
