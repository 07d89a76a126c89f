# SPDX-License-Identifier: Apache-2.0
"""FLOP, bytes and launches of each stage of the block on a GPU, by design.

Everything is in one dtype, weights are frozen, memory is "fast", and all four layers or none have
LoRA of one rank. What a branch next to the MLP adds is counted by itself.

A function named after a kernel returns the FLOP of one launch, from its arguments.
"""

import dataclasses

from samfast.kernels._common.windows import Windows
from samfast.kernels.adapt_former import costs as branch
from samfast.kernels.lora_linear import costs as low_rank
from samfast.kernels.lora_linear.costs import Stage
from samfast.kernels.lora_linear.engine import MAX_PARTIALS
from samfast.kernels.relpos_attention import costs as attention

COLUMNS = 128  # of a block in GELU's backward, in 16 bits
MAX_ALONG = 16  # rank of adapters on both sides of GELU whose backward goes in one pass
FEW_RANKS = 8  # columns of adapters that multiply-adds take
MOST_LEFT = 4  # rank of an adapter whose update GELU takes; above it the backward spills
WIDEST = 1280  # columns up to which a norm's rows stay in registers next to them
JOINT = "y = [x | z] [W | s B]ᵀ + b"
NARROW = 768  # columns up to which its backward keeps four rows at once, else two
JOINT_ROWS = 2  # tokens a column from which one product makes a result with its update
ALIGNED = 16  # columns: Triton sees that rows start at multiples. No fewer than FEW_RANKS
MAX_PARTS = 256  # partial sums of A's gradient that a norm's backward writes


def along(tokens: int, blocks: int, ranks: int, b_ranks: int, itemsize: int) -> bool:
    """Whether GELU's backward also takes du back to z of the layer before.

    Its registers hold factors of low rank, in 16 bits. Partials of dz, one a block of columns, may
    take as much memory as up_backward's.
    """
    few = itemsize == 2 and max(ranks, b_ranks) <= MAX_ALONG
    return few and 4 * blocks * tokens * b_ranks <= MAX_PARTIALS


def in_registers(columns: int, ranks: int) -> bool:
    """Whether a norm walks its rows once, keeps them, and makes A's gradient on its way."""
    return columns <= WIDEST and columns % 16 == 0 and ranks <= FEW_RANKS


def rows_at_once(columns: int) -> int:
    """Rows that a turn of norm_row_backward_kernel takes."""
    return 4 if columns <= NARROW else 2


def walked_rows(tokens: int, columns: int, need_a: bool) -> int:
    """Rows that a program of norm_row_backward_kernel walks.

    At most MAX_PARTS programs where each writes a partial sum, else at most sixteen rows.
    """
    at_once = rows_at_once(columns)
    rows = at_once * -(-tokens // (at_once * MAX_PARTS))
    return rows if need_a else min(rows, 16)


def room(tokens: int, columns: int, ranks: int, itemsize: int) -> int:
    """Columns behind a norm's rows for z of the layer that reads them, or 0.

    One product with [W | s · B] then makes the result with the update. W is copied at each call:
    in 16 bits that takes no more than half as many bytes as a pass over the result.
    ranks: of A or of B, whichever is larger
    """
    fits = itemsize == 2 and tokens >= JOINT_ROWS * columns and in_registers(columns, ranks)
    return ALIGNED if fits and ranks else 0


class _Layer:
    """One linear layer's stages, from lora_linear's."""

    def __init__(self, name: str, tokens: int, features: int, out: int, rank: int, itemsize: int):
        self.name, self.rank = name, rank
        self.features, self.out, self.itemsize = features, out, itemsize
        every = low_rank.stages(tokens, features, out, max(rank, 1), itemsize)
        self.y, self.dx, self.down, self.up, self.up_backward, self.reduce, self.both, self.da = (
            every
        )
        self.rows = itemsize * tokens * features
        self.product = low_rank.product(tokens, features, max(rank, 1))  # of h, of dh A, and of dA

    def named(self, *stages: Stage) -> list[Stage]:
        return [Stage(f"{self.name}: {s.name}", *_numbers(s)) for s in stages]

    def forward(self, down: bool = False, left: bool = False, room: int = 0) -> list[Stage]:
        """left: its update is the next sum's   room: of its rows, behind which z is"""
        if not self.rank:
            return self.named(self.y)
        if room:
            wider = (self.features + room) / self.features
            flops, size = int(self.y.flops * wider), self.y.bytes + 2 * room * self.out
            return self.named(
                Stage("[W | s B]", 0, self.itemsize * self.out * (2 * self.features + room), 1),
                dataclasses.replace(self.y, name=JOINT, flops=flops, bytes=size),
            )
        return self.named(*([self.down] if down else []), self.y, *([] if left else [self.up]))

    def backward(self, before: "_Layer | None" = None, made: bool = False) -> list[Stage]:
        """Up to the gradient of the rows, without what the adapter adds to it.

        before: the layer whose dA is added up along with dz and dB
        made: whether the producer of dy makes the partials of these
        """
        if not self.rank:
            return self.named(self.dx)
        added = self.reduce
        if before is not None:
            name, size = f"{added.name}, dA of {before.name}", added.bytes + before.da.bytes
            added = Stage(name, 0, size, added.launches)
        return self.named(*([] if made else [self.up_backward]), added, self.dx)

    def low(self, name: str, passes: int, products: int = 1) -> Stage:
        """A stage that reads or writes the rows so many times, and so many products of rank r."""
        flops = products * self.product if self.rank else 0
        return Stage(name, flops, passes * self.rows, 1)


def norm_kernel(tokens, columns, ranks, DOWN, **_) -> int:
    return DOWN * low_rank.product(tokens, columns, ranks)


def norm_backward_kernel(tokens, columns, ranks, LOW, **_) -> int:
    return 2 * LOW * low_rank.product(tokens, columns, ranks)  # in each of its two walks


def norm_row_kernel(tokens, columns, UP, RANKS, **_) -> int:
    return low_rank.product(tokens, columns, UP + RANKS)


def norm_row_backward_kernel(tokens, columns, RANKS, NEED_DA, **_) -> int:
    return (1 + NEED_DA) * low_rank.product(tokens, columns, RANKS)


def add_row_kernel(tokens, columns, UP, **_) -> int:
    return low_rank.product(tokens, columns, UP)


def gelu_kernel(tokens, columns, ranks, DOWN, LEFT, **_) -> int:
    return low_rank.product(tokens, columns, DOWN * ranks + LEFT)


def gelu_backward_kernel(
    tokens, columns, ranks, b_ranks, LOW, NEED_DA, UP, NEED_DB, LEFT, **_
) -> int:  # fmt: skip
    own = (LOW + NEED_DA) * low_rank.product(tokens, columns, ranks)
    return own + low_rank.product(tokens, columns, (UP + NEED_DB) * b_ranks + LEFT)


def _numbers(stage):
    return stage.flops, stage.bytes, stage.launches, stage.product


def forward(windows: Windows, width: int, heads: int, rank: int, itemsize: int) -> list[Stage]:
    qkv, proj, lin1, lin2 = _layers(windows, width, rank, itemsize)
    attend = attention.stages(windows, heads, width // heads, itemsize, tables=False)
    attend = attend[: attention.forward_stages(windows)]
    left = rank > 0 and in_registers(width, rank)
    to_gelu, behind = 0 < rank <= MOST_LEFT, room(windows.tokens, width, rank, itemsize)
    factors = [Stage("B of proj and lin2, transposed", 0, 4 * 4 * rank * width, 1)]
    return [
        *(factors if left else []),
        qkv.low("norm1, h", 2),
        *qkv.forward(room=behind),
        *attend,
        *proj.forward(down=True, left=left),
        lin1.low("x1 = x + update, norm2, h", 4, 1 + left),
        *lin1.forward(left=to_gelu, room=0 if to_gelu else behind),
        lin2.low("GELU, h", 2, 1 + to_gelu),
        *lin2.forward(left=left),
        Stage("y = x1 + update", left * qkv.product, 3 * qkv.rows, 1),
    ]


def backward(windows: Windows, width: int, heads: int, rank: int, itemsize: int) -> list[Stage]:
    qkv, proj, lin1, lin2 = _layers(windows, width, rank, itemsize)
    attend = attention.stages(windows, heads, width // heads, itemsize, tables=False)
    attend = attend[attention.forward_stages(windows) :]

    blocks = -(-4 * width // COLUMNS)
    made = rank > 0 and along(windows.tokens, blocks, rank, rank, itemsize)
    gelu = lin2.low("GELU backward", 3)
    if rank:
        up = lin1.up_backward if made else Stage("", 0, lin2.rows, 0)  # of rows that are at hand
        more = lin2.da.bytes + up.bytes - lin2.rows  # partials, read again by what adds them up
        flops = (2 + (rank <= MOST_LEFT)) * lin2.product + up.flops
        name = gelu.name + (", dA, dz, dB" if made else ", dA")
        gelu = Stage(name, flops, gelu.bytes + more, 1)

    def norm(name, layer):
        if not rank:
            return [layer.low(name, 4)]
        if kept:
            turned = layer.low(f"{name}, dA", 4, 2)
            return [dataclasses.replace(turned, bytes=turned.bytes + layer.da.bytes)]
        da = Stage("dA", layer.product, layer.both.bytes - 2 * layer.rows, 1)
        return [layer.low(f"{name}, rows", 5, 2), *layer.named(da)]

    kept = in_registers(width, rank)
    if rank and kept:
        parts = -(-windows.tokens // walked_rows(windows.tokens, width, True)) * 4 * rank * width
        for layer in (qkv, lin1):
            layer.da = dataclasses.replace(layer.da, bytes=parts)
    return [
        *lin2.backward(),
        gelu,
        *lin1.backward(lin2, made),
        *norm("norm2 backward", lin1),
        *proj.backward(lin1),
        *(proj.named(proj.both) if rank else []),
        *attend,
        *qkv.backward(proj),
        *norm("norm1 backward", qkv),
        *(qkv.named(qkv.da) if rank else []),
    ]


def stages(windows: Windows, width: int, heads: int, rank: int, itemsize: int) -> list[Stage]:
    """Forward and backward; rank 0 for a frozen block whose input wants a gradient."""
    sizes = (windows, width, heads, rank, itemsize)
    return [*forward(*sizes), *backward(*sizes)]


def side(windows: Windows, width: int, bottleneck: int, itemsize: int) -> list[Stage]:
    """What adapt_former's branch next to the MLP adds."""
    return branch.stages(windows.tokens, width, bottleneck, itemsize, inside=True)


def _layers(windows, width, rank, itemsize):
    shapes = {"qkv": (1, 3), "proj": (1, 1), "lin1": (1, 4), "lin2": (4, 1)}
    return [
        _Layer(name, windows.tokens, i * width, o * width, rank, itemsize)
        for name, (i, o) in shapes.items()
    ]
