# SPDX-License-Identifier: Apache-2.0
"""Rules of CUDA for a launch, and of compiled code for its arguments."""

import torch

from benchmarks.cubin import SHARED_LIMITS

MOST_PROGRAMS = {"x": 2**31 - 1, "y": 65_535, "z": 65_535}
MOST_THREADS = 1024
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class BrokenRule(RuntimeError):
    """A launch that CUDA would refuse, or that would run other code than its arguments need."""


def problem(source, metadata, grid, arguments, arch) -> str | None:
    """None, or a sentence about the first broken rule.

    source: signature, constants and attrs of Triton's ASTSource   metadata: num_warps and shared
    arguments: a launch plan gives pointers as numbers
    """
    return (
        _grid_problem(grid)
        or _size_problem(metadata.num_warps, metadata.shared, arch)
        or _argument_problem(source, arguments)
    )


def _grid_problem(grid):
    for (axis, most), programs in zip(MOST_PROGRAMS.items(), grid, strict=True):
        if not 0 < programs <= most:
            return f"expected 1 to {most} programs along {axis}, got the grid {grid}"
    return None


def _size_problem(num_warps, shared, arch):
    limit, threads = SHARED_LIMITS[arch], 32 * num_warps
    if shared is not None and shared > limit:
        return f"expected at most {limit} bytes of shared memory on sm_{arch}, got {shared}"
    if threads > MOST_THREADS:
        return f"expected at most {MOST_THREADS} threads in a program, got {threads}"
    return None


def _argument_problem(source, arguments):
    """Whether the code was made for other arguments than these."""
    devices = sorted({str(t.device) for t in arguments if isinstance(t, torch.Tensor)})
    if len(devices) > 1:
        return f"expected all tensors on one device, got {' and '.join(devices)}"
    for i, ((name, kind), value) in enumerate(
        zip(source.signature.items(), arguments, strict=True)
    ):
        if kind == "constexpr":
            constant = source.constants[i,]
            if value is not constant and value != constant:
                return f"{name} is {value}, but the code was made for {constant}"
            continue
        is_tensor, takes_pointer = isinstance(value, torch.Tensor), kind.startswith("*")
        of_plan = takes_pointer and type(value) is int
        if (takes_pointer != is_tensor and not of_plan) or (
            is_tensor and _POINTERS[value.dtype] != kind
        ):
            got = value.dtype if is_tensor else repr(value)
            return f"{name} is {got}, but the code was made for {kind}"
        number = value.data_ptr() if is_tensor else value
        known = source.attrs.get((i,), ())
        for divisor in (n for key, n in known if key == "tt.divisibility"):
            if number % divisor:
                what = "starts at" if takes_pointer else "is"
                return f"{name} {what} {number}, but the code was made for multiples of {divisor}"
    return None
