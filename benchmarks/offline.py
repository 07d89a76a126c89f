# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for GPUs that are not here, and read what they cost from the binary.

A launcher is run on meta tensors while ``recording`` stands in for the launch, so what is compiled
is what a user's call would launch: the same types, constants and divisibility by sixteen. Launches
that lead to the same code are compiled once, in parallel processes. ``benchmarks/launches.py``
finds them. Kernels must be imported without TRITON_INTERPRET.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.errors import TritonError
from triton.runtime.jit import create_function_from_signature

from benchmarks import machine_code
from benchmarks.cubin import ROOT, SHARED_LIMITS, Resources, compile_cuda, read_cubin


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

    types: Triton's type of every parameter   constants: (path, value)
    attributes: (path, what is known), an empty tuple where a launch would look and found nothing
    options: those that are not Triton's own for this target

    Triton's cache finds an entry only by exactly these, in this order, so they are Triton's own.
    """

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple], ...]
    options: tuple[tuple[str, object], ...]
    arch: int

    @classmethod
    def of(cls, launch: Launch, arch: int) -> "Compile":
        kernel, arguments = launch.kernel, {**launch.arguments, **launch.options}
        backend, binder = _binder(kernel, arch)
        arguments["debug"] = arguments.get("debug", kernel.debug) or triton.knobs.runtime.debug
        bound, specialization, options = binder(**arguments)
        packed = kernel._pack_args(backend, arguments, bound, specialization, options)
        return cls.packed(kernel, arch, *packed)

    @classmethod
    def packed(cls, kernel, arch, options, signature, constants, attributes) -> "Compile":
        """From what Triton hands to its compiler."""
        usual = vars(_backend(arch).parse_options({}))
        own = {k: v for k, v in vars(options).items() if v != usual[k]}
        return cls(
            module=kernel.fn.__module__,
            kernel=kernel.fn.__name__,
            types=tuple(signature.items()),
            constants=tuple(constants.items()),
            attributes=tuple((path, tuple(map(tuple, v))) for path, v in attributes.items()),
            options=tuple(sorted(own.items())),
            arch=arch,
        )

    def source(self) -> ASTSource:
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        attributes = {path: [list(each) for each in known] for path, known in self.attributes}
        return ASTSource(kernel, dict(self.types), dict(self.constants), attributes)

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def __str__(self) -> str:
        names = [name for name, _ in self.types]
        constants = [
            f"{names[i]}={value}" for (i, *_), value in self.constants if value is not None
        ]
        constants += [f"{name}={value}" for name, value in self.options]
        return ", ".join(constants)


@functools.cache
def _backend(arch):
    return make_backend(GPUTarget("cuda", arch, 32))


@functools.cache
def _binder(kernel, arch):
    """What finds the types of a launch's arguments, as the launch itself has it."""
    backend = _backend(arch)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def compile_one(job: Compile) -> Resources | str:
    """Resources of one compiled kernel, or the sentence with which Triton refused it."""
    source = job.source()
    try:
        compiled = triton.compile(source, target=job.target, options=dict(job.options))
    except (TritonError, RuntimeError) as error:
        return f"NOT COMPILED: {str(error).strip().splitlines()[-1]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (resources,) = read_cubin(path, job.arch)
    # Triton 3.6 and 3.7 take sm_100's TF32 unit for an operand that went through tl.join.
    narrowed = ".tf32" in compiled.asm["ptx"] or "kind::tf32" in compiled.asm["ptx"]
    warps = compiled.metadata.num_warps
    code = machine_code.limited(source, warps, job.arch, resources.loops, resources.instructions)
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


def in_processes(work: Callable, jobs: list[Compile], processes: int) -> Iterator:
    """work(job) of every job, in order."""
    if processes == 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked LLVM or OpenMP may hang
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=spawn) as pool:
        yield from pool.map(work, jobs)


def gate(named, archs: list[int], processes: int) -> bool:
    """Compile all launches, print a row for each compile and a summary; True when all is clean."""
    start = time.monotonic()
    users = distinct(named, archs)
    found: dict[int, list[Resources]] = {arch: [] for arch in archs}
    wrong = 0
    for (job, names), result in zip(
        users.items(), in_processes(compile_one, list(users), processes), strict=True
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


def parsed(arguments=None) -> argparse.Namespace:
    """The command line; ends with a sentence where it is wrong."""
    parser = argparse.ArgumentParser(description="compile every kernel for GPUs that are not here")
    parser.add_argument("--archs", "--arch", nargs="+", type=int, choices=sorted(SHARED_LIMITS))
    parser.add_argument(
        "--quick", action="store_true", help="compile only the usual configurations"
    )
    parser.add_argument(
        "--only", default="", help="compile only configurations whose name contains this"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--launches", default="benchmarks.launches", help="module of the launches")
    parser.add_argument("--cuda", nargs="*", type=Path, help="CUDA sources (all of csrc/cuda)")
    parser.add_argument(
        "--fill",
        type=Path,
        metavar="FOLDER",
        help="fill Triton's cache with the usual configurations and write it to a file in FOLDER",
    )
    parser.add_argument(
        "--from-launches",
        type=Path,
        metavar="FILE",
        help="fill with what benchmarks.stand_in --record wrote",
    )
    parser.add_argument(
        "--unpack", type=Path, metavar="FILE", help="add a file of --fill to this Triton's cache"
    )
    parser.add_argument(
        "--hits",
        action="store_true",
        help="launch the usual configurations without a GPU; fail unless the cache has them all",
    )
    options = parser.parse_args(arguments)
    if options.from_launches is not None and options.fill is None:
        parser.error("--from-launches needs --fill FOLDER")
    return options


def main(arguments=None) -> int:
    options = parsed(arguments)
    try:
        return _run(options)
    except (OSError, ValueError) as error:
        print(f"benchmarks.offline: {error}", file=sys.stderr)
        return 2


def _run(options) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError(
            "TRITON_INTERPRET is 1, but interpreted kernels cannot be compiled; unset it"
        )
    if options.unpack is not None or options.fill is not None or options.hits:
        return _filled(options)
    print(f"triton {triton.__version__}{machine_code.note(triton.__version__)}")
    archs = options.archs or sorted(SHARED_LIMITS)
    if options.cuda is not None:
        return 0 if _cuda(options.cuda, archs) else 1
    return 0 if gate(_chosen(options, options.quick), archs, options.jobs) else 1


def _chosen(options, quick):
    registered = importlib.import_module(options.launches).registered(quick)
    return ((name, launches) for name, launches in registered if options.only in name)


def _hits(options) -> int:
    from benchmarks import filled_cache, stand_in

    if options.unpack is None:
        print(filled_cache.told(filled_cache.identity()), flush=True)
    chosen = [each for _, launches in _chosen(options, True) for each in launches]
    for arch in options.archs or [90]:
        with stand_in.standing_in(arch) as standing:
            for launch in chosen:
                if launch.archs and arch not in launch.archs:
                    continue
                stand_in.make([launch])
                if standing.compiled or standing.notes.built:  # others would take as long
                    name = f"{launch.kernel.fn.__name__} for sm_{arch}"
                    raise ValueError(f"{name} is not in Triton's cache; fill one from this source")
        print(standing, flush=True)
    return 0


def _filled(options) -> int:
    from benchmarks import filled_cache

    if options.unpack is not None and (code := filled_cache.unpack(options.unpack)):
        return code
    if options.fill is None:
        return _hits(options) if options.hits else 0
    if options.from_launches is not None:
        jobs = filled_cache.read_jobs(options.from_launches)
    else:
        jobs = list(distinct(_chosen(options, quick=True), options.archs or [90]))
    if not jobs:
        raise ValueError("expected launches to compile, got none; see --only and --archs")
    return filled_cache.fill(jobs, options.fill, options.jobs)


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
