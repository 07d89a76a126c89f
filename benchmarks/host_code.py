# SPDX-License-Identifier: Apache-2.0
"""What Triton compiles with a C compiler next to its kernels, built for a machine with a GPU.

That is ``cuda_utils`` and, in Triton 3.6, a launcher for each signature. Both link to libcuda.so.1,
which comes with the GPU's driver. The linker only wants a library of that name, so an empty one
serves. The results cannot be loaded without a driver, so nothing is loaded.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from triton.backends.nvidia import driver as nvidia
from triton.runtime import build

LIBRARY = "libcuda.so.1"
_BUILT = ("__triton_launcher", "cuda_utils")


@contextlib.contextmanager
def for_another_machine():
    """Build without a GPU's driver and load nothing; yields the names of what was compiled."""
    compiling, loading, built = build._build, build._load_module_from_path, []

    def compiled(name, source, folder, _, *more):
        _empty_library(Path(folder) / LIBRARY)
        built.append(name)
        return compiling(name, source, folder, [folder], *more)

    def loaded(name, path):
        return SimpleNamespace(launch=None) if name in _BUILT else loading(name, path)

    with (
        mock.patch.object(build, "_build", compiled),
        mock.patch.object(build, "_load_module_from_path", loaded),
        mock.patch.object(nvidia, "library_dirs", list),
    ):
        yield built


def build_utils() -> None:
    """cuda_utils, which Triton asks for when it first sees a GPU."""
    build.compile_module_from_src(
        src=(Path(nvidia.dirname) / "driver.c").read_text(),
        name="cuda_utils",
        include_dirs=nvidia.include_dirs,
        libraries=nvidia.libraries,
    )


def build_launcher(source, metadata) -> None:
    """The launcher of a compiled kernel; Triton 3.7 has one for all in cuda_utils."""
    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(source, metadata)


def _empty_library(path):
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError(
            "expected a C compiler, found neither gcc nor clang; install one or set CC"
        )
    command = [compiler, "-shared", "-x", "c", os.devnull, "-o", path, f"-Wl,-soname,{path.name}"]
    subprocess.run(command, check=True)
