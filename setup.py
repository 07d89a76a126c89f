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
    """What to build, why in one sentence, and torch's builder or None."""
    wanted = os.environ.get("SAMFAST_BUILD", "auto")
    if wanted not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"SAMFAST_BUILD is {wanted!r}; it must be auto, cuda, cpu or none")
    if wanted == "none":
        return "none", "SAMFAST_BUILD=none", None
    cpp_extension, problem = None, None
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        problem = f"torch must be installed first, then use --no-build-isolation ({error})"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if problem is None and shutil.which(compiler) is None:
        problem = f"there is no C++ compiler {compiler!r} on PATH"
    nvcc = find_nvcc()
    if problem is None and wanted == "cuda" and nvcc is None:
        problem = "there is no nvcc in CUDA_HOME or on PATH"
    if problem is not None and wanted != "auto":
        raise SystemExit(f"SAMFAST_BUILD={wanted} cannot be built: {problem}")
    if problem is not None:
        return "none", problem, None
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
    Path("build").mkdir(exist_ok=True)
    objects = {source: f"build/{Path(source).stem}.cuda.o" for source in sources("cuda", ".cu")}
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        commands = ([find_nvcc(), *flags, "-c", s, "-o", o] for s, o in objects.items())
        list(pool.map(subprocess.check_call, commands))
    says = subprocess.run([find_nvcc(), "-dryrun", "x.cu"], capture_output=True, text=True).stderr
    (top,) = (row.removeprefix("#$ TOP=") for row in says.splitlines() if row.startswith("#$ TOP="))
    runtime = sorted(str(p) for p in Path(top).glob("lib*/libcudart_static.a"))
    return [*objects.values(), *runtime[:1]]


def native_build(kind, cpp_extension):
    """The extension and the command that builds it, as arguments of setup()."""
    define = ["-DUSE_CUDA"] if kind == "cuda" and sources("cuda", ".cu") else []
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", STABLE_ABI, "-DPy_LIMITED_API=0x030A0000"]
    extension = Extension(
        "samfast._C",
        sources=sources(".", ".cpp") + sources("cpu", ".cpp"),
        include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args=flags + define,
        py_limited_api=True,
        language="c++",
    )

    class BuildExt(cpp_extension.BuildExtension):
        def build_extensions(self):
            if define:
                extension.extra_objects = nvcc_objects(extension.include_dirs)
            super().build_extensions()

    build_ext = BuildExt.with_options(use_ninja=shutil.which("ninja") is not None)
    limited = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_ext}, "options": limited}


kind, reason, builder = plan()
record = json.dumps({"build": kind, "reason": reason})
(ROOT / "samfast" / "_build.json").write_text(record + "\n", encoding="utf-8")
operations = {f"samfast.kernels.{p.parent.name}": f"kernels/{p.parent.name}"
              for p in (ROOT / "kernels").glob("*/__init__.py")}  # fmt: skip
setup(
    packages=[*find_packages(include=["samfast", "samfast.*"]), *sorted(operations)],
    package_dir={"": ".", **operations},
    package_data={"samfast": ["_build.json"], **{name: ["*.json"] for name in operations}},
    **(native_build(kind, builder) if builder else {}),
)
