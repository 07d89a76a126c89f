# SPDX-License-Identifier: Apache-2.0
"""Copies of the sources to build from, and what of this machine a wheel of them names."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FOLDERS = ("samfast", "kernels", "csrc")
_FILES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "CITATION.cff",
    "SECURITY.md",
    "constraints.txt",
)


def copied_sources(tree: Path) -> Path:
    """A copy of the sources, so that building leaves this checkout alone."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in _FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in _FILES:
        shutil.copy(ROOT / name, tree / name)
    return tree


def run_setup(tree, build, *arguments, **environment):
    environment = {**os.environ, "SAMFAST_BUILD": build, **environment}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def leaked_paths(wheel: Path, *folders: Path) -> list[str]:
    """Each (file: folder) of a wheel that names a folder of this machine: of the build, the
    checkout, the environment, the home or temporary files."""
    own = (ROOT, Path.home(), tempfile.gettempdir(), sysconfig.get_path("purelib"), sys.prefix)
    private = {os.path.realpath(folder) for folder in (*own, *folders)} - {"/"}
    private |= {str(folder) for folder in (*own, *folders)}
    with zipfile.ZipFile(wheel) as archive:
        return [
            f"{name}: {folder}"
            for name in archive.namelist()
            for folder in sorted(private)
            if f"{folder}/".encode() in archive.read(name)
        ]
