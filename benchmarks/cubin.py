# SPDX-License-Identifier: Apache-2.0
"""What a compiled GPU kernel costs, read from its binary."""

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import triton

from benchmarks.machine_code import Code
from benchmarks.sass import Loop, instructions, loops

ROOT = Path(__file__).resolve().parents[1]
_TENSOR_CORES = (("UTCHMMA", "TCGEN"), ("HGMMA", "WGMMA"), ("HMMA", "HMMA"))
SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


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
    tensor_core: str  # the widest kind of _TENSOR_CORES in the machine code, or ""
    atomics: int  # atomic instructions on floats
    narrowed: bool = False  # float32 products made in TF32 that the source asks to be exact
    loops: tuple[Loop, ...] = ()
    instructions: int = 0
    code: Code | None = None  # of a kernel whose machine code has limits
    faults: tuple[str, ...] = ()  # of that code

    @property
    def clean(self) -> bool:
        """No spills, no float atomics, shared memory that fits, products as exact as asked, and
        machine code within its limits."""
        fits = self.shared <= SHARED_LIMITS[self.arch]
        spilled = self.spills or self.stack or self.local
        return fits and not (spilled or self.atomics or self.narrowed or self.faults)

    def __str__(self) -> str:
        return (
            f"registers {self.registers:3} stack {self.stack:3} spills {self.spills:3} "
            f"shared {self.shared:6} atomics {self.atomics} {self.tensor_core:5} "
            f"{'clean' if self.clean else 'NOT CLEAN'}{', TF32 unasked' if self.narrowed else ''}"
        )


def _tool(name):
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def read_cubin(path: Path, arch: int) -> list[Resources]:
    """Resources of every kernel in a cubin."""
    run = dict(capture_output=True, text=True, check=True)
    usage = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", path], **run).stdout
    command = [_tool("nvdisasm"), "--print-code", "--no-dataflow", path]
    sass = subprocess.run(command, **run).stdout
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
        tensor_core=next((name for code, name in _TENSOR_CORES if code in sass), ""),
        atomics=len(re.findall(atomics, sass)),
        loops=loops(sass),
        instructions=instructions(sass),
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
