# SPDX-License-Identifier: Apache-2.0
"""The file that carries Triton's cache: what travels, and what is refused."""

import dataclasses
import io
import json
import tarfile

import pytest

pytest.importorskip("triton", reason="triton is not installed")
from benchmarks import filled_cache
from benchmarks.offline import Compile

JOB = Compile(
    module="some.module",
    kernel="some_kernel",
    types=(("x_ptr", "*fp32"), ("EPS", "constexpr"), ("HOW", "constexpr")),
    constants=(((1,), 1e-06), ((2,), "ieee")),
    attributes=(((0,), (("tt.divisibility", 16),)), ((2,), ())),
    options=(("num_warps", 8),),
    arch=90,
)


def test_jobs_are_read_as_they_were_written(tmp_path):
    others = [dataclasses.replace(JOB, constants=(((1,), value),)) for value in (None, True, 1)]
    filled_cache.write_jobs([JOB, *others], tmp_path / "jobs")
    assert list(map(repr, filled_cache.read_jobs(tmp_path / "jobs"))) == [
        repr(job) for job in (JOB, *others)
    ]


def test_a_job_that_cannot_be_written_is_refused(tmp_path):
    job = dataclasses.replace(JOB, constants=(((1,), object()),))
    with pytest.raises(ValueError, match="some_kernel has a constant that is not a literal"):
        filled_cache.write_jobs([job], tmp_path / "jobs")
    (tmp_path / "other").write_text("(1, 2)\n")
    with pytest.raises(ValueError, match="other is not a file of "):
        filled_cache.read_jobs(tmp_path / "other")


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A file with one entry, and an empty cache at the place where it was filled."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    (cache / "ABC").mkdir(parents=True)
    for name in ("k.cubin", "k.json", "k.ttir", "__grp__k.json"):
        (cache / "ABC" / name).write_text(name)
    made = filled_cache.pack({"ABC"}, tmp_path / "made", filled_cache.identity())
    cache.rename(tmp_path / "gone")
    return made, cache


def test_an_entry_without_its_sources_is_carried(carried, capsys):
    path, cache = carried
    assert filled_cache.unpack(path) == 0
    assert {f.name: f.read_text() for f in (cache / "ABC").iterdir()} == {
        name: name for name in ("k.cubin", "k.json", "__grp__k.json")
    }
    here, there, entries = capsys.readouterr().out.splitlines()
    assert here.startswith("here     triton ") and there.startswith("the file triton ")
    assert "triton_key" in here and entries == "1 entries unpacked"
    with tarfile.open(path) as archive:
        assert archive.getnames()[-1] == "ABC/__grp__k.json"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("triton", "fill a cache with triton "),
        ("python", "fill a cache with python "),
        ("triton_key", "fill a cache with triton_key "),
        ("TRITON_CACHE_DIR", "set it to /elsewhere"),
    ],
)
def test_a_cache_from_elsewhere_is_refused(carried, monkeypatch, capsys, name, remedy):
    path, cache = carried
    here = filled_cache.identity()
    there = here | {name: "/elsewhere"}
    filled_cache.pack([], path.parent, there)
    assert filled_cache.unpack(path) == 2
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert f"expected {name} {here[name]} as here, got /elsewhere; {remedy}" in sentence
    assert not cache.exists()


@pytest.mark.parametrize("name", ["../ABC/k.json", "/tmp/k.json", "ABC/../k.json", "k.json"])
def test_a_file_with_other_paths_is_refused(carried, capsys, name):
    path, cache = carried
    manifest = json.dumps(filled_cache.identity() | {"files": 1})
    with tarfile.open(path, "w:xz") as archive:
        for member, text in (("filled.json", manifest), (name, "{}")):
            info = tarfile.TarInfo(member)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    assert filled_cache.unpack(path) == 2
    assert f"it holds {name!r}, which is not an entry" in capsys.readouterr().out
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["short", "cut", "flipped"])
def test_a_damaged_file_is_refused(carried, capsys, damage):
    path, cache = carried
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"short": -200, "cut": 100}.get(damage)])
    assert filled_cache.unpack(path) == 2
    assert "is not a whole file of --fill" in capsys.readouterr().out
    assert not cache.exists()


def test_a_file_that_lacks_files_is_refused(carried, capsys):
    path, cache = carried
    text = json.dumps(filled_cache.identity() | {"files": 3}).encode()
    with tarfile.open(path, "w:xz") as archive:
        info = tarfile.TarInfo("filled.json")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    assert filled_cache.unpack(path) == 2
    assert "it holds 0 of 3 files" in capsys.readouterr().out
    assert not cache.exists()
