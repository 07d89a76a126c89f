# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for GPUs that are not here, and read what they cost from the binary.

A launcher is run on meta tensors while ``recording`` stands in for the launch, so what is compiled
is what a user's call would launch: the same types, constants and divisibility by sixteen. Launches
that lead to the same code are compiled once, in parallel processes. Which launches there are stands
in ``benchmarks/launches.py``. Kernels must be imported without TRITON_INTERPRET.
"""

import argparse
import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from benchmarks import machine_code
from benchmarks.cubin import ROOT, SHARED_LIMITS, Resources, compile_cuda, read_cubin

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid and every argument by name; archs it is for, () for all."""

    kernel: triton.JITFunction
    grid: tuple
    arguments: dict
    options: dict
    archs: tuple[int, ...] = ()


@contextlib.contextmanager
def recording():
    """Collect launches instead of making them; yields the list."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        names = [parameter.name for parameter in self.params]
        arguments = {p.name: p.default for p in self.params if p.has_default}
        arguments |= dict(zip(names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in names}
        options = {name: value for name, value in kwargs.items() if name not in names}
        grid = grid(arguments) if callable(grid) else grid
        launches.append(Launch(self, tuple(grid), {n: arguments[n] for n in names}, options))

    original = triton.JITFunction.run
    triton.JITFunction.run = record
    try:
        yield launches
    finally:
        triton.JITFunction.run = original


@dataclasses.dataclass(frozen=True)
class Compile:
    """What decides the machine code of a launch, as plain data that another process can take.

    types: Triton's type of every parameter   constants: (position, value)
    divisible: positions of the arguments known to be multiples of sixteen
    """

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, object], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, object], ...]
    arch: int

    @classmethod
    def of(cls, launch: Launch, arch: int) -> "Compile":
        types, constants, divisible = [], [], []
        parameters = launch.kernel.params
        pairs = zip(parameters, launch.arguments.items(), strict=True)
        for i, (parameter, (name, value)) in enumerate(pairs):
            kind = _kind(value, parameter)
            types.append((name, kind))
            if kind == "constexpr":
                constants.append((i, value))
            elif not parameter.do_not_specialize and _by_sixteen(value):
                divisible.append(i)
        return cls(
            module=launch.kernel.fn.__module__,
            kernel=launch.kernel.fn.__name__,
            types=tuple(types),
            constants=tuple(constants),
            divisible=tuple(divisible),
            options=tuple(sorted(launch.options.items())),
            arch=arch,
        )

    def source(self) -> ASTSource:
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        constants = {(i,): value for i, value in self.constants}
        attributes = {(i,): [["tt.divisibility", 16]] for i in self.divisible}
        return ASTSource(kernel, dict(self.types), constants, attributes)

    def __str__(self) -> str:
        names = [name for name, _ in self.types]
        constants = [f"{names[i]}={value}" for i, value in self.constants if value is not None]
        constants += [f"{name}={value}" for name, value in self.options]
        return ", ".join(constants)


def _kind(value, parameter):
    if parameter.is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return "constexpr"
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _by_sixteen(value):
    if isinstance(value, torch.Tensor):
        start = value.storage_offset() * value.element_size()
        return start % 16 == 0 if value.is_meta else value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def compile_one(job: Compile) -> Resources | str:
    """Resources of one compiled kernel, or the sentence with which Triton refused it."""
    source = job.source()
    target = GPUTarget("cuda", job.arch, 32)
    try:
        compiled = triton.compile(source, target=target, options=dict(job.options))
    except (TritonError, RuntimeError) as error:
        return f"NOT COMPILED: {str(error).strip().splitlines()[-1]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (resources,) = read_cubin(path, job.arch)
    # Triton 3.6 and 3.7 take sm_100's TF32 unit for an operand that went through tl.join.
    narrowed = ".tf32" in compiled.asm["ptx"] or "kind::tf32" in compiled.asm["ptx"]
    warps = compiled.metadata.num_warps
    code = machine_code.limited(source, warps, job.arch, resources.loops)
    return dataclasses.replace(
        resources,
        kernel=job.kernel,
        code=code,
        faults=machine_code.faults(code, triton.__version__),
        shared=compiled.metadata.shared,
        narrowed=narrowed and "inputPrecision = tf32" not in compiled.asm["ttir"],
    )


def distinct(
    named: Iterable[tuple[str, list[Launch]]], archs: list[int]
) -> dict[Compile, list[str]]:
    """Every compile once, with the names of the configurations that need it."""
    users: dict[str, tuple[Compile, list[str]]] = {}
    for name, launches in named:
        for arch in archs:
            for launch in launches:
                if launch.archs and arch not in launch.archs:
                    continue
                job = Compile.of(launch, arch)
                # repr tells True from 1 and 1.0, which are equal as keys
                users.setdefault(repr(job), (job, []))[1].append(name)
    return dict(users.values())


def compile_all(jobs: list[Compile], processes: int) -> Iterator[Resources | str]:
    """compile_one of every job, in order."""
    if processes == 1 or len(jobs) == 1:
        yield from map(compile_one, jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked LLVM or OpenMP may hang
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=spawn) as pool:
        yield from pool.map(compile_one, jobs)


def gate(named, archs: list[int], processes: int) -> bool:
    """Compile all launches, print a row for each compile and a summary; True when all is clean."""
    start = time.monotonic()
    users = distinct(named, archs)
    found: dict[int, list[Resources]] = {arch: [] for arch in archs}
    wrong = 0
    for (job, names), result in zip(
        users.items(), compile_all(list(users), processes), strict=True
    ):
        more = f" +{len(names) - 1}" if len(names) > 1 else ""
        print(f"{names[0] + more:36} sm_{job.arch:<4}{job.kernel:22} {result}", flush=True)
        if isinstance(result, Resources):
            found[job.arch].append(result)
        if not (isinstance(result, Resources) and result.clean):
            wrong += 1
            print(f"  {job}", flush=True)
            for sentence in getattr(result, "faults", ()):
                print(f"  {sentence}", flush=True)
    for arch, results in found.items():
        if results:
            print(_summary(arch, results))
    launches = sum(map(len, users.values()))
    seconds = time.monotonic() - start
    print(f"{len(users)} compiles of {launches} launches, {wrong} wrong, {seconds:.0f} s")
    return wrong == 0


def _summary(arch, results):
    widest = max(results, key=lambda r: r.registers)
    largest = max(results, key=lambda r: r.shared)
    good = sum(r.clean for r in results)
    limited = sum(r.code is not None for r in results)
    return (
        f"sm_{arch:<4} {good} of {len(results)} clean, at most {widest.registers} registers "
        f"({widest.kernel}), {largest.shared} of {SHARED_LIMITS[arch]} bytes shared "
        f"({largest.kernel}), {limited} with limits on machine code"
    )


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="compile every kernel for GPUs that are not here")
    parser.add_argument("--archs", nargs="+", type=int, default=sorted(SHARED_LIMITS))
    parser.add_argument("--quick", action="store_true", help="the usual configurations")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--launches", default="benchmarks.launches", help="the module of launches")
    parser.add_argument("--cuda", nargs="*", type=Path, help="CUDA sources; all of csrc/cuda")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, but interpreted kernels cannot be compiled")
    print(f"triton {triton.__version__}{machine_code.note(triton.__version__)}")
    if options.cuda is not None:
        return 0 if _cuda(options.cuda, options.archs) else 1
    registered = importlib.import_module(options.launches).registered(options.quick)
    named = ((name, launches) for name, launches in registered if options.only in name)
    return 0 if gate(named, options.archs, options.jobs) else 1


def _cuda(sources, archs) -> bool:
    clean = True
    for source in sources or sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for arch in archs:
            for resources in compile_cuda(source, arch):
                clean &= resources.clean
                print(f"{source.name:36} sm_{arch:<4}{resources.kernel:22} {resources}", flush=True)
    return clean


if __name__ == "__main__":
    from benchmarks import offline  # the module under its own name, as other processes know it

    raise SystemExit(offline.main())
