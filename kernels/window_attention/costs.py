# SPDX-License-Identifier: Apache-2.0
"""FLOP, bytes and launches of attention without a bias, by design."""

from samfast.kernels._common.windows import Windows
from samfast.kernels.lora_linear.costs import Stage


def _sizes(windows: Windows, heads: int, head_dim: int, itemsize: int):
    """FLOP of one product over all pairs of query and key; bytes of the tokens, of keys and values
    with their padding, and of a number for each query."""
    queries, keys = heads * windows.tokens, windows.height * windows.width
    token = itemsize * queries * head_dim
    pad = itemsize * heads * windows.batch * windows.pads * head_dim
    return 2 * queries * keys * head_dim, token, 2 * (token + pad), 4 * queries


def stages(windows: Windows, heads: int, head_dim: int, itemsize: int) -> list[Stage]:
    """Forward and backward of the Triton kernels; float32 has one more walk over the keys."""
    product, token, keys, number = _sizes(windows, heads, head_dim, itemsize)
    made = [Stage("forward", 2 * product, 2 * token + keys + number, 1)]
    if itemsize == 4:
        made.append(Stage("sums", 2 * product, 2 * token + keys + 3 * number, 1))
    return [
        *made,
        Stage("dq", 3 * product, 4 * token + keys + 2 * number, 1),
        Stage("dk, dv", 4 * product, 2 * token + 2 * keys + 2 * number, 1),
    ]


def flash_stages(windows: Windows, heads: int, head_dim: int, itemsize: int) -> list[Stage]:
    """Forward and backward of torch's flash attention on a GPU, and three copies into dqkv."""
    product, token, keys, number = _sizes(windows, heads, head_dim, itemsize)
    return [
        Stage("forward", 2 * product, 2 * token + keys + number, 1, True),
        Stage("backward", 5 * product, 4 * token + 2 * keys + 2 * number, 3, True),
        Stage("dqkv", 0, 6 * token, 3, True),
    ]


def cpu_stages(windows: Windows, heads: int, head_dim: int, itemsize: int) -> list[Stage]:
    """Forward and backward of the C++ path, whose backward is one walk with five products."""
    product, token, keys, number = _sizes(windows, heads, head_dim, itemsize)
    return [
        Stage("forward", 2 * product, 2 * token + keys + number, 1),
        Stage("backward", 5 * product, 4 * token + 2 * keys + number, 1),
    ]
