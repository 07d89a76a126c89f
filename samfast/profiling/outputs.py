# SPDX-License-Identifier: Apache-2.0
"""The files of a profile: tried before it runs, written whole after it."""

import importlib.util
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from samfast.files.temporary import temporary_file


def check_outputs(paths: Iterable[Path | None], drawn: bool, script: Path | None = None) -> None:
    """Raise ValueError for a file that cannot be written, is given twice, or is the script.

    drawn: True if one of them has drawings, which need matplotlib
    """
    seen: set[Path] = set()
    for path in filter(None, paths):
        if script is not None and path.resolve() == script.resolve():
            raise ValueError(f"{path} is the profiled script; give another file")
        if path.resolve() in seen:
            raise ValueError(f"{path} is given for two outputs; give each its own file")
        seen.add(path.resolve())
        check_output(path)
    if drawn and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


def check_output(path: Path) -> None:
    """Raise ValueError for a file that cannot be written; leave nothing behind."""
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file to write")
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: the folder {path.parent} does not exist")
        with temporary_file(path):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error})") from error


def trace_bytes(profiler: Any) -> bytes:
    """The events as chrome://tracing and Perfetto read them."""
    with tempfile.TemporaryDirectory() as folder:
        place = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(place)
        return Path(place).read_bytes()
