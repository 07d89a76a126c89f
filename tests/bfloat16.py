# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter with right bfloat16.

It keeps bfloat16 as the bits of uint16, cuts them off where a GPU rounds to the nearest even, and
computes with them as if they were integers. Inside ``mended()`` casts round as torch does, products
of matrices are of the numbers, and so is arithmetic, each operation rounded once. What is left
refuses bfloat16. Works with Triton 3.6 to 3.9.
"""

import contextlib

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TensorHandle = interpreter.TensorHandle
REFUSED = ("create_fma", "create_erf", "create_rsqrt", "create_clampf", "create_fabs")


def narrow(numbers: np.ndarray) -> np.ndarray:
    """The bits of numbers, float32 or small whole ones, rounded to bfloat16."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    return torch.from_numpy(numbers).bfloat16().view(torch.uint16).numpy().reshape(numbers.shape)


def wide(bits: np.ndarray) -> np.ndarray:
    """float32 numbers of bfloat16's bits."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def _is_narrow(handle) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _refusing(name, original):
    def call(self, *args, **kwargs):
        if any(_is_narrow(a) for a in args):
            raise NotImplementedError(f"{name} of bfloat16 is not interpreted; cast to float32")
        return original(self, *args, **kwargs)

    return call


def _casting(original):
    def call(self, source, target, *rest):
        types = source.dtype.scalar, target.scalar
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(wide(source.data), tl.float32)
        if types[1] == tl.bfloat16 and (types[0] == tl.float32 or types[0].is_int()):
            return TensorHandle(narrow(source.data), tl.bfloat16)
        if tl.bfloat16 in types:
            raise NotImplementedError(f"a cast of {types[0]} to {types[1]} is not interpreted")
        return original(self, source, target, *rest)

    return call


@contextlib.contextmanager
def mended():
    """Every interpreted launch inside computes bfloat16 as a GPU does."""
    builder, reduction = interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface
    changed = ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op", "unary_op")
    originals = {name: getattr(builder, name) for name in (*changed, *REFUSED)}
    reduce = reduction.apply

    def dot(self, a, b, *rest):
        a, b = (TensorHandle(wide(t.data), tl.float32) if _is_narrow(t) else t for t in (a, b))
        return originals["create_dot"](self, a, b, *rest)

    def binary(self, left, right, operation):
        if not _is_narrow(left):
            return originals["binary_op"](self, left, right, operation)
        made = operation(wide(left.data), wide(right.data))
        return TensorHandle(narrow(made) if made.dtype.kind == "f" else made, tl.bfloat16)

    def unary(self, argument, operation):
        if not _is_narrow(argument):
            return originals["unary_op"](self, argument, operation)
        return TensorHandle(narrow(operation(wide(argument.data))), tl.bfloat16)

    def refuse_reduction(self, inputs):
        every = inputs if isinstance(inputs, tuple) else (inputs,)
        if any(_is_narrow(t.handle) for t in every):
            raise NotImplementedError("a reduction of bfloat16 is not interpreted; cast to float32")
        return reduce(self, inputs)

    replacements = {kind: _casting(originals[kind]) for kind in ("cast_impl", "create_fp_to_fp")}
    replacements |= {"create_dot": dot, "binary_op": binary, "unary_op": unary}
    replacements |= {name: _refusing(name, originals[name]) for name in REFUSED}
    try:
        for name, replacement in replacements.items():
            setattr(builder, name, replacement)
        reduction.apply = refuse_reduction
        yield
    finally:
        reduction.apply = reduce
        for name, original in originals.items():
            setattr(builder, name, original)
