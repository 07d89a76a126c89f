# SPDX-License-Identifier: Apache-2.0
"""Counter-based dropout masks: Philox 4x32-10 (Salmon et al., 2011), the same bits everywhere.

The word for row t and column c of a matrix with D columns is word ``c mod 4`` of the block with
key ``seed`` and counter ``t·⌈D/4⌉ + ⌊c/4⌋``. An element is kept when its word is at least
``p · 2³²``. Nothing of x's size is stored between forward and backward, only the seed.
"""

import torch

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _mulhilo(a: int, b: torch.Tensor):
    """High and low 32 bits of a · b for 32-bit words held in int64 (no step exceeds 2⁶³)."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Four 32-bit words per counter. seed: int64, one element; counter: int64 (...) -> (..., 4)."""
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        hi_a, lo_a = _mulhilo(_ROUND_A, c0)
        hi_b, lo_b = _mulhilo(_ROUND_B, c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def threshold(p: float) -> int:
    """The smallest word that is kept at drop probability p."""
    return min(round(p * 2**32), _LOW)


def keep_mask(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    """Which elements of a (rows, columns) matrix survive dropout: bool (rows, columns)."""
    blocks = (columns + 3) // 4
    counter = torch.arange(rows * blocks, device=seed.device)
    words = philox_words(seed, counter).view(rows, 4 * blocks)[:, :columns]
    return words >= threshold(p)
