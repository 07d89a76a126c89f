# SPDX-License-Identifier: Apache-2.0
"""What gets installed, what `import samfast` loads, and what SAMFAST_BUILD decides."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import test_types

from samfast.kernels import operations
from tests.source_trees import copied_sources, leaked_paths, run_setup

ROOT = Path(__file__).parents[1]
HEAVY = ("triton", "transformers", "torchvision", "segment_anything", "peft", "accelerate")


def python(code, cwd, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    return copied_sources(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def pure_wheel(source_tree, tmp_path_factory):
    """A wheel built with SAMFAST_BUILD=none, and the folder it is unpacked to."""
    out = tmp_path_factory.mktemp("wheel")
    done = run_setup(source_tree, "none", "bdist_wheel", "--dist-dir", str(out))
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return wheel, out / "site"


def test_wheel_content(pure_wheel):
    names = zipfile.ZipFile(pure_wheel[0]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"samfast"}
    for expected in (
        "samfast/__init__.py",
        "samfast/__init__.pyi",
        "samfast/_build.json",
        "samfast/py.typed",
        "samfast/kernels/__init__.py",
        "samfast/kernels/lora_linear/op.py",
        "samfast/kernels/lora_linear/tiles.json",
        "samfast/kernels/_common/philox.py",
    ):
        assert expected in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_no_file_of_a_wheel_names_a_folder_of_the_build(pure_wheel, source_tree):
    assert leaked_paths(pure_wheel[0], source_tree) == []


def test_max_jobs_that_is_not_a_number_is_one_sentence(source_tree):
    for value in ("x", "0", "-2", "1.5", ""):
        done = run_setup(source_tree, "none", "--version", MAX_JOBS=value)
        sentence = f"expected MAX_JOBS to be a whole number of at least 1, got {value!r}"
        assert (done.returncode, done.stderr.strip()) == (1, sentence)


def test_a_wheel_finds_the_operations_of_the_checkout(pure_wheel, tmp_path):
    code = "from samfast.kernels import operations; print(*operations('example.py'))"
    found = python(code, tmp_path, PYTHONPATH=str(pure_wheel[1])).split()
    assert found == list(operations("example.py")) and "lora_linear" in found


@pytest.mark.slow
def test_a_users_strict_mypy_sees_the_types(pure_wheel, tmp_path):
    """Half a minute, most of it for torch."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "user.py").write_text(test_types.USER)
    paths = filter(None, (str(pure_wheel[1]), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "user.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    assert test_types.told(done.stdout) == test_types.expected(), done.stdout


@pytest.mark.slow_on_cpu
def test_a_wheel_works_elsewhere_without_an_extension(pure_wheel, tmp_path):
    code = """
import torch, samfast.kernels.lora_linear.op as op
from samfast import backends
from samfast.functional import lora_linear
x = torch.randn(5, 8, requires_grad=True)
lora_linear(x, torch.randn(6, 8), None, torch.randn(2, 8), torch.randn(6, 2), 1.0).sum().backward()
print(op.__file__)
print(backends.native_missing())
"""
    where, why = python(code, tmp_path, PYTHONPATH=str(pure_wheel[1])).splitlines()
    assert where.startswith(str(pure_wheel[1]))
    assert why == "the native extension was not built (SAMFAST_BUILD=none)"


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_imports_of_this_installation(where, tmp_path):
    cwd = ROOT if where == "checkout" else tmp_path
    path = {} if where == "checkout" else {"PYTHONPATH": str(ROOT)}
    code = "import samfast.kernels.lora_linear.op as op; print(op.__file__)"
    assert python(code, cwd, **path) == str(ROOT / "kernels" / "lora_linear" / "op.py")


@pytest.mark.slow_on_cpu
def test_an_editable_installation_works_elsewhere(tmp_path):
    try:
        installed = importlib.metadata.distribution("samfast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("samfast is not installed here, the tests run from the sources")
    if '"editable": true' not in (installed.read_text("direct_url.json") or ""):
        pytest.skip("samfast is installed, but not as an editable checkout")
    code = "import samfast.kernels.lora_linear.op as op; print(op.__file__)"
    assert python(code, tmp_path) == str(ROOT / "kernels" / "lora_linear" / "op.py")


@pytest.mark.slow_on_cpu
def test_a_wheel_from_the_checkout_root(pure_wheel):
    """The sources win there, as for every package that stands in the current folder."""
    code = "import samfast.kernels.lora_linear.op as op, transformers; print(op.__file__)"
    code = f"import samfast.integrations.torchvision as t; t.declare_missing_schemas(); {code}"
    expected = str(ROOT / "kernels" / "lora_linear" / "op.py")
    assert python(code, ROOT, PYTHONPATH=str(pure_wheel[1])) == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_wheel_with_the_extension(source_tree, tmp_path):
    """One binary for every Python from 3.10: the wheel's tag says so, and it loads."""
    done = run_setup(source_tree, "cpu", "bdist_wheel", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from samfast import backends; print(backends.native_missing())"
    assert python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")) == "None"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_cuda_sources_build_and_load_beside_any_torch(source_tree):
    """Also beside a CPU-only torch, whose library has no stream to ask for."""
    done = run_setup(source_tree, "cuda", "build_ext", "--inplace", TORCH_CUDA_ARCH_LIST="8.6")
    assert done.returncode == 0, done.stderr
    code = """
import torch
from samfast import backends
print(backends.native_missing(), backends.build_record()["build"])
name = "samfast_native::conv_experts_forward"
print(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))
"""
    printed = python(code, source_tree, PYTHONPATH=str(source_tree)).split()
    assert printed == ["None", "cuda", "True"]


@pytest.mark.slow
def test_the_suite_without_the_extension(source_tree, tmp_path):
    """What needs no extension passes from a tree where none was built."""
    tree = tmp_path / "tree"
    shutil.copytree(
        source_tree, tree, ignore=shutil.ignore_patterns("build", "*.so", "_build.json")
    )
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "benchmarks", tree / "benchmarks")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not (slow or slow_on_cpu)"]
    command += ["tests/kernels", "tests/modules", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "the native extension was not built" in done.stdout


def test_import_is_light():
    code = f"""
import sys, samfast, samfast.functional, samfast.modules
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert python(code, ROOT) == "[]"


@pytest.mark.slow_on_cpu
def test_transformers_imports_from_the_checkout_root():
    code = """
from samfast.integrations.torchvision import declare_missing_schemas
declare_missing_schemas()
from transformers import SamModel
print(SamModel.__name__)
"""
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert python(code, ROOT) == "SamModel"


def test_every_public_name_resolves():
    import samfast

    missing = [name for name in samfast.__all__ if getattr(samfast, name, None) is None]
    assert missing == []


def test_an_unknown_build_is_refused(source_tree):
    done = run_setup(source_tree, "metal", "--version")
    assert done.returncode != 0
    assert "SAMFAST_BUILD is 'metal'; it must be auto, cuda, cpu or none" in done.stderr


def test_an_old_setuptools_is_refused(source_tree, tmp_path):
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\n")
    done = run_setup(source_tree, "none", "--version", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "samfast needs setuptools 77 or newer, this is 65.5.0" in done.stderr


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    ("build", "environment", "sentence"),
    [
        ("cuda", {"CUDA_HOME": "/nowhere"}, "there is no nvcc in CUDA_HOME or on PATH"),
        ("cpu", {"CXX": "no-such-compiler"}, "there is no C++ compiler 'no-such-compiler' on PATH"),
    ],
)
def test_a_build_asked_for_by_name_must_be_possible(source_tree, build, environment, sentence):
    if build == "cuda" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler, which is refused before nvcc is looked for")
    done = run_setup(source_tree, build, "--version", **environment)
    assert done.returncode != 0
    assert f"SAMFAST_BUILD={build} cannot be built: {sentence}" in done.stderr


@pytest.mark.slow_on_cpu
def test_auto_without_a_compiler_builds_pure_python_and_says_so(source_tree):
    record = source_tree / "samfast" / "_build.json"
    before = record.read_text() if record.exists() else None
    done = run_setup(source_tree, "auto", "--version", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert before == (record.read_text() if record.exists() else None)  # nothing was built
    done = run_setup(source_tree, "auto", "build_py", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert '"build": "none"' in record.read_text() and "no-such-compiler" in record.read_text()


@pytest.mark.slow_on_cpu
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_record_of_a_build_has_versions_and_no_path(source_tree, tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    for variables, expected in (
        ({"CUDA_HOME": str(tmp_path)}, "nvcc 12.8, torch is "),
        ({"CXX": str(tmp_path / "g++")}, "there is no C++ compiler 'g++' on PATH"),
    ):
        done = run_setup(source_tree, "auto", "build_py", **variables)
        assert done.returncode == 0, done.stderr
        reason = json.loads((source_tree / "samfast" / "_build.json").read_text())["reason"]
        assert expected in reason and "/" not in reason
