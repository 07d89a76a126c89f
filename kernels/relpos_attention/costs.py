# SPDX-License-Identifier: Apache-2.0
"""FLOP and bytes of each path of the attention, and launches of the GPU's, by design.

FLOP are those of the products that a path executes. Padding tokens are keys on every path: their
logits are in the softmax. Only the torch path computes queries of the padding. The lanes that fill
up a vector or a tile are not counted: in C++ up to an eighth of a window.

A function named after a kernel returns the FLOP of one launch, from its arguments.
"""

from samfast.kernels._common.windows import Windows
from samfast.kernels.lora_linear.costs import Stage
from samfast.kernels.relpos_attention.tiling import one_hot


def logits_bytes(windows: Windows, heads: int, itemsize: int) -> int:
    """What eager attention writes out: a logit for every pair of positions in every window."""
    return itemsize * heads * windows.samples * (windows.height * windows.width) ** 2


def _sizes(windows: Windows, heads: int, head_dim: int, itemsize: int):
    """FLOP of one product over all pairs of query and key and of one with the tables; bytes of
    the tokens, of the padding, of the bias's factors, and of a number for each query."""
    queries, keys = heads * windows.tokens, windows.height * windows.width
    lines = windows.height + windows.width
    return (
        2 * queries * keys * head_dim,
        2 * queries * lines * head_dim,
        itemsize * queries * head_dim,
        itemsize * heads * windows.batch * windows.pads * head_dim,
        itemsize * queries * lines,
        4 * queries,
    )


def stages(
    windows: Windows, heads: int, head_dim: int, itemsize: int, tables: bool = True
) -> list[Stage]:
    """Forward and backward on a GPU; tables: whether their gradients are wanted."""
    product, bias, token, pad, factor, number = _sizes(windows, heads, head_dim, itemsize)
    keys = 2 * (token + pad)
    read = 2 * token + keys  # and number, in the forward; dq has dq, and delta too
    written = 2 * token + 2 * keys  # dk and dv
    if one_hot(windows):  # dq leaves the factors behind, and their gradients where tables want them
        made = [
            Stage("forward", 2 * product + bias, read + number, 1),
            Stage("dq, factors, delta", 3 * product + 2 * bias,
                  read + 2 * token + (1 + tables) * factor + 2 * number, 1),
            Stage("dk, dv", 4 * product, written + factor + 2 * number, 1),
        ]  # fmt: skip
    else:
        less_lse = factor + (4 - itemsize) * heads * windows.tokens * windows.height
        made = [
            Stage("factors", bias, token + factor, 1),
            Stage("forward", 2 * product, read + factor + number, 1),
            Stage("factors less lse", bias, token + less_lse + number, 1),
            Stage(
                "dq, delta", 3 * product + bias, read + 2 * token + less_lse + factor + number, 1
            ),
            Stage("dk, dv", 4 * product, written + less_lse + number, 1),
        ]
    if tables:
        made.append(Stage("dtables", bias, token + factor, 1))
        made.append(Stage("reduce dtables", 0, 0, 1))
    return made


def forward_stages(windows: Windows) -> int:
    """How many of ``stages`` come first; the backward follows."""
    return 1 if one_hot(windows) else 2


def _launch(q, height, width, image_height, image_width) -> tuple[int, int]:
    """FLOP of a product over all pairs and of one with the tables; q: (batch, …, heads, HEAD)."""
    windows = Windows(q.shape[0], image_height, image_width, height, width)
    return _sizes(windows, *q.shape[-2:], q.element_size())[:2]


def prepare_kernel(q_ptr, height, width, image_height, image_width, **_) -> int:
    return _launch(q_ptr, height, width, image_height, image_width)[1]


def forward_kernel(q_ptr, height, width, image_height, image_width, PITCH, **_) -> int:
    product, bias = _launch(q_ptr, height, width, image_height, image_width)
    return 2 * product + (bias if PITCH else 0)  # of small windows, whose factors it makes


def dq_kernel(q_ptr, height, width, image_height, image_width, REL, PITCH, **_) -> int:
    product, bias = _launch(q_ptr, height, width, image_height, image_width)
    return 3 * product + (bias if REL else 0) + (bias if PITCH else 0)


def dkv_kernel(q_ptr, height, width, image_height, image_width, **_) -> int:
    return 4 * _launch(q_ptr, height, width, image_height, image_width)[0]


def tables_kernel(q_ptr, height, width, image_height, image_width, **_) -> int:
    return _launch(q_ptr, height, width, image_height, image_width)[1]


def cpu_stages(
    windows: Windows, heads: int, head_dim: int, itemsize: int, tables: bool = True
) -> list[Stage]:
    """Forward and backward of the C++ path, whose backward is one walk with five products."""
    product, bias, token, pad, _, number = _sizes(windows, heads, head_dim, itemsize)
    keys = 2 * (token + pad)
    walk = 5 * product + (3 if tables else 2) * bias
    return [
        Stage("forward", 2 * product + bias, 2 * token + keys + number, 1),
        Stage("backward", walk, 4 * token + 2 * keys + number, 1),
    ]


def torch_stages(
    windows: Windows, heads: int, head_dim: int, itemsize: int, tables: bool = True
) -> list[Stage]:
    """Forward and backward of the torch path, where all of a padded window are queries.

    Bytes and launches are 0: they depend on how the path cuts its blocks.
    """
    padded = Windows.whole(windows.samples, windows.height, windows.width)
    product, bias, *_ = _sizes(padded, heads, head_dim, itemsize)
    return [
        Stage("forward", 2 * product + bias, 0, 0),
        Stage("backward", 5 * product + (3 if tables else 2) * bias, 0, 0),
    ]


def triton_stages(
    windows: Windows, heads: int, head_dim: int, itemsize: int, tables: bool = True
) -> list[Stage]:
    """Forward and backward on a GPU, and what float32 adds: weights and delta from themselves.

    ``stages`` is the design in the dtypes of tensor cores, without it.
    """
    made = stages(windows, heads, head_dim, itemsize, tables)
    if itemsize == 4:
        product, bias, token, pad, factor, number = _sizes(windows, heads, head_dim, itemsize)
        small = one_hot(windows)
        moved = 2 * token + 2 * (token + pad) + (3 if small else 2) * number
        flops = 2 * product + (bias if small else 0)
        made.append(Stage("delta, share", flops, moved + (0 if small else factor), 1))
    return made


BY_BACKEND = {"cpu": cpu_stages, "torch": torch_stages, "triton": triton_stages}
FORWARD_STAGES = {"cpu": lambda windows: 1, "torch": lambda windows: 1, "triton": forward_stages}
