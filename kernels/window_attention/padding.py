# SPDX-License-Identifier: Apache-2.0
"""The padding's keys under a rotary embedding: rotated here, and their gradient rotated back.

Keys of the image arrive rotated. Those of the padding are made from their sources at each call. The
padding is only a few rows, so plain aten calls are enough.
"""

import torch
from torch import Tensor

from samfast.kernels.relpos_attention.padding import padding, padding_grads


def rotated_padding(sources, turn, halves: bool, windows, qkv: Tensor):
    """The padding's k and v, (batch, pads, heads, head_dim); None where there is none to see.

    sources: pad_bias, pad_h, pad_b   turn: cos and sin, (pads, head_dim / 2), or two of None
    """
    k, v = padding(*sources, windows, qkv)
    if k is None or not _turns(turn):
        return k, v
    if k.stride(0) == 0:  # the same in each image
        return _rotated(k[:1], *turn, halves).expand(k.shape), v
    return _rotated(k, *turn, halves), v


def rotated_padding_grads(dpads: Tensor | None, sources, turn, halves: bool, needs):
    """Gradients of the sources, None where not needed.

    dpads: (batch, pads, 3, heads, head_dim), whose keys are rotated back in place
    """
    if dpads is not None and _turns(turn):
        cos, sin = turn
        dk = dpads[:, :, 1]
        dk.copy_(_rotated(dk, cos, -sin, halves))
    return padding_grads(dpads, *sources, needs)


def _turns(turn) -> bool:
    cos, sin = turn
    if (cos is None) != (sin is None):
        given, lacking = ("pad_cos", "pad_sin") if sin is None else ("pad_sin", "pad_cos")
        raise ValueError(f"{given} is given without {lacking}; pass both or neither")
    return cos is not None


def _rotated(t: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """Pairs (a, b) of t become (a cos − b sin, b cos + a sin); in float32, float64 for float64."""
    if cos.shape != sin.shape or tuple(cos.shape) != (t.shape[1], t.shape[3] // 2):
        raise ValueError(
            f"pad_cos has shape {tuple(cos.shape)} and pad_sin {tuple(sin.shape)}, but "
            f"{t.shape[1]} pads of heads of {t.shape[3]} need ({t.shape[1]}, {t.shape[3] // 2})"
        )
    wide = torch.promote_types(t.dtype, torch.float32)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]  # one for all heads
    pairs = t.to(wide).unflatten(3, (2, -1) if halves else (-1, 2))
    a, b = pairs.unbind(3 if halves else 4)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], 3 if halves else 4)
    return turned.flatten(3).to(t.dtype)
