# SPDX-License-Identifier: Apache-2.0
"""The only build logic: package layout and the optional native extension.

SAMFAST_BUILD=auto (default): CUDA where nvcc is found and torch is built for CUDA, C++ where a
compiler is, else pure Python; cuda, cpu or none: exactly that, and what cannot be is an error.

LibTorch's stable ABI only: one binary for every torch >= 2.10 and Python >= 3.10, CUDA sources
beside a CPU-only torch too. TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
WHEEL = {"bdist_wheel": {"py_limited_api": "cp310"}}
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def sources(folder, suffix):
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    return nvcc if nvcc and os.access(nvcc, os.X_OK) else None


def nvcc_version(nvcc):
    """Such as "nvcc 12.8", without its place on this machine."""
    if nvcc is None:
        return "no nvcc"
    says = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([0-9.]+)", says)
    return f"nvcc {found[1]}" if found else "nvcc of an unknown version"


def jobs():
    """How many compilers run at once."""
    wanted = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    if not re.fullmatch(r"0*[1-9][0-9]*", wanted):
        raise SystemExit(f"expected MAX_JOBS to be a whole number of at least 1, got {wanted!r}")
    return int(wanted)


def plan():
    """What to build, why in one sentence without a path, and torch's builder or None."""
    if int(setuptools.__version__.split(".")[0]) < 77:  # whose own sentence is about a licence
        raise SystemExit(f"samfast needs setuptools 77 or newer, this is {setuptools.__version__}")
    jobs()  # refuses what is not a number
    wanted, nvcc = os.environ.get("SAMFAST_BUILD", "auto"), find_nvcc()
    if wanted not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"SAMFAST_BUILD is {wanted!r}; it must be auto, cuda, cpu or none")
    if wanted == "none":
        return "none", "SAMFAST_BUILD=none", None
    problem, detail = None, ""
    try:
        from torch.utils import cpp_extension
        from torch.version import cuda
    except ImportError as error:
        problem = "torch must be installed first, then use --no-build-isolation"
        detail = f" ({error})"  # may name a path
    compiler = os.environ.get("CXX", "c++").split()[0]
    if problem is None and shutil.which(compiler) is None:
        problem = f"there is no C++ compiler {Path(compiler).name!r} on PATH"
        detail = f" (CXX is {compiler})" if Path(compiler).name != compiler else ""
    if problem is None and wanted == "cuda" and nvcc is None:
        problem = "there is no nvcc in CUDA_HOME or on PATH"
    if problem is not None:
        if wanted != "auto":
            raise SystemExit(f"SAMFAST_BUILD={wanted} cannot be built: {problem}{detail}")
        return "none", problem, None
    with_cuda = wanted == "cuda" or (wanted == "auto" and nvcc is not None and cuda is not None)
    torch_cuda = "torch is CPU-only" if cuda is None else f"torch is built for CUDA {cuda}"
    why = f"{wanted} was asked, {nvcc_version(nvcc)}, {torch_cuda}"
    return "cuda" if with_cuda else "cpu", why, cpp_extension


def shortened(include_dirs):
    """Flags that leave this machine's folders out of __FILE__, and so out of the binary."""
    return [f"-ffile-prefix-map={folder}=include" for folder in (ROOT, *include_dirs)]


def nvcc_objects(include_dirs):
    """Compile csrc/cuda/*.cu to objects; works beside a CPU-only torch."""
    flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler", "-fPIC"]
    flags += [f"-Xcompiler={flag}" for flag in shortened(include_dirs)]
    flags += [*STABLE_ABI, "-DUSE_CUDA", *(f"-I{d}" for d in include_dirs)]
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS).replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}", *([f"compute_{number}"] if "+PTX" in arch else [])]
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    Path("build").mkdir(exist_ok=True)
    objects = {source: f"build/{Path(source).stem}.cuda.o" for source in sources("cuda", ".cu")}
    commands = [[find_nvcc(), *flags, "-c", s, "-o", o] for s, o in objects.items()]
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(subprocess.check_call, commands))
    says = subprocess.run([find_nvcc(), "-dryrun", "x.cu"], capture_output=True, text=True).stderr
    (top,) = (row.removeprefix("#$ TOP=") for row in says.splitlines() if row.startswith("#$ TOP="))
    runtime = sorted(str(p) for p in Path(top).glob("lib*/libcudart_static.a"))
    return [*objects.values(), *runtime[:1]]


def native_build(kind, cpp_extension):
    """The extension and the command that builds it, as arguments of setup()."""
    # Python's own flags ask for debug information, a quarter of the compiler's time.
    flags = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", *STABLE_ABI]
    include_dirs = [str(ROOT / "csrc"), *cpp_extension.include_paths()]
    flags += shortened(include_dirs)
    extension = setuptools.Extension(
        "samfast._C",
        sources=sources(".", ".cpp") + sources("cpu", ".cpp"),
        include_dirs=include_dirs,
        library_dirs=cpp_extension.library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args=flags + (["-DUSE_CUDA"] if kind == "cuda" else []),
        py_limited_api=True,
    )

    class BuildExt(cpp_extension.BuildExtension):
        def build_extensions(self):
            if kind == "cuda":
                extension.extra_objects = nvcc_objects(extension.include_dirs)
            super().build_extensions()

    cmdclass = {"build_ext": BuildExt.with_options(use_ninja=bool(shutil.which("ninja")))}
    return {"ext_modules": [extension], "cmdclass": cmdclass, "options": WHEEL}


kind, reason, builder = plan()
building = {"build_ext", "build_py", "bdist_wheel", "editable_wheel"} & set(sys.argv)
if building:  # for samfast info
    (ROOT / "samfast/_build.json").write_text(json.dumps({"build": kind, "reason": reason}) + "\n")
record = ["_build.json"] if building or "sdist" not in sys.argv else []  # sources are not built
folders = [p.parent.name for p in (ROOT / "kernels").glob("*/__init__.py")]
operations = {f"samfast.kernels.{name}": f"kernels/{name}" for name in sorted(folders)}
setuptools.setup(
    packages=[*setuptools.find_packages(include=["samfast", "samfast.*"]), *operations],
    package_dir={"": ".", **operations},
    package_data={"samfast": record, **{name: ["*.json"] for name in operations}},
    **(native_build(kind, builder) if builder else {}),
)
