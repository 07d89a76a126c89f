# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for GPUs that are not here, and read what they cost from the binary.

A launcher is run on meta tensors while ``recording`` stands in for the launch, so what is compiled
is what a user's call would launch: the same types, constants and divisibility by sixteen.
Kernels must be imported without TRITON_INTERPRET.
"""

import argparse
import contextlib
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid and every argument by name."""

    kernel: triton.JITFunction
    grid: tuple
    arguments: dict
    options: dict


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target. shared in bytes, stack and local in bytes a thread."""

    kernel: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    spills: int  # loads and stores of local memory in the machine code
    tensor_core: str  # "WGMMA", "HMMA" or "" where the kernel makes no matrix product
    atomics: int  # atomic instructions on floats

    @property
    def clean(self) -> bool:
        """No spills, no float atomics, shared memory within the target's limit."""
        fits = self.shared <= SHARED_LIMITS[self.arch]
        return fits and not (self.spills or self.stack or self.local or self.atomics)


@contextlib.contextmanager
def recording():
    """Collect launches instead of making them; yields the list."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        names = self.arg_names
        arguments = dict(zip(names, args, strict=False)) | kwargs
        grid = grid(arguments) if callable(grid) else grid
        launches.append(Launch(self, tuple(grid), {n: arguments[n] for n in names}, options))

    original = triton.JITFunction.run
    triton.JITFunction.run = record
    try:
        yield launches
    finally:
        triton.JITFunction.run = original


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile one recorded launch for compute capability arch / 10."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(launch.arguments.items()):
        kind = _kind(value, launch.kernel.params[i].is_constexpr)
        signature[name] = kind
        if kind == "constexpr":
            constants[(i,)] = value
        elif _by_sixteen(value):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    return _read(launch.kernel.__name__, arch, compiled)


def _kind(value, is_constexpr):
    if is_constexpr or value is None or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _by_sixteen(value):
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0 if value.device.type != "meta" else True
    return isinstance(value, int) and value % 16 == 0


def _tool(name):
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read(name, arch, compiled):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (resources,) = read_cubin(path, arch)
    return dataclasses.replace(resources, kernel=name, shared=compiled.metadata.shared)


def read_cubin(path: Path, arch: int) -> list[Resources]:
    """Resources of every kernel in a cubin."""
    run = dict(capture_output=True, text=True, check=True)
    usage = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", path], **run).stdout
    sass = subprocess.run([_tool("nvdisasm"), path], **run).stdout
    bodies = dict(
        re.findall(r"^\.text\.(\S+):$(.*?)(?=^\.text\.|\Z)", sass, re.MULTILINE | re.DOTALL)
    )
    found = re.findall(r"Function (\S+?):\s*(REG:.*)", usage)
    return [_resources(name, arch, row, bodies[name]) for name, row in found]


def _resources(name, arch, usage, sass):
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    atomics = r"\b(?:ATOM|ATOMG|RED|REDG|ATOMS)\.[^;\n]*(?:F32|F16|BF16|F64)"
    return Resources(
        kernel=name,
        arch=arch,
        registers=numbers["REG"],
        stack=numbers["STACK"],
        local=numbers["LOCAL"],
        shared=numbers["SHARED"],
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        tensor_core="WGMMA" if "HGMMA" in sass else "HMMA" if "HMMA" in sass else "",
        atomics=len(re.findall(atomics, sass)),
    )


def compile_cuda(source: Path, arch: int) -> list[Resources]:
    """Compile one CUDA source for one target with nvcc and read every kernel in it."""
    from torch.utils.cpp_extension import include_paths

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "source.cubin"
        command = ["nvcc", "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-cubin"]
        command += [f"-arch=sm_{arch}", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
        subprocess.run([*command, str(source), "-o", str(cubin)], check=True)
        return read_cubin(cubin, arch)


def lora_linear_launches(
    rank, dtype, dropout=0.0, slices=False, shared=False, tokens=4 * 4900, width=1280
):
    """Every launch of a forward and backward of a windowed qkv, ViT-H's at batch 4 unless told;
    also the backwards that make fewer gradients."""
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


def registered(quick: bool):
    """(name, launches) of everything that must compile cleanly."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if quick:
        for rank, dtype, dropout, slices in ((4, bf16, 0.0, False), (16, fp32, 0.1, True)):
            full, launches = lora_linear_launches(rank, dtype, dropout, slices)
            yield f"lora_linear {str(dtype)[6:]} r{rank}", launches[:full]
        return
    for dtype, ranks in ((bf16, (1, 3, 4, 8, 16, 32, 64, 128)), (fp32, (1, 4, 16, 32, 64))):
        for rank in ranks:
            for dropout in (0.0, 0.1):
                name = f"lora_linear {str(dtype)[6:]} r{rank}{' dropout' if dropout else ''}"
                yield name, lora_linear_launches(rank, dtype, dropout)[1]
    yield "lora_linear float16 r4 qv", lora_linear_launches(4, fp16, slices=True)[1]
    yield "lora_linear float16 r128 dropout", lora_linear_launches(128, fp16, 0.1)[1]
    yield "lora_linear bfloat16 r32 shared", lora_linear_launches(32, bf16, 0.1, True, True)[1]
    for width in (768, 1024):
        launches = lora_linear_launches(4, bf16, tokens=4900, width=width)[1]
        yield f"lora_linear bfloat16 r4 width {width}", launches


@triton.jit
def spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A product too wide for one warp: what the report must catch."""
    offs = tl.arange(0, BLOCK)
    at = offs[:, None] * BLOCK + offs[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x).to(tl.bfloat16))


@triton.jit
def atomic_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A sum in no fixed order: what the report must catch too."""
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


def _self_test():
    x = torch.empty(128, 128, device="meta", dtype=torch.bfloat16)
    y = torch.empty(128, device="meta")
    with recording() as launches:
        spilling_kernel[(1,)](x, x, BLOCK=128, num_warps=1)
        atomic_kernel[(1,)](y, y, BLOCK=128)
    yield "self-test", launches


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="compile every kernel for GPUs that are not here")
    parser.add_argument("--archs", nargs="+", type=int, default=sorted(SHARED_LIMITS))
    parser.add_argument("--quick", action="store_true", help="two configurations only")
    parser.add_argument("--self-test", action="store_true", help="a kernel that must fail")
    parser.add_argument("--cuda", nargs="*", type=Path, help="CUDA sources; all of csrc/cuda")
    options = parser.parse_args(arguments)
    print(f"triton {triton.__version__}")
    failed = False
    if options.cuda is not None:
        for source in options.cuda or sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            for arch in options.archs:
                failed |= _show(source.name, compile_cuda(source, arch))
        return 1 if failed else 0
    for name, launches in _self_test() if options.self_test else registered(options.quick):
        for arch in options.archs:
            failed |= _show(name, (compile_launch(launch, arch) for launch in launches))
    return 1 if failed else 0


def _show(name, reports) -> bool:
    """Print a row for each kernel; True when one of them is not clean."""
    failed = False
    for r in reports:
        failed |= not r.clean
        print(
            f"{name:34} sm_{r.arch:<4}{r.kernel:22} registers {r.registers:3} stack {r.stack:3} "
            f"spills {r.spills:3} shared {r.shared:6} atomics {r.atomics} {r.tensor_core:5} "
            f"{'clean' if r.clean else 'NOT CLEAN'}",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
