# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA's driver, where there is none: launches go all their way but the last step.

Inside ``standing_in()`` kernels launch on CPU tensors as on a GPU. Triton finds the types, makes
the key, compiles or reads its cache, and asks for device and stream. Only the load and the launch
are stand-ins, so results are zeros. Every launch is recorded and checked against CUDA's rules.
With ``compiles=False`` nothing is compiled. Import kernels without TRITON_INTERPRET.

``python -m benchmarks.stand_in [options] -- -m module arguments`` runs a program so.
"""

import argparse
import contextlib
import dataclasses
import os
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import LazyDict
from triton.runtime import driver as drivers
from triton.runtime.jit import JITFunction

from benchmarks import filled_cache, host_code
from benchmarks.cubin import SHARED_LIMITS
from benchmarks.launch_rules import MOST_THREADS, BrokenRule, problem
from benchmarks.offline import Compile, Launch
from samfast import backends
from samfast.kernels._common import launch_plan, planned, tiles
from samfast.kernels.conv_experts import op as conv_experts
from samfast.kernels.relpos_attention import tiling

DEVICES = {80: "NVIDIA A100-SXM4-80GB", 86: "NVIDIA RTX A6000", 89: "NVIDIA L40S",
           90: "NVIDIA H200", 100: "NVIDIA B200", 120: "NVIDIA RTX PRO 6000"}  # fmt: skip
PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}
INTERPRETED = "TRITON_INTERPRET is 1, but interpreted kernels launch nothing; unset it"
MEMORY, DISK, COMPILED, NOT_COMPILED = "memory", "disk", "compiled", "not compiled"


@dataclasses.dataclass(frozen=True)
class Launched:
    """One launch. shared: bytes, None where nothing is compiled; found: where its code came from"""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    shared: int | None
    stream: int
    found: str


@dataclasses.dataclass
class StandIn:
    """What happened inside. jobs: every compile, once; allocated: bytes; broken: refused launches;
    notes: what became of Triton's cache"""

    arch: int = 90
    compiles: bool = True
    checks: bool = True
    stream: int = 0  # the current one, as a driver's handle
    launches: list[Launched] = dataclasses.field(default_factory=list)
    jobs: dict[str, Compile] = dataclasses.field(default_factory=dict)
    allocations: int = 0
    allocated: int = 0
    broken: list[str] = dataclasses.field(default_factory=list)
    notes: filled_cache.Notes = dataclasses.field(default_factory=filled_cache.Notes)

    @property
    def counts(self) -> Counter:
        """Launches by kernel."""
        return Counter(launch.kernel for launch in self.launches)

    @property
    def hits(self) -> int:
        """Kernels that were read from Triton's cache."""
        return sum(launch.found == DISK for launch in self.launches)

    @property
    def compiled(self) -> int:
        """Kernels that had to be compiled."""
        return sum(launch.found == COMPILED for launch in self.launches)

    def __str__(self) -> str:
        streams = sorted({launch.stream for launch in self.launches})
        found = f"{self.hits} hits, {self.compiled} compiles, {len(self.notes.built)} C compiles"
        return (
            f"sm_{self.arch}: {len(self.launches)} launches of {len(self.counts)} kernels in "
            f"{len(self.jobs)} forms; {found if self.compiles else NOT_COMPILED}; "
            f"{self.allocations} allocations of {self.allocated / 2**20:.1f} MiB; streams {streams}"
        )


current: StandIn | None = None


@contextlib.contextmanager
def standing_in(arch: int = 90, compiles: bool = True, checks: bool = True):
    """Make launches here as a GPU of this target would; yields the StandIn, which records them.

    checks: of CUDA's rules; without them a launch costs next to nothing, and is counted

    Raises ValueError for a target that is not known, RuntimeError where kernels are interpreted or
    another stand-in is active. Launches inside raise BrokenRule.
    """
    global current
    if arch not in SHARED_LIMITS:
        raise ValueError(f"expected a target of {sorted(SHARED_LIMITS)}, got {arch}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError(INTERPRETED)
    if current is not None:
        raise RuntimeError("a stand-in is active already; leave it before entering another")
    stand_in = StandIn(arch, compiles, checks)
    driver = _Driver(stand_in)
    before = drivers._active
    with contextlib.ExitStack() as stack:
        stack.callback(driver.forget)
        stack.callback(drivers.set_active, before)
        drivers.set_active(driver)
        zeroed = _allocations(stand_in) if checks else ()
        for patch in (*_samfast(arch), *zeroed, driver.compiling()):
            stack.enter_context(patch)
        if compiles:
            stand_in.notes = stack.enter_context(filled_cache.noting())
            host_code.build_utils()
        planned.clear()
        current = stand_in
        stack.callback(_leave)
        yield stand_in


def make(launches: Iterable[Launch]) -> None:
    """Make recorded launches, inside a stand-in."""
    for launch in launches:
        launch.kernel.run(**launch.arguments, **launch.options, grid=launch.grid, warmup=False)


def _leave():
    global current
    current = None
    planned.clear()


def _samfast(arch):
    """CPU tensors count as those of this GPU; native CUDA code cannot run on them."""
    name = f"sm_{arch}"
    return (
        mock.patch.object(backends, "triton_missing", lambda device: backends._triton_absent()),
        mock.patch.object(backends, "LADDER_CPU", ("triton", "torch")),
        mock.patch.object(tiling, "target", lambda x: name),
        mock.patch.object(conv_experts, "check_index", lambda index, experts: None),
        mock.patch.object(tiles, "_device_name", lambda device: DEVICES[arch]),
    )


def _allocations(stand_in):
    """Count new memory, and zero it: no kernel writes it, and an index in it must be in range."""

    def zeroed(allocate):
        def call(*args, **kwargs):
            made = allocate(*args, **kwargs)
            stand_in.allocations += 1
            stand_in.allocated += made.numel() * made.element_size()
            with torch.no_grad(), _disable_current_modes():  # no part of what a counter sees
                made.zero_()
            return made

        return call

    names = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"))
    names = (*names, (torch.Tensor, "new_empty"))
    patches = [mock.patch.object(at, name, zeroed(getattr(at, name))) for at, name in names]
    return [*patches, mock.patch.object(launch_plan, "zeroed", True)]


class _Driver:
    """What Triton asks of its active driver."""

    def __init__(self, stand_in: StandIn):
        self.stand_in, self.found = stand_in, None
        self.device = _Device()  # a key of its own in Triton's tables, apart from a real device's
        self.seen: set[JITFunction] = set()
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, MOST_THREADS),
            get_device_properties=lambda device: _properties(stand_in.arch),
            unload_module=lambda module: None,
        )
        self.launcher_cls = lambda source, metadata: _Launcher(self, source, metadata)

    def get_current_target(self):
        return GPUTarget("cuda", self.stand_in.arch, 32)

    def get_current_device(self):
        return self.device

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return self.stand_in.stream

    def get_device_capability(self, device=None):
        return divmod(self.stand_in.arch, 10)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind):
        return nvidia.ty_to_cpp(kind)

    def compiling(self):
        """A patch of JITFunction: note every compile, and replace it where nothing is compiled."""
        compiling, driver, stand_in = JITFunction._do_compile, self, self.stand_in

        def compile_or_not(
            self, key, signature, device, constants, options, attributes, warmup, **more
        ):
            packed = (options, signature, constants, attributes)
            job = Compile.packed(self, stand_in.arch, *packed)
            stand_in.jobs.setdefault(repr(job), job)
            driver.seen.add(self)
            if stand_in.compiles:
                kernel = compiling(
                    self, key, signature, device, constants, options, attributes, warmup, **more
                )
                driver.found = DISK if stand_in.notes.found else COMPILED
                return kernel
            kernel = _NotCompiled(driver, self, *packed)
            self.device_caches[device][0][key] = kernel
            driver.found = NOT_COMPILED
            return kernel

        return mock.patch.object(JITFunction, "_do_compile", compile_or_not)

    def forget(self):
        """Nothing of the stand-in stays in Triton's tables."""
        for kernel in self.seen:
            kernel.device_caches.pop(self.device, None)


class _Device:
    pass


def _properties(arch):
    return {
        "max_shared_mem": SHARED_LIMITS[arch],
        "max_num_regs": 65_536,
        "multiprocessor_count": PROCESSORS[arch],
        "warpSize": 32,
        "sm_clock_rate": 1_755_000,
        "mem_clock_rate": 2_619_000,
        "mem_bus_width": 5120,
    }


class _NotCompiled:
    """In place of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, driver, kernel, options, signature, constants, attributes):
        metadata = SimpleNamespace(
            name=kernel.fn.__name__, num_warps=options.num_warps, shared=None
        )
        source = SimpleNamespace(signature=signature, constants=constants, attrs=attributes)
        self.run = _Launcher(driver, source, metadata)
        self.kernel, self.metadata = kernel, metadata

    def launch_metadata(self, grid, stream, *arguments):
        """For a profiler's hooks, which call its get()."""
        handed = LazyDict({"name": self.metadata.name, "function": None, "stream": stream})
        if self.kernel.launch_metadata is not None:
            named = dict(zip(self.kernel.arg_names, arguments, strict=True))
            handed.add(self.kernel.launch_metadata, (grid, self.metadata, named))
        return handed


class _Launcher:
    """Takes the place of the launch; one for each compiled kernel."""

    def __init__(self, driver, source, metadata):
        self.driver, self.source, self.metadata = driver, source, metadata
        if driver.stand_in.compiles:
            host_code.build_launcher(source, metadata)

    def __call__(
        self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments
    ):
        stand_in, grid = self.driver.stand_in, (x, y, z)
        if not stand_in.checks:
            stand_in.launches.append(self.metadata.name)
            return
        found, self.driver.found = self.driver.found, None
        launch = Launched(
            self.metadata.name, grid, self.metadata.num_warps, self.metadata.shared, stream,
            found or MEMORY,
        )  # fmt: skip
        sentence = problem(self.source, self.metadata, grid, arguments, stand_in.arch)
        if sentence is not None:
            stand_in.broken.append(f"{launch.kernel}: {sentence}")
            raise BrokenRule(stand_in.broken[-1])
        for hook in (enter, leave):
            if hook is not None:
                hook(launch_metadata)
        stand_in.launches.append(launch)


def parsed(arguments=None) -> argparse.Namespace:
    """The command line; program: what follows --. Ends with a sentence where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stand_in",
        description="Run a program as if a GPU were here: its kernels launch and do nothing. "
        "Ends with 0 where something was launched and no rule of CUDA's was broken.",
        usage="%(prog)s [options] -- (-m module | file) [arguments]",
    )
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_LIMITS))
    parser.add_argument("--compile", action="store_true", help="compile into Triton's cache")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write what was launched, for benchmarks.offline --fill FOLDER --from-launches FILE",
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    place = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:place])
    options.program = program = arguments[place + 1 :]
    if not program or program == ["-m"]:
        parser.error("expected a program after --, such as -- -m pytest tests/gpu")
    if program[0] != "-m" and not Path(program[0]).is_file():
        parser.error(f"expected -m module or a file after --, got {program[0]}")
    return options


def main(arguments=None) -> int:
    from benchmarks import stand_in_cuda

    options = parsed(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(f"benchmarks.stand_in: {INTERPRETED}", file=sys.stderr)
        return 2
    with stand_in_cuda.standing_in(options.arch, options.compile) as standing:
        code = _run(options.program)
    print(f"{standing}; the program ended with {code}")
    for sentence in dict.fromkeys(standing.broken):
        print(f"BROKEN {sentence}")
    if options.record is not None:
        filled_cache.write_jobs(standing.jobs.values(), options.record)
    return 0 if standing.launches and not standing.broken else 1


def _run(program) -> object:
    """Run a module or a file as python does; what it exits with."""
    module = program[1] if program[0] == "-m" else None
    with mock.patch.object(sys, "argv", program[module is not None :]):
        try:
            if module is None:
                runpy.run_path(program[0], run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code or 0
        except Exception:  # of any program: its traceback is printed, and 1 says that it failed
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    from benchmarks import stand_in  # the module under its own name, as others know it

    raise SystemExit(stand_in.main())
