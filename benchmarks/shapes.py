# SPDX-License-Identifier: Apache-2.0
"""The sizes SAM's encoders give to every operation at 1024² input."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Encoder:
    """One ViT of segment_anything."""

    name: str
    width: int
    depth: int
    heads: int
    tokens: int = 64 * 64
    window_tokens: int = 25 * 14 * 14  # 64×64 padded to 70×70, in windows of 14×14
    global_blocks: int = 4


ENCODERS = {
    "vit_b": Encoder("vit_b", 768, 12, 12),
    "vit_l": Encoder("vit_l", 1024, 24, 16),
    "vit_h": Encoder("vit_h", 1280, 32, 16),
}


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """One linear layer of a block: (tokens, features) -> (tokens, out)."""

    layer: str
    tokens: int
    features: int
    out: int

    @property
    def flops(self) -> int:
        """Forward and gradient of the input, weight frozen; two operations a multiply-add."""
        return 4 * self.tokens * self.features * self.out


def linears(model: str, batch: int = 1) -> list[LinearShape]:
    """The linear layers of one windowed block: qkv and proj see the padded windows."""
    encoder = ENCODERS[model]
    d = encoder.width
    windows, tokens = batch * encoder.window_tokens, batch * encoder.tokens
    return [
        LinearShape("qkv", windows, d, 3 * d),
        LinearShape("proj", windows, d, d),
        LinearShape("lin1", tokens, d, 4 * d),
        LinearShape("lin2", tokens, 4 * d, d),
    ]


def step_flops(width: int, keys: list[int], images: int, tokens: int) -> int:
    """The floor of a step: every product forwards once, gradients of the rows, none of weights.

    keys: how many each block's query attends to   tokens: of one image
    Patches below the first adapter go forwards only; attention's backward takes five products for
    its two. Padding is no query.
    """
    rows = images * tokens
    total = 2 * rows * 3 * 16 * 16 * width
    for n in keys:
        total += 2 * (2 * rows * 12 * width**2) + 7 * (2 * rows * n * width)
    return total + 2 * (2 * rows * (width * 256 + 9 * 256**2))
