# SPDX-License-Identifier: Apache-2.0
"""torch's own flash attention, forward and backward, on tokens in their own layout.

On a GPU it serves one window that is the whole map, in 16 bits. On a CPU it serves what the C++
code does not take. No GPU has run it from here.
"""

import torch
from torch import Tensor

from samfast.kernels._common.backends import OLDEST_CUDA
from samfast.kernels._common.windows import Windows

# On some GPUs torch has no backward for heads in between.
HEAD_DIMS = (*range(8, 193, 8), *range(232, 257, 8))
ALIGNED = 8  # elements of 16 bits that the GPU's code loads at once
_aten = torch.ops.aten


def is_global(windows: Windows) -> bool:
    """Whether one window is the whole map."""
    return windows.down == windows.across == 1 and windows.pads == 0


def takes(q: Tensor, windows: Windows) -> bool:
    """Whether the GPU's code takes this call; q: (batch, H, W, heads, head_dim)."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[4] in HEAD_DIMS
        and is_global(windows)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= OLDEST_CUDA
    )


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (batch, H, W, heads, head_dim), dense, and lse (batch, heads, H · W), on a GPU."""
    if q.shape[0] == 0:
        return q.new_empty(q.shape), q.new_empty(0, q.shape[3], _tokens(q), dtype=torch.float32)
    q, k, v = (aligned(t) for t in (q, k, v))
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(
        *map(heads_first, (q, k, v)), scale=scale
    )
    return out.transpose(1, 2).reshape(q.shape).contiguous(), lse.contiguous()


def backward(dout, q, k, v, out, lse, scale: float, dq, dk, dv) -> None:
    """Fills dq, dk and dv, views as q, on a GPU."""
    if q.shape[0] == 0:
        return
    given = [heads_first(aligned(t)) for t in (dout, q, k, v, out)]
    # Without dropout nothing is drawn, and sequences of one length have no list of lengths.
    seed, offset = (lse.new_empty(size, dtype=torch.uint64) for size in ((2,), ()))
    length = _tokens(q)
    grads = _aten._scaled_dot_product_flash_attention_backward(
        *given, lse, None, None, length, length, 0.0, False, seed, offset, scale=scale
    )
    for made, grad in zip((dq, dk, dv), grads, strict=True):
        made.copy_(grad.transpose(1, 2).unflatten(1, q.shape[1:3]))


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v (samples, heads, tokens, head_dim) -> out, as q, and lse (samples, heads, tokens)."""
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def cpu_backward(dout, q, k, v, out, lse, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of tensors as in ``cpu_forward``."""
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, False, scale=scale
    )


def heads_first(t: Tensor) -> Tensor:
    """(batch, H, W, heads, C) -> (batch, heads, H · W, C), a view where lines follow each other."""
    return t.flatten(1, 2).transpose(1, 2)


def aligned(t: Tensor) -> Tensor:
    """t, or a copy where its rows do not begin at multiples of 16 bytes or have gaps."""
    starts = (t.storage_offset(), *t.stride()[:4])
    fits = t.stride(4) == 1 and not any(start % ALIGNED for start in starts)
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def _tokens(q: Tensor) -> int:
    return q.shape[1] * q.shape[2]
