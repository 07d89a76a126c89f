# SPDX-License-Identifier: Apache-2.0
"""Kernels without the barrier that orders a program's own reads and writes of global memory.

No sanitizer sees that hazard: compute-sanitizer's racecheck looks at shared memory only. What would
see it is the same call again and again, its scratch memory poisoned, until a bit differs.

python -m gpu.planted, in tests/, compiles every one for sm_90.
"""

import contextlib
import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

BARRIER = "tl.debug_barrier()"
# operation, and what it has two of: (module of the kernel, kernel, barriers it has)
PLANTS = {
    "relpos_attention": ("triton_backward", "dq_kernel", 2),
    "sam_block": ("triton_norm", "norm_backward_kernel", 1),
    "sam_block_rows": ("triton_rows", "norm_row_backward_kernel", 1),
    "conv_experts": ("triton_kernels", "backward_kernel", 1),
}


def folder_of(operation: str) -> str:
    """The folder in kernels/."""
    return operation.removesuffix("_rows")


def sources(operation: str) -> tuple[str, str]:
    """The module's text, and the same without its barriers."""
    file, _, _ = PLANTS[operation]
    spec = importlib.util.find_spec(f"samfast.kernels.{folder_of(operation)}.{file}")
    text = Path(spec.origin).read_text(encoding="utf-8")
    kept = [line for line in text.splitlines(keepends=True) if BARRIER not in line]
    return text, "".join(kept)


def variant(operation: str, folder: Path) -> ModuleType:
    """The module without its barriers, from a file of its own in ``folder``."""
    name = f"planted_{operation}"
    path = folder / f"{name}.py"
    path.write_text(sources(operation)[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def planted(operation: str, folder: Path):
    """The operation's launchers launch the kernel without its barriers."""
    kernel = PLANTS[operation][1]
    launchers = importlib.import_module(f"samfast.kernels.{folder_of(operation)}.triton_kernels")
    right = getattr(launchers, kernel)
    setattr(launchers, kernel, getattr(variant(operation, folder), kernel))
    try:
        yield
    finally:
        setattr(launchers, kernel, right)


def main() -> int:
    """Compile one use of every variant for sm_90; returns 1 where one is refused or not used."""
    from benchmarks import launches
    from benchmarks.offline import Compile, compile_one

    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for operation in PLANTS:
            with planted(operation, Path(folder)):
                named = launches.of(folder_of(operation))(True)
                recorded = [one for _, some in named for one in some]
            jobs = [Compile.of(one, 90) for one in recorded]
            jobs = [job for job in jobs if job.module == f"planted_{operation}"]
            wrong += not jobs
            for job in jobs[:1]:
                result = compile_one(job)
                wrong += isinstance(result, str)
                print(f"{job.module} {job.kernel} {result}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
