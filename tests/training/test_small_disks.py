# SPDX-License-Identifier: Apache-2.0
"""Runs on a tmpfs that is too small, or that another program fills: nothing is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from samfast.files.format import TENSORS, read_adapter

MIB = 2**20
NO_MOUNT = 77  # exit code

# The disk is gone with the script, so what is on it in the end is copied. The filler writes to it
# from when {awaited} is there until it is full.
SCRIPT = """
mount -t tmpfs -o size={size} none {disk} || exit {no_mount}
cp -r {before}/. {disk}
cd {disk}
(until [ -e {awaited} ]; do sleep 0.001; done; exec cat /dev/zero > other) > /dev/null 2>&1 &
{python} -m samfast finetune --data {data} --model vit_tiny --image-size 64 --repeats 1 \
    --output {disk}/out {options}
code=$?
kill $! 2> /dev/null
wait
rm -f other
cp -r {disk} {copy}
exit $code
"""


class Disk:
    """Runs ``finetune`` in DISK/out; ``left`` is then a copy of the disk."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data = folder, data
        self.before, self.left = folder / "before", folder / "left"
        for name in ("before", "disk"):
            (folder / name).mkdir()

    def finetune(
        self, size: str, options: str, awaited: str = "never"
    ) -> subprocess.CompletedProcess:
        """The finished process; awaited: what on the disk another program waits for to fill it."""
        script = SCRIPT.format(
            size=size,
            disk=self.folder / "disk",
            before=self.before,
            copy=self.left,
            awaited=awaited,
            data=self.data,
            options=options,
            python=sys.executable,
            no_mount=NO_MOUNT,
        )
        if shutil.which("unshare") is None:
            pytest.skip("needs unshare, to mount a disk")
        command = ["unshare", "-rm", "sh", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == NO_MOUNT or "unshare failed" in done.stderr:
            pytest.skip(f"needs a mount namespace: {done.stderr.strip()}")
        return done


@pytest.fixture
def disk(tmp_path, shared_data) -> Disk:
    return Disk(tmp_path, shared_data)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def earlier_result(folder: Path, size: int) -> dict[str, bytes]:
    """A result of that many bytes in its adapters; returns all of its files."""
    for name in ("last", "best"):
        (folder / "out" / "adapter" / name).mkdir(parents=True)
        (folder / "out" / "adapter" / name / TENSORS).write_bytes(os.urandom(size // 2))
    for name in ("metrics.csv", "settings.json", "summary.json"):
        (folder / "out" / name).write_text(f"earlier {name}")
    return contents(folder)


def check_refused(done: subprocess.CompletedProcess, sentence: str) -> None:
    """Exit code 2 and one sentence."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("samfast: "), done.stderr
    assert sentence in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size, earlier", [("2m", MIB), ("20m", 14 * MIB)])
def test_too_small_a_disk_keeps_an_earlier_result(disk, size, earlier):
    before = earlier_result(disk.before, earlier)
    done = disk.finetune(size, "--epochs 3 --overwrite")
    check_refused(done, "has too little space for a run")
    assert done.stdout == "" and contents(disk.left) == before


@pytest.mark.slow
@pytest.mark.parametrize("size", ["2m", "20m"])
def test_too_small_a_disk_is_left_empty(disk, size):
    check_refused(disk.finetune(size, "--epochs 3"), "has too little space for a run")
    assert list(disk.left.iterdir()) == []


@pytest.mark.slow
def test_a_disk_with_room_takes_the_run_over_an_earlier_one(disk):
    earlier_result(disk.before, 28 * MIB)
    done = disk.finetune("200m", "--epochs 3 --overwrite")
    assert done.returncode == 0, done.stderr
    for name in ("last", "best"):
        read_adapter(disk.left / "out" / "adapter" / name)
    assert len((disk.left / "out" / "metrics.csv").read_text().splitlines()) == 4
    assert not [name for name in contents(disk.left) if "/." in name]


@pytest.mark.slow
@pytest.mark.parametrize("awaited", ["metrics.csv", "overlays"])
def test_a_disk_that_fills_up_keeps_the_last_good_adapters(disk, awaited):
    """Another program takes all that is free in the midst of the first epoch's files, or later."""
    done = disk.finetune("150m", "--epochs 200", f"out/{awaited}")
    check_refused(done, "could not be written (No space left on device)")
    assert f"{disk.folder}/disk/out/" in done.stderr
    epochs = len((disk.left / "out" / "metrics.csv").read_text().splitlines()) - 1
    assert 1 <= epochs < 200
    for name in ("last", "best"):
        adapter = read_adapter(disk.left / "out" / "adapter" / name)
        assert 1 <= adapter.record["extra"]["epoch"] <= epochs + 1
    assert not [name for name in contents(disk.left) if name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("awaited", ["settings.next.json", ".earlier"])
def test_a_disk_that_fills_up_before_the_first_result_keeps_the_earlier_one(disk, awaited):
    """While the model is built, and where the old results already make way for the new ones."""
    before = earlier_result(disk.before, 4 * MIB)
    done = disk.finetune("150m", "--epochs 200 --overwrite", f"out/{awaited}")
    check_refused(done, "(No space left on device)")
    if awaited == ".earlier" and contents(disk.left).keys() != before.keys():
        read_adapter(disk.left / "out" / "adapter" / "last")  # the run was faster than the filler
        return
    assert contents(disk.left) == before
