# SPDX-License-Identifier: Apache-2.0
"""Every Triton launch that must compile cleanly, with the sizes it is really made at.

One generator for each operation, named after it and listed in ``OPERATIONS``. ``operation(quick)``
yields (name, launches): a name such as "lora_linear bfloat16 r4", and the list that ``recording()``
filled while the operation's launchers ran on meta tensors. To add an operation, write its generator
and list it. With quick it yields one or two configurations of its usual use, otherwise every dtype,
each tile of its tiles.json, each option, and the largest size that ``supports()`` lets through.
Launches that lead to the same code cost nothing: they are compiled once.
"""

from collections.abc import Iterator

import torch

from benchmarks.offline import Launch, recording


def lora_linear(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """A windowed qkv of ViT-H at batch 4: every padded rank, and ranks divisible by 16 and not."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if quick:
        for rank, dtype, dropout, slices in ((4, bf16, 0.0, False), (16, fp32, 0.1, True)):
            full, launches = _lora_linear(rank, dtype, dropout, slices)
            yield f"lora_linear {str(dtype)[6:]} r{rank}", launches[:full]
        return
    for dtype, ranks in ((bf16, (1, 3, 4, 8, 16, 32, 64, 128)), (fp32, (1, 4, 16, 32, 64))):
        for rank in ranks:
            for dropout in (0.0, 0.1):
                name = f"lora_linear {str(dtype)[6:]} r{rank}{' dropout' if dropout else ''}"
                yield name, _lora_linear(rank, dtype, dropout)[1]
    yield "lora_linear float16 r4 qv", _lora_linear(4, fp16, slices=True)[1]
    yield "lora_linear float16 r128 dropout", _lora_linear(128, fp16, 0.1)[1]
    yield "lora_linear bfloat16 r32 shared", _lora_linear(32, bf16, 0.1, True, True)[1]
    for width in (768, 1024):
        launches = _lora_linear(4, bf16, tokens=4900, width=width)[1]
        yield f"lora_linear bfloat16 r4 width {width}", launches


def _lora_linear(
    rank, dtype, dropout=0.0, slices=False, shared=False, tokens=4 * 4900, width=1280
) -> tuple[int, list[Launch]]:
    """The launches of a forward and backward, how many these are, and after them those of the
    backwards that make fewer gradients."""
    from samfast.kernels.lora_linear import triton_kernels as kernels
    from samfast.kernels.lora_linear.engine import Slices

    features, out = width, 3 * width

    def meta(*shape, dtype=dtype):
        return torch.empty(*shape, device="meta", dtype=dtype)

    starts = (0, 2 * features) if slices else ()
    n = max(len(starts), 1)
    own = slices and not shared
    a = meta((n if own else 1) * rank, features, dtype=torch.float32)
    b = meta(n * features if slices else out, rank, dtype=torch.float32)
    x, y, layout = meta(tokens, features), meta(tokens, out), Slices(starts, b, own)
    seed = meta(1, dtype=torch.int64) if dropout else None
    with recording() as launches:
        h = kernels.down(x, a, dropout, seed)
        kernels.up_(y, h, b, 2.0, layout)
        kernels.up_backward(y, h, b, 2.0, layout)
        kernels.down_backward_(x, h, x, a, dropout, seed)
        full = len(launches)
        kernels.up_backward(y, None, b, 2.0, layout)
        kernels.down_backward_(None, h, x, a, dropout, seed)
        kernels.down_backward_(x, h, None, a, dropout, seed)
    return full, launches


OPERATIONS = (lora_linear,)


def registered(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """(name, launches) of every operation."""
    for operation in OPERATIONS:
        yield from operation(quick)
