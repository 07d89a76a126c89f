# SPDX-License-Identifier: Apache-2.0
"""The only build logic: package layout and the optional native extension.

SAMFAST_BUILD=auto  CUDA where nvcc is found, C++ where a compiler is, else pure Python (default)
SAMFAST_BUILD=cuda | cpu | none  exactly that; what cannot be built is an error

The extension uses LibTorch's stable ABI only, so one binary serves every torch >= 2.10 and
Python >= 3.10, and CUDA sources build beside a CPU-only torch. TORCH_CUDA_ARCH_LIST and MAX_JOBS
are honoured.
"""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def sources(folder, suffix):
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    return nvcc if nvcc and os.access(nvcc, os.X_OK) else None


def plan():
    """What to build, and why in one sentence: (kind, reason, torch.utils.cpp_extension or None)."""
    wanted = os.environ.get("SAMFAST_BUILD", "auto")
    if wanted not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"SAMFAST_BUILD is {wanted!r}; it must be auto, cuda, cpu or none")
    if wanted == "none":
        return "none", "SAMFAST_BUILD=none", None
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        reason = f"torch cannot be imported while building ({error}); install it first and use "
        reason += "--no-build-isolation"
        cpp_extension = None
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if cpp_extension is not None and compiler is None:
        reason = "no C++ compiler was found"
    missing = cpp_extension is None or compiler is None
    if missing and wanted != "auto":
        raise SystemExit(f"SAMFAST_BUILD={wanted} cannot be built: {reason}")
    if missing:
        return "none", reason, None
    nvcc = find_nvcc()
    if wanted == "cuda" and nvcc is None:
        raise SystemExit("SAMFAST_BUILD=cuda cannot be built: no nvcc in CUDA_HOME or on PATH")
    if wanted == "cpu" or nvcc is None:
        return "cpu", "SAMFAST_BUILD=cpu" if wanted == "cpu" else "no nvcc was found", cpp_extension
    return "cuda", f"nvcc is {nvcc}", cpp_extension


def nvcc_objects(include_dirs):
    """Compile csrc/cuda/*.cu to objects; works beside a CPU-only torch."""
    flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler", "-fPIC"]
    flags += [STABLE_ABI, "-DUSE_CUDA", *(f"-I{d}" for d in include_dirs)]
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS).replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    objects = []
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for source in sources("cuda", ".cu"):
            objects.append(f"build/{Path(source).stem}.cuda.o")
            Path("build").mkdir(exist_ok=True)
            command = [find_nvcc(), *flags, "-c", source, "-o", objects[-1]]
            pool.submit(subprocess.check_call, command).add_done_callback(lambda f: f.result())
    return objects


def extension(kind, cpp_extension):
    include_dirs = [str(ROOT / "csrc"), *cpp_extension.include_paths()]
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", STABLE_ABI, "-DPy_LIMITED_API=0x030A0000"]
    libraries = ["c10", "torch", "torch_cpu"]
    objects = []
    if kind == "cuda" and sources("cuda", ".cu"):
        flags.append("-DUSE_CUDA")
        objects = nvcc_objects(include_dirs)
        libraries.append("cudart")
    return Extension(
        "samfast._C",
        sources=sources(".", ".cpp") + sources("cpu", ".cpp"),
        include_dirs=include_dirs,
        library_dirs=cpp_extension.library_paths(),
        libraries=libraries,
        extra_compile_args=flags,
        extra_objects=objects,
        py_limited_api=True,
        language="c++",
    )


kind, reason, cpp_extension = plan()
record = {"build": kind, "reason": reason}
(ROOT / "samfast" / "_build.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
operations = {
    f"samfast.kernels.{p.parent.name}": str(p.parent.relative_to(ROOT))
    for p in sorted((ROOT / "kernels").glob("*/__init__.py"))
}
native = {}
if cpp_extension is not None:
    native["ext_modules"] = [extension(kind, cpp_extension)]
    native["cmdclass"] = {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)}
    native["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
setup(
    packages=[*find_packages(include=["samfast", "samfast.*"]), *operations],
    package_dir={"": ".", **operations},
    package_data={"samfast": ["_build.json"], **{name: ["*.json"] for name in operations}},
    **native,
)
