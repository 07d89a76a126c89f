# SPDX-License-Identifier: Apache-2.0
"""Attention within windows, without a bias: backend choice, schema, autograd, public function."""

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.autocast import autocast_input, without_autocast
from samfast.kernels._common.operator import Operator
from samfast.kernels._common.table import Table
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention.op import HEAD_DIMS, out_and_lse, packed
from samfast.kernels.rope.engine import pad_rows
from samfast.kernels.rope.op import rope
from samfast.kernels.rope.tables import PAIRS
from samfast.kernels.window_attention import flash, reference
from samfast.kernels.window_attention.padding import rotated_padding, rotated_padding_grads

TABLE = Table(
    "window_attention",
    __package__,
    absent={"cuda": "it has no CUDA source of its own; triton runs it on a GPU"},
    native="window_attention_forward",
    paths={"triton": "gpu_path"},
)


def supports(backend: str, q: Tensor, windows: Windows) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not.

    q: (batch, H, W, heads, head_dim)
    """
    missing = TABLE.missing(backend, q.device, q=q.dtype)
    if missing is not None or backend not in ("cpu", "triton"):
        return missing
    if backend == "triton" and flash.takes(q, windows):
        return None
    if q.shape[4] not in HEAD_DIMS:
        return f"head_dim {q.shape[4]} is not a multiple of 16 up to {HEAD_DIMS[-1]}"
    if backend == "cpu":
        return None
    from samfast.kernels.relpos_attention import triton_kernels

    return triton_kernels.missing(q, windows, tables=False)


class WindowAttention(Operator):
    """Saves qkv (batch, H, W, 3, heads, head_dim), out, one number per query and the sources of
    the padding, which is made from them at each call.

    pad_cos, pad_sin: (pads, head_dim / 2), by which the padding's keys are rotated where given
    halves: pairs are i and i + head_dim / 2, else 2i and 2i + 1
    """

    name = "window_attention"
    inputs = (
        "Tensor qkv, Tensor? pad_bias, Tensor? pad_h, Tensor? pad_b, Tensor? pad_cos, "
        "Tensor? pad_sin, bool halves, SymInt[] windows, float scale, str backend"
    )
    makes = "Tensor out, Tensor lse"
    returns = "out"
    backward_inputs = f"Tensor dout, Tensor out, Tensor lse, {inputs}, bool[] needs"
    gradients = "qkv pad_bias pad_h pad_b"

    @staticmethod
    def path(backend, qkv, windows, **_):
        q, windows = qkv[:, :, :, 0], Windows(*windows)
        return TABLE.path(backend, q.device, lambda b: supports(b, q, windows))

    @staticmethod
    def forward(
        path, qkv, pad_bias, pad_h, pad_b, pad_cos, pad_sin, halves, windows, scale
    ):  # fmt: skip
        windows, sources = Windows(*windows), (pad_bias, pad_h, pad_b)
        pads = rotated_padding(sources, (pad_cos, pad_sin), halves, windows, qkv)
        return path.forward(*qkv.unbind(3), *pads, windows, scale)

    @staticmethod
    def backward(
        path, dout, out, lse, qkv, pad_bias, pad_h, pad_b, pad_cos, pad_sin, halves, windows,
        scale, needs,
    ):  # fmt: skip
        windows, sources, turn = Windows(*windows), (pad_bias, pad_h, pad_b), (pad_cos, pad_sin)
        dqkv = qkv.new_empty(qkv.shape)
        need_pads = windows.pads > 0 and any(needs[1:])
        dpads = qkv.new_empty(windows.batch, windows.pads, *qkv.shape[3:]) if need_pads else None
        path.backward(
            dout, *qkv.unbind(3), *rotated_padding(sources, turn, halves, windows, qkv), out, lse,
            windows, scale, *dqkv.unbind(3),
            *((None, None) if dpads is None else dpads.unbind(2)[1:]),
        )  # fmt: skip
        grads = [dqkv, *rotated_padding_grads(dpads, sources, turn, halves, needs[1:])]
        return [g if need else None for g, need in zip(grads, needs, strict=True)]

    @staticmethod
    def fake(qkv, *_):
        return out_and_lse(qkv[:, :, :, 0])


def window_attention(
    qkv: Tensor,
    num_heads: int,
    window: int | tuple[int, int],
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    pairs: str = "interleaved",
    pad_bias: Tensor | None = None,
    pad_h: Tensor | None = None,
    pad_b: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention within windows (Li et al. 2022, ViTDet), on packed qkv in image order.

    qkv: (B, H, W, 3 · D), any strides   window: side, or (height, width); (H, W) is one global map
    out: (B, H, W, D) = softmax(scale · q kᵀ) v, over the keys of a token's window

    cos, sin, pairs: q and k are rotated first, as ``rope`` does in windows of this size

    An image whose sides are not multiples of the window is padded at the bottom and right. Padding
    tokens are keys and values, never queries. Their row of qkv is pad_bias + pad_h @ pad_bᵀ, whose
    key is rotated by its own place in the window:
    pad_bias: (3 · D,), the bias of the layer that made qkv; zeros if None
    pad_h: (B · pads, r), rows of the padding, image by image, line by line   pad_b: (3 · D, r)

    scale: head_dim ** -0.5 if None
    Differentiable in qkv and pad_*. The result has qkv's dtype (the autocast dtype if autocast is
    on). Sums are float32 (float64 for float64). Attention logits are never all in memory: on a GPU
    ``torch`` materialises them block by block in windows.
    Saves qkv, out, one number per query and head, and pad_*: 25.4 MB for ViT-B's 64×64 tokens in
    bfloat16.
    A global map in 16 bits on a GPU runs torch's flash attention. Bits of its gradients repeat
    only under ``torch.use_deterministic_algorithms(True)``.
    Raises ValueError when shapes or dtypes do not fit, and RuntimeError when a backend asked for by
    name cannot run.

    >>> import torch
    >>> from samfast.functional import window_attention
    >>> qkv = torch.randn(2, 64, 64, 3 * 768)
    >>> window_attention(qkv, 12, 14).shape
    torch.Size([2, 64, 64, 768])
    """
    named = {"pad_bias": pad_bias, "pad_h": pad_h, "pad_b": pad_b}
    windows, head_dim = packed(qkv, num_heads, window, named)
    turn, halves = None, pairs == "halves"
    if pairs not in PAIRS:
        raise ValueError(f"pairs is {pairs!r}; it must be one of {', '.join(PAIRS)}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{'sin' if sin is None else 'cos'} is missing; rope needs both tables")
    if cos is not None:
        qkv = rope(qkv, cos, sin, heads=num_heads, window=window, pairs=pairs, backend=backend)
        turn = [pad_rows(table, windows) for table in (cos, sin)] if windows.pads else None
    qkv = autocast_input(qkv)
    scale = head_dim**-0.5 if scale is None else float(scale)
    name = backends.requested(backend)
    parts = qkv.unflatten(3, (3, num_heads, head_dim))
    if name == "reference":
        with without_autocast(qkv.device.type):
            rows = reference.padding_rows(pad_bias, pad_h, pad_b, turn, halves, windows, parts)
            return reference.window_attention(parts, rows, windows, scale).flatten(3)
    out = torch.ops.samfast.window_attention(
        parts, pad_bias, pad_h, pad_b, *(turn or (None, None)), halves, list(windows), scale, name
    )
    return out.flatten(3)
