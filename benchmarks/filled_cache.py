# SPDX-License-Identifier: Apache-2.0
"""Triton's cache, filled on a machine without a GPU and carried to one that has it.

The entries have the keys that a launch looks for. They count only for the same Triton, Python minor
version and processor, and at the same TRITON_CACHE_DIR, because entries hold absolute paths. The
file says for which, and ``unpack`` refuses another place.
"""

import ast
import contextlib
import dataclasses
import hashlib
import io
import json
import lzma
import os
import platform
import re
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

import triton
from triton.errors import TritonError
from triton.runtime.cache import FileCacheManager, triton_key

from benchmarks import host_code
from benchmarks.offline import Compile, in_processes

NAME = "triton-cache.tar.xz"
MOST_BYTES = 40 * 2**20
_MANIFEST = "filled.json"
_TRAVELS = (".cubin", ".json", ".so")  # sources and intermediate code stay
_DAMAGE = (EOFError, KeyError, ValueError, TypeError, AttributeError, lzma.LZMAError)
_MEMBER = re.compile(r"[A-Z2-7]+/[\w.-]+")


@dataclasses.dataclass
class Notes:
    """entries: folders of Triton's cache that were used; found: of the last kernel, whether there;
    built: files of C that were compiled"""

    entries: set[str] = dataclasses.field(default_factory=set)
    found: bool | None = None
    built: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def noting():
    """Note how Triton's cache is used inside, and build what needs C; yields the Notes."""
    notes = Notes()

    class Noting(FileCacheManager):
        def __init__(self, key, override=False, dump=False):
            super().__init__(key, override, dump)
            if not (override or dump):
                notes.entries.add(key)

    def listen(*, cache_hit, **_):
        notes.found = cache_hit

    with triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.manager_class = Noting
        triton.knobs.compilation.listener = listen
        with host_code.for_another_machine() as notes.built:
            yield notes


@dataclasses.dataclass(frozen=True)
class Filled:
    """One job: its entries, whether all was there, what it took, and why it failed."""

    kernel: str
    entries: frozenset[str]
    there: bool
    seconds: float
    problem: str | None = None


def fill_one(job: Compile) -> Filled:
    """Compile a kernel, and what launches it, into Triton's cache."""
    start, problem = time.monotonic(), None
    with noting() as notes:
        try:
            host_code.build_utils()
            compiled = triton.compile(job.source(), target=job.target, options=dict(job.options))
            host_code.build_launcher(compiled.src, compiled.metadata)
        except (TritonError, RuntimeError) as error:
            problem = str(error).strip().splitlines()[-1]
    there = bool(notes.found) and not notes.built
    return Filled(job.kernel, frozenset(notes.entries), there, time.monotonic() - start, problem)


def fill(jobs: list[Compile], folder: Path, processes: int) -> int:
    """Compile all jobs and write folder/NAME; returns an exit code, with one sentence if not 0."""
    print(f"fills {told(here := identity())}", flush=True)
    start, entries, rows = time.monotonic(), set(), []
    for job, row in zip(jobs, in_processes(fill_one, jobs, processes), strict=True):
        rows.append(row)
        entries |= row.entries
        if row.problem is not None:
            print(f"{row.kernel} sm_{job.arch} NOT COMPILED: {row.problem}\n  {job}", flush=True)
    there, wrong = sum(row.there for row in rows), sum(row.problem is not None for row in rows)
    seconds = time.monotonic() - start
    compiled = len(rows) - there - wrong
    print(f"{len(rows)} kernels: {there} hits, {compiled} compiles, {wrong} wrong, {seconds:.0f} s")
    if wrong:
        return 1
    path = pack(entries, folder, here | {"archs": sorted({job.arch for job in jobs})})
    size = path.stat().st_size
    print(f"{path}: {len(entries)} entries, {size / 2**20:.1f} MiB")
    if size > MOST_BYTES:
        path.unlink()
        print(f"expected at most {MOST_BYTES >> 20} MiB, got {size / 2**20:.1f}; fill less at once")
        return 1
    return 0


def identity() -> dict[str, str]:
    """What a filled cache is good for."""
    return {
        "triton": triton.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "machine": f"{platform.system()} {platform.machine()}",
        "TRITON_CACHE_DIR": str(Path(triton.knobs.cache.dir).absolute()),
    }


def told(record: dict) -> str:
    """An identity in words."""
    return ", ".join(f"{name} {value}" for name, value in record.items())


def pack(entries: Iterable[str], folder: Path, manifest: dict) -> Path:
    """Write the entries of Triton's cache, without what need not travel, as one file."""
    folder.mkdir(parents=True, exist_ok=True)
    path, begun = folder / NAME, folder / f"{NAME}.{os.getpid()}.part"
    cache = Path(manifest["TRITON_CACHE_DIR"])
    files = [f for entry in sorted(entries) for f in _travelling(cache / entry)]
    try:
        with tarfile.open(begun, "w:xz") as archive:
            text = json.dumps(manifest | {"files": len(files)}).encode()
            info = tarfile.TarInfo(_MANIFEST)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
            for file in files:
                archive.add(file, f"{file.parent.name}/{file.name}", recursive=False)
        os.replace(begun, path)
    finally:
        begun.unlink(missing_ok=True)
    return path


def _travelling(entry):
    """The files of an entry that must travel. A group file, which makes it count, comes last."""
    files = [f for f in entry.iterdir() if f.suffix in _TRAVELS]
    return sorted(files, key=lambda f: (f.name.startswith("__grp__"), f.name))


def unpack(path: Path) -> int:
    """Add a file of ``fill`` to this Triton's cache; returns an exit code.

    Prints one sentence, and adds nothing, where the entries would be of no use here.
    """
    here = identity()
    print(f"here     {told(here)}", flush=True)
    try:
        with tarfile.open(path, "r:xz") as archive:
            manifest = json.load(archive.extractfile(_MANIFEST))
            print(f"the file {told(manifest)}", flush=True)
            if (problem := _differs(here, manifest)) is not None:
                print(f"{path}: {problem}")
                return 2
            files = _files(archive, manifest["files"])
    except (*_DAMAGE, OSError, tarfile.TarError) as error:
        print(f"{path} is not a whole file of --fill ({error}); copy it again")
        return 2
    for name, content in files.items():
        _write(Path(here["TRITON_CACHE_DIR"]) / name, content)
    print(f"{len({name.partition('/')[0] for name in files})} entries unpacked")
    return 0


def _differs(here, manifest):
    for name, value in here.items():
        if (there := manifest[name]) != value:
            remedy = f"set it to {there}" if name.isupper() else f"fill a cache with {name} {value}"
            return f"expected {name} {value} as here, got {there}; {remedy}"
    return None


def _files(archive, expected):
    """Names and contents, all of them."""
    files = {}
    for member in archive:
        if member.name == _MANIFEST:
            continue
        if not (member.isfile() and _MEMBER.fullmatch(member.name)):
            raise ValueError(f"it holds {member.name!r}, which is not an entry")
        files[member.name] = archive.extractfile(member).read()
    if len(files) != expected:
        raise ValueError(f"it holds {len(files)} of {expected} files")
    return files


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f"{path.name}.{os.getpid()}.part")
    begun.write_bytes(content)
    os.replace(begun, path)


def write_jobs(jobs: Iterable[Compile], path: Path) -> None:
    """One job a line, as Python literals; raises ValueError for a constant that is not one."""
    lines = []
    for job in jobs:
        line = repr(dataclasses.astuple(job))
        try:
            same = Compile(*ast.literal_eval(line)) == job
        except (ValueError, SyntaxError):
            same = False
        if not same:
            raise ValueError(f"{job.kernel} has a constant that is not a literal: {job}")
        lines.append(f"{line}\n")
    path.write_text("".join(lines), encoding="utf-8")


def read_jobs(path: Path) -> list[Compile]:
    """What write_jobs wrote. Raises ValueError for another file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Compile(*ast.literal_eval(line)) for line in lines]
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"{path} is not a file of benchmarks.stand_in --record") from None
