# SPDX-License-Identifier: Apache-2.0
"""FLOP, bytes and launches of each stage of lora_linear on a GPU, by design.

A function named after a kernel returns the FLOP of one launch, from its arguments.
"""

import dataclasses

from samfast.kernels.lora_linear.engine import MAX_CHUNKS, chunks_at_a_time


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    flops: int
    bytes: int
    launches: int
    product: bool = False  # a GEMM of the library


def own_launches(stages: list[Stage], *others: str) -> int:
    """Launches of samfast's kernels: neither the library's products nor the stages named."""
    return sum(s.launches for s in stages if not s.product and s.name not in others)


def frozen(tokens: int, features: int, out: int, itemsize: int) -> list[Stage]:
    """Forward and input gradient of only the frozen layer."""
    flops = 2 * tokens * features * out
    moved = itemsize * (tokens * features + features * out + tokens * out)
    return [Stage("y = x Wᵀ + b", flops, moved, 1, True), Stage("dx = dy W", flops, moved, 1, True)]


def _column_blocks(out: int, rank: int) -> int:
    """How many up_backward usually has; each makes one float32 partial of dz."""
    return -(-out // (128 if rank <= 64 else 64))


def product(tokens: int, width: int, rank: int) -> int:
    """FLOP of rows of this width and a factor of low rank."""
    return 2 * tokens * width * rank


def down_kernel(tokens, columns, ranks, **_) -> int:
    return product(tokens, columns, ranks)


def up_kernel(tokens, b_ptr, **_) -> int:
    return product(tokens, *b_ptr.shape)


def up_backward_kernel(tokens, b_ptr, NEED_DB, **_) -> int:
    return (1 + NEED_DB) * product(tokens, *b_ptr.shape)


def down_backward_kernel(tokens, columns, ranks, NEED_DX, NEED_DA, **_) -> int:
    return (NEED_DX + NEED_DA) * product(tokens, columns, ranks)


def stages(tokens: int, features: int, out: int, rank: int, itemsize: int) -> list[Stage]:
    """Forward and backward with an adapter on all of the layer's output."""
    x, y, r = itemsize * tokens * features, itemsize * tokens * out, rank
    dz = 2 * 4 * tokens * r * _column_blocks(out, r)
    repeats = -(-MAX_CHUNKS // chunks_at_a_time(MAX_CHUNKS, dz // (2 * MAX_CHUNKS)))
    db, da = 2 * 4 * MAX_CHUNKS * r * out, 2 * 4 * MAX_CHUNKS * r * features
    return [
        *frozen(tokens, features, out, itemsize),
        Stage("down", product(tokens, features, r), x, 1),
        Stage("up", product(tokens, out, r), 2 * y, 1),
        Stage("up_backward", 2 * product(tokens, out, r), y + (dz + db) // 2, repeats),
        Stage("reduce dz, dB", 0, (dz + db) // 2, repeats),
        Stage("down_backward", 2 * product(tokens, features, r), 3 * x + da // 2, 1),
        Stage("reduce dA", 0, da // 2, 1),
    ]
