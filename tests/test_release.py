# SPDX-License-Identifier: Apache-2.0
"""What a user installs: source distribution and wheels, each in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from tests.source_trees import ROOT, copied_sources, leaked_paths, run_setup

FUSED = """
import torch, samfast
from samfast import backends
from samfast.models import build_sam, segment
sam = samfast.fuse(samfast.attach(build_sam("vit_tiny", image_size=64, seed=0), samfast.Lora()))
out = segment(sam, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
out.sum().backward()
print(tuple(out.shape), bool(out.isfinite().all()), "fused" in str(samfast.report(sam)))
print(samfast.__file__)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copied_sources(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    """The archive, made from a tree where something was built before."""
    (tree / "samfast" / "_build.json").write_text('{"build": "cpu", "reason": "of another tree"}')
    (tree / "samfast" / "_C.abi3.so").write_bytes(b"of another tree")
    out = tmp_path_factory.mktemp("sdist")
    done = run_setup(tree, "none", "sdist", "--dist-dir", str(out))
    assert done.returncode == 0, done.stderr
    (archive,) = out.glob("*.tar.gz")
    return archive


def test_the_source_distribution_has_all_that_a_build_reads(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    here = [p for p in ROOT.glob("csrc/**/*") if p.is_file()]
    here += [p for p in ROOT.glob("kernels/**/*") if p.suffix in (".py", ".json")]
    here += [p for p in ROOT.glob("samfast/**/*.py")]
    missing = {str(p.relative_to(ROOT)) for p in here if "__pycache__" not in p.parts} - names
    assert missing == set() and len(here) > 300
    assert {"setup.py", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"} <= names
    assert not {"samfast/_build.json", "samfast/_C.abi3.so"} & names


class Environment:
    """A virtual environment that finds this one's packages, pip too, but not this samfast.

    compilers: whether its programs find a compiler
    """

    def __init__(self, folder: Path, compilers: bool):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        place = sysconfig.get_path("purelib", vars={"base": str(folder)})
        # A line here adds the folder without its own .pth files, such as an editable samfast's.
        (Path(place) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        hidden = {"PATH": str(folder / "bin")}
        kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "PYTHONPATH")}
        self.variables = {**kept, **({} if compilers else hidden)}

    def run(self, *words: object) -> str:
        command = [str(self.folder / "bin" / str(words[0])), *map(str, words[1:])]
        done = subprocess.run(
            command, cwd=self.folder, env=self.variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def install(self, sdist: Path) -> Path:
        """Build a wheel from the source distribution, install it, and return it."""
        pip = ("python", "-m", "pip", "--disable-pip-version-check")
        out = self.folder / "wheels"
        offline = ("--no-index", "--no-deps")
        self.run(*pip, "wheel", *offline, "--no-build-isolation", "-w", out, sdist)
        (wheel,) = out.glob("*.whl")
        self.run(*pip, "install", *offline, "--ignore-installed", wheel)  # others has one, too
        return wheel

    def works(self) -> str:
        """What ``samfast info`` prints, after a fused forward and the help."""
        shape, where = self.run("python", "-c", FUSED).splitlines()
        assert shape == "(1, 1, 64, 64) True True"
        assert where.startswith(str(self.folder))
        assert "finetune" in self.run("samfast", "--help")
        return self.run("samfast", "info")


@pytest.mark.slow
def test_a_wheel_built_without_a_compiler_says_what_is_missing(sdist, tmp_path):
    environment = Environment(tmp_path / "venv", compilers=False)
    wheel = environment.install(sdist)
    assert leaked_paths(wheel, tmp_path) == []
    info = environment.works()
    sentence = "there is no C++ compiler 'c++' on PATH"
    assert f"build: none ({sentence})" in info
    assert f"not cpu: the native extension was not built ({sentence})" in info


@pytest.mark.slow
def test_a_wheel_built_with_a_compiler_loads(sdist, tmp_path):
    environment = Environment(tmp_path / "venv", compilers=True)
    environment.variables["SAMFAST_BUILD"] = "cpu"
    wheel = environment.install(sdist)
    assert "-cp310-abi3-" in wheel.name and leaked_paths(wheel, tmp_path) == []
    info = environment.works()
    assert "build: cpu (cpu was asked" in info and "native extension: loaded" in info
