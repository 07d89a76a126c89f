# SPDX-License-Identifier: Apache-2.0
"""Attention without a bias from aten calls: torch's flash attention, else block by block.

All paths of this operation have these two functions, which are those of relpos_attention without
tables. Tensors of tokens are views with any strides.

q, k, v, dout (batch, H, W, heads, head_dim)   pad_k, pad_v (batch, pads, heads, head_dim)
"""

import torch
from torch import Tensor

from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import torch_path as blocks
from samfast.kernels.window_attention import flash


def forward(q, k, v, pad_k, pad_v, windows: Windows, scale: float) -> tuple[Tensor, Tensor]:
    """out (batch, H, W, heads, head_dim), dense, and lse (batch, heads, H · W), natural logarithm.

    pad_k and pad_v may be None where the padding holds zeros, and where there is none.
    """
    if flash.takes(q, windows):
        return flash.forward(q, k, v, scale)
    if not _flash_on_cpu(q, windows):
        return blocks.forward(q, k, v, pad_k, pad_v, None, None, windows, scale)
    parts = _cut(windows, q), _cut(windows, k, pad_k), _cut(windows, v, pad_v)
    out, lse = flash.cpu_forward(*parts, scale)
    lse = _paste(windows, lse[..., None])[0]  # (batch, H, W, heads, 1)
    return _paste(windows, out)[0].contiguous(), lse.flatten(3).flatten(1, 2).mT.contiguous()


def backward(
    dout, q, k, v, pad_k, pad_v, out, lse, windows: Windows, scale: float, dq, dk, dv, dpad_k,
    dpad_v,
) -> None:  # fmt: skip
    """Fills dq, dk, dv, as q, and dpad_k and dpad_v, as pad_k, where they are given."""
    if flash.takes(q, windows):
        flash.backward(dout, q, k, v, out, lse, scale, dq, dk, dv)
        return
    if not _flash_on_cpu(q, windows):
        blocks.backward(
            dout, q, k, v, pad_k, pad_v, None, None, out, lse, windows, scale, dq, dk, dv, dpad_k,
            dpad_v, False,
        )  # fmt: skip
        return
    parts = _cut(windows, q), _cut(windows, k, pad_k), _cut(windows, v, pad_v)
    lines = lse.mT.unflatten(1, q.shape[1:3])[..., None]  # (batch, H, W, heads, 1)
    lse = _cut(windows, lines)[..., 0]
    grads = flash.cpu_backward(_cut(windows, dout), *parts, _cut(windows, out), lse, scale)
    for grad, image, pads in zip(grads, (dq, dk, dv), (None, dpad_k, dpad_v), strict=True):
        tokens, beside = _paste(windows, grad)
        image.copy_(tokens)
        if pads is not None:
            pads.copy_(beside)


def _flash_on_cpu(q: Tensor, windows: Windows) -> bool:
    """Whether torch's code for a CPU runs: in float32 and float64, without padding.

    It takes delta from rounded results. Gradients of the padding's sources are sums in which that
    error exceeds the error budget. In 16 bits it fails if torch was told to use fewer instructions
    than the processor has (ATEN_CPU_CAPABILITY).
    """
    wide = q.dtype in (torch.float32, torch.float64)
    return q.device.type == "cpu" and wide and windows.pads == 0


def _cut(windows: Windows, t: Tensor, pad: Tensor | None = None) -> Tensor:
    """(batch, H, W, heads, C) -> (samples, heads, tokens of a window, C); a map without a copy."""
    if flash.is_global(windows):
        # torch's code for a CPU does not look at the last stride.
        return flash.heads_first(t if t.stride(4) == 1 else t.contiguous())
    columns = t.shape[3] * t.shape[4]
    pad = None if pad is None else pad.reshape(windows.batch * windows.pads, columns)
    parts = windows.cut(t.reshape(windows.tokens, columns), pad).flatten(1, 2)
    return parts.unflatten(2, t.shape[3:]).transpose(1, 2)


def _paste(windows: Windows, t: Tensor) -> tuple[Tensor, Tensor | None]:
    """What ``_cut`` makes -> (batch, H, W, heads, C) and (batch, pads, heads, C)."""
    lines = t.transpose(1, 2).unflatten(1, (windows.height, windows.width))
    if flash.is_global(windows):
        return lines, None
    tokens, pads = windows.paste(lines.flatten(3))
    shape = (windows.batch, windows.image_height, windows.image_width, *lines.shape[3:])
    return tokens.view(shape), pads.view(windows.batch, windows.pads, *lines.shape[3:])
