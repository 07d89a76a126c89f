# SPDX-License-Identifier: Apache-2.0
"""FLOP, bytes and launches of each stage of the GPU path, by design.

A function named after a kernel returns the FLOP of one launch, from its arguments.
"""

from samfast.kernels.lora_linear.costs import Stage

_SINGLE = 4  # parameters and their gradients are float32
_POSITIONS, _PROGRAMS = 64, 1024  # of a CUDA block, and of them where a block may have many tiles


def linear(tokens: int, features: int, out: int, itemsize: int) -> list[Stage]:
    """A trained linear layer: forward and both gradients."""
    flops = 2 * tokens * features * out
    moved = itemsize * (tokens * features + features * out + tokens * out)
    products = [Stage(name, flops, moved, 1, True) for name in ("y = x Hᵀ + b", "dx", "dH")]
    return [*products, Stage("db", tokens * out, itemsize * tokens * out, 1)]


def build(out: int, features: int, n: int, terms: int, itemsize: int) -> Stage:
    """H once: a multiply-add per term and element."""
    parts = _SINGLE * terms * out * features // n**2
    return Stage("build H", 2 * terms * out * features, parts + itemsize * out * features, 1)


def contract(out: int, features: int, n: int, terms: int, itemsize: int) -> list[Stage]:
    """Both gradients from dH, which is read once: the shares of drules apart, then their sum."""
    cell = out * features // n**2
    tiles = -(-cell // _POSITIONS)
    blocks = min(tiles, _PROGRAMS) if n * n <= 16 else tiles
    shares = _SINGLE * blocks * terms * n * n
    moved = itemsize * out * features + 2 * _SINGLE * terms * cell + shares
    flops = 4 * terms * out * features
    return [Stage("dweights, shares of drules", flops, moved, 1), Stage("drules", 0, shares, 1)]


def build_kernel(h_ptr, terms, **_) -> int:
    return 2 * terms * h_ptr.numel()


def contract_kernel(grad_ptr, terms, dweights_ptr, partial_ptr, **_) -> int:
    needs = (dweights_ptr is not None) + (partial_ptr is not None)
    return needs * 2 * terms * grad_ptr.numel()


def factors_kernel(b_ptr, **_) -> int:
    return b_ptr.numel()


def factors_backward_kernel(terms, n, rank, rows, drules_ptr, dleft_ptr, **_) -> int:
    needs = (drules_ptr is not None) + (dleft_ptr is not None)
    return needs * 2 * (terms * n * rank) * (n * rows)


def stages(
    tokens: int, features: int, out: int, n: int, itemsize: int, terms: int | None = None
) -> list[Stage]:
    """Forward and backward of a layer that is trained; H is built for y and again for dx."""
    parts = out, features, n, terms or n, itemsize
    return [*linear(tokens, features, out, itemsize), build(*parts), build(*parts),
            *contract(*parts)]  # fmt: skip


def mixing(tokens: int, features: int, out: int, n: int, itemsize: int) -> tuple[int, int]:
    """FLOP and bytes of a forward that never makes H: x in n parts by each of n weights, each
    result mixed by its rule. What the n results take is written and read once."""
    products = 2 * tokens * features * out  # n terms, each n parts of (features/n) x (out/n)
    mixed = 2 * tokens * n * n * out
    results = itemsize * tokens * n * out
    moved = itemsize * (tokens * features + tokens * out) + _SINGLE * features * out // n
    return products + mixed, moved + 2 * results


def token(
    features: int, out: int, n: int, terms: int, rank: int, base: bool | None = None
) -> tuple[int, int]:
    """Multiply-adds a token of a step with factored weights: by LoRA's products, and built.

    base: None without one, otherwise whether it is trained. A frozen one needs no gradient of the
    whole matrix unless the update is part of it. What happens once a call is not counted.
    """
    whole, low = out * features, terms * n * rank * (features + out)
    beside = 0 if base is None else (3 if base else 2) * whole
    return beside + 3 * low, 3 * whole


def factors(features: int, out: int, n: int, terms: int, rank: int) -> list[Stage]:
    """lora_a and lora_b of an adapter, and the gradients of what they are made of."""
    width = terms * n * rank
    parts = terms * (n * n + rank * (features + out) // n)
    made = _SINGLE * width * (features + out)
    read = _SINGLE * width * (features // n + 2 * out)  # of dA only the blocks on the diagonal
    return [
        Stage("factors", width * out, _SINGLE * parts + made, 1),
        Stage("their gradients", 4 * width * out, 2 * _SINGLE * parts + read, 1),
    ]
