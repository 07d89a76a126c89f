# SPDX-License-Identifier: Apache-2.0
"""What hypercomplex operations launch at real sizes, on tensors without data."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common.without_data import meta
from samfast.kernels.hypercomplex import triton_factors, triton_kernels


def launches(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """PHM at ViT-B's lin1 and at sizes of heads, each n, and the factors of Kronecker adapters."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    less = not quick
    yield "hypercomplex bfloat16 n4", partial(weight, 4, 4, 768, 192, bf16, less=less)
    yield "hypercomplex factors n4", partial(factors, 4, 4, 576, 192, 1, fp32, less=less)
    if quick:
        return
    for n in (2, 3, 8, 16):
        yield f"hypercomplex bfloat16 n{n}", partial(weight, n, n, 3072 // n, 768 // n, bf16)
        yield f"hypercomplex float32 n{n}", partial(weight, n, n, 3072 // n, 768 // n, fp32)
    yield "hypercomplex float32 n4", partial(weight, 4, 4, 1280, 320, fp32)
    yield "hypercomplex float16 n4", partial(weight, 4, 4, 1280, 320, fp16)
    yield "hypercomplex float32 head of 4", partial(weight, 4, 4, 1, 1, fp32)
    yield "hypercomplex float32 head of 16", partial(weight, 4, 4, 4, 4, fp32)
    yield "hypercomplex bfloat16 n4 odd", partial(weight, 4, 4, 101, 67, bf16)
    yield "hypercomplex bfloat16 base", partial(weight, 4, 1, 960, 320, bf16, base=bf16)
    yield "hypercomplex bfloat16 float32 base", partial(weight, 4, 1, 960, 320, bf16, base=fp32)
    yield "hypercomplex bfloat16 parameters", partial(weight, 8, 16, 160, 160, bf16, bf16)
    for n, rank, dtype in ((2, 4, fp32), (8, 2, fp32), (4, 1, bf16), (16, 1, fp16)):
        name = f"hypercomplex factors {str(dtype)[6:]} n{n} r{rank}"
        yield name, partial(factors, n, n, 3840 // n, 1280 // n, rank, dtype)
    yield "hypercomplex factors odd", partial(factors, 1, 3, 101, 67, 3, fp32)


def weight(n, terms, rows, columns, dtype, parameters=torch.float32, base=None, less=True) -> None:
    """A forward and backward; with ``less``, also the backwards that make fewer gradients."""
    rules = meta(terms, n, n, dtype=parameters)
    weights = meta(terms, rows, columns, dtype=parameters)
    size = n * rows, n * columns
    base = None if base is None else meta(*size, dtype=base)
    triton_kernels.build(rules, weights, base, 0.5, dtype)
    grad = meta(*size, dtype=dtype)
    for needs in ((True, True), (True, False), (False, True))[: 3 if less else 1]:
        triton_kernels.contract(grad, rules, weights, 0.5, needs)


def factors(terms, n, rows, columns, rank, dtype, less=True) -> None:
    """A forward and backward; with ``less``, also the backwards that make fewer gradients."""
    shapes = (terms, n, n), (terms, rows, rank), (terms, columns, rank)
    parts = [meta(*shape, dtype=dtype) for shape in shapes]
    da, db = triton_factors.forward(*parts, dtype)
    triton_factors.backward(da, db, *parts, (True, True, True))
    if less:
        triton_factors.backward(None, db, *parts, (True, False, False))
        triton_factors.backward(None, db, *parts, (False, True, False))
        triton_factors.backward(da, None, *parts, (False, False, True))
