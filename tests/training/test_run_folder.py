# SPDX-License-Identifier: Apache-2.0
"""A run's output folder: its lock, its room, what stays after failures, and who may read it."""

import builtins
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import samfast
from samfast import cli
from samfast.files import placing, temporary
from samfast.files.format import TENSORS, read_adapter
from samfast.files.placing import NotWritten, write_together, write_whole
from samfast.models import build_sam
from samfast.training import loop, run_folder, run_lock
from samfast.training.folders import load_split
from samfast.training.loop import finetune
from samfast.training.predict import adapter_folder
from samfast.training.records import COLUMNS_AFTER, COLUMNS_BEFORE, RunFolder
from samfast.training.resume import check_resumable
from samfast.training.run_folder import ClaimedFolder, check_free, clear_results
from samfast.training.run_lock import HOLDER, LOCK
from samfast.training.settings import FinetuneSettings

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
EARLIER = ("adapter/best/" + TENSORS, "adapter/last/" + TENSORS, "metrics.csv", "settings.json")


def claimed(folder: Path, overwrite: bool = False) -> ClaimedFolder:
    place = ClaimedFolder(folder, overwrite)
    place.open(b"new")
    return place


def result(folder: Path, text: str = "new") -> None:
    for name in EARLIER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def texts(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def texts_of(folder: Path, *names: str) -> list[str]:
    return [(folder / name).read_text() for name in names]


def test_the_folder_is_claimed_before_the_model_is_built(shared_data, tmp_path, monkeypatch):
    output = tmp_path / "runs" / "out"
    seen = {}

    def build(settings, tasks):
        seen.update(json.loads((output / "settings.json").read_text()))
        seen["holder"] = json.loads((output / HOLDER).read_text())
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on "):
            finetune_again()
        raise ValueError("no model today")

    def finetune_again():
        ClaimedFolder(output, overwrite=True).open(b"")

    monkeypatch.setattr(loop, "build_base", build)
    with pytest.raises(ValueError, match="no model today"):
        finetune(FinetuneSettings(data=shared_data, output=output, model="vit_tiny"))
    assert seen["model"] == "vit_tiny" and len(seen["train"]) == 5
    assert seen["holder"]["host"] == socket.gethostname()
    assert not (tmp_path / "runs").exists()


def test_without_a_result_everything_is_as_before(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    place = claimed(tmp_path, overwrite=True)
    assert texts(tmp_path)["settings.json"] == "new"
    place.begin()
    (tmp_path / "adapter" / "last").mkdir()
    place.close()
    assert texts(tmp_path) == {"mine.txt": "keep"} and not (tmp_path / "adapter").exists()


def test_earlier_results_stay_until_there_are_new_ones(tmp_path):
    result(tmp_path, "old")
    before = texts(tmp_path)
    place = claimed(tmp_path, overwrite=True)
    assert {**texts(tmp_path), **before} == texts(tmp_path)  # nothing of them has changed
    place.close()
    assert texts(tmp_path) == before
    place = claimed(tmp_path, overwrite=True)
    place.begin()
    assert texts(tmp_path)["settings.json"] == "new"
    place.close()
    assert texts(tmp_path) == before
    place = claimed(tmp_path, overwrite=True)
    place.begin()
    result(tmp_path)
    place.keep()
    place.close()
    assert texts(tmp_path) == dict.fromkeys(EARLIER, "new")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(5))
def test_a_kill_between_old_and_new_results_loses_neither(tmp_path, step, monkeypatch):
    """Killed before the n-th rename; the next run finds the old results, or the new ones whole."""
    result(tmp_path, "old")
    before = texts(tmp_path)
    place = claimed(tmp_path, overwrite=True)
    calls = []

    def dying(function):
        def call(*args):
            if len(calls) == step:
                raise Killed
            calls.append(args)
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying(os.rename))
        patch.setattr(os, "replace", dying(os.replace))
        try:
            place.begin()
            result(tmp_path)
        except Killed:
            pass
    place._lock._lock.release()  # what the end of a process does
    with pytest.raises(ValueError, match="is not empty"):
        claimed(tmp_path)
    assert texts(tmp_path) == (dict.fromkeys(EARLIER, "new") if step == 4 else before)


@pytest.mark.parametrize("step", range(3))
def test_a_kill_while_old_results_come_back_loses_none(tmp_path, step, monkeypatch):
    result(tmp_path, "old")
    before, renames = texts(tmp_path), []
    place = claimed(tmp_path, overwrite=True)
    place.begin()
    place._lock._lock.release()
    rename = os.rename

    def dying(*args):
        if len(renames) == step:
            raise Killed
        renames.append(args)
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        with pytest.raises(Killed):
            claimed(tmp_path)
    with pytest.raises(ValueError, match="is not empty"):
        claimed(tmp_path)
    assert texts(tmp_path) == before


def test_what_a_run_without_results_left_is_no_hindrance(tmp_path):
    place = claimed(tmp_path)
    place.begin()
    (tmp_path / ".room.3").write_text("as a kill leaves it")
    place._lock._lock.release()
    assert {HOLDER, "settings.json"} <= set(texts(tmp_path))
    claimed(tmp_path).close()
    (tmp_path / "settings.json").write_text("of another program")
    with pytest.raises(ValueError, match="is not empty"):
        claimed(tmp_path)
    assert texts(tmp_path) == {"settings.json": "of another program"}


@pytest.mark.parametrize("name", [LOCK, f".{HOLDER}.123-0123abcd.tmp"])
def test_a_run_that_was_killed_while_it_locked_is_no_hindrance(tmp_path, name):
    (tmp_path / name).write_text("")
    check_free(tmp_path, overwrite=False)
    check_resumable(tmp_path)
    claimed(tmp_path).close()
    (tmp_path / "mine.txt").write_text("keep")
    for check in (lambda: check_free(tmp_path, False), lambda: check_resumable(tmp_path)):
        with pytest.raises(ValueError, match=r"is not empty|holds something else"):
            check()


def test_a_folder_that_cannot_be_written(tmp_path, refused, shared_data, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out cannot be written \(Not a directory\); choose"):
        claimed(tmp_path / "file" / "out")

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(run_folder, "write_whole", denied)
    tiny = ("finetune", "--data", shared_data, "--model", "vit_tiny", "--image-size", 64)
    refused(*tiny, pattern=r"output folder .*refused cannot be written \(Permission denied\)")


def test_a_folder_without_room(tmp_path, monkeypatch):
    def full(*_):
        raise FULL

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ValueError, match=r"has too little space for a run: expected 39\.0 MiB, got .* MiB"
    ):
        claimed(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow_on_cpu
def test_links_that_lead_nowhere_empty_values_and_nul(tmp_path, shared_data, capfd):
    before = sorted(Path("runs").iterdir()) if Path("runs").exists() else None
    loop_ = tmp_path / "loop"
    loop_.symlink_to(loop_)
    finetune_ = ["finetune", "--model", "vit_tiny"]
    data = ["--data", str(shared_data)]
    cases = [
        ([*finetune_, *data, "--output", str(loop_)], "is a symbolic link to nothing"),
        ([*finetune_, *data, "--output", str(loop_ / "x")], "cannot be written"),
        ([*finetune_, "--data", str(loop_)], "data folder .*loop does not exist"),
        ([*finetune_, *data, "--tasks", str(loop_)], "tasks file .*loop does not exist"),
        ([*finetune_, *data, "--output", ""], "--output is empty; give it a value"),
        ([*finetune_, *data, "--output="], "--output is empty; give it a value"),
        ([*finetune_, *data, "--output", "a\0b"], r"output is 'a\\x00b'; a path cannot have a NUL"),
        (["predict", "a\0b", "--adapter", "x"], r"images is 'a\\x00b'; a path cannot"),
        (["predict", str(loop_), "--adapter", "x"], "loop does not exist"),
        (["evaluate", *data, "--adapter", str(loop_)], "adapter folder .*loop does not exist"),
        ([*finetune_, *data, "--seed", "9" * 20], f"seed is {'9' * 20}; it must be at most"),
        ([*finetune_, *data, "--epochs", "9" * 20], "epochs is 9+; it must be at most 2147483647"),
        ([*finetune_, *data, "--image-size", "160000"], "image size 160000 is above 32768"),
        (
            [*finetune_, *data, "--method", "conv-lora", "--experts", "1000000"],
            "experts is 1000000; it must be at most 64",
        ),
    ]
    for argv, pattern in cases:
        assert cli.main(argv) == 2, argv
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and re.search(pattern, err), (argv, err)
    assert (sorted(Path("runs").iterdir()) if Path("runs").exists() else None) == before


def test_data_behind_a_link_loop(shared_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shared_data, data)
    (data / "images" / "p3.png").unlink()
    (data / "images" / "p3.png").symlink_to("p3.png")
    with pytest.raises((ValueError, OSError), match=r"images/p3\.png"):
        load_split(data)


HOLD = """
import sys
from pathlib import Path
from samfast.training.run_folder import ClaimedFolder
place = ClaimedFolder(Path(sys.argv[1]), False)
place.open(b"{}")
place.begin()
print("holds", flush=True)
sys.stdin.read()
"""


def holding(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "holds\n"
    return process


@pytest.mark.slow
def test_a_second_run_is_refused_while_another_process_has_the_folder(tmp_path, shared_data, capfd):
    output = tmp_path / "out"
    with holding(output) as other:
        before = texts(output)
        arguments = ["finetune", "--data", str(shared_data), "--model", "vit_tiny"]
        assert cli.main([*arguments, "--output", str(output), "--overwrite"]) == 2
        err = capfd.readouterr().err
        who = f"is in use by process {other.pid} on {socket.gethostname()}, started at "
        assert err.count("\n") == 1 and who in err
        assert texts(output) == before
        other.send_signal(signal.SIGKILL)
    claimed(output).close()
    assert list(output.iterdir()) == []


def test_the_lock_of_a_killed_run_is_waited_for(tmp_path, monkeypatch):
    """Its loaders, which share the lock, take seconds to notice."""
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    gone = {"pid": int(child.stdout), "host": socket.gethostname(), "since": "then"}
    place = claimed(tmp_path / "out")
    (place.folder / HOLDER).write_text(json.dumps(gone))
    monkeypatch.setattr(run_lock, "_GRACE", 0.2)
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"in use by process {gone['pid']} on"):
        claimed(place.folder)
    assert time.monotonic() - began >= 0.2
    for text in ("", "[]", '{"pid": "x", "host": 1, "since": 2}', json.dumps({**gone, "pid": -1})):
        (place.folder / HOLDER).write_text(text)
        with pytest.raises(ValueError, match="in use by "):
            claimed(place.folder)
    place.close()
    assert not place.folder.exists() and LOCK


def test_a_lock_whose_file_is_gone_is_none(tmp_path, monkeypatch):
    """The run before removes the file between our opening it and locking it."""
    place = claimed(tmp_path / "out")
    lock = run_lock.RunLock(place.folder)
    acquire, turns = lock._lock.acquire, []

    def slow(timeout):
        if not turns:
            (place.folder / LOCK).unlink()
            place._lock._lock.release()
            acquire(timeout=timeout)  # of a file that has no name any more, or of a new one
        else:
            acquire(timeout=timeout)
        turns.append(timeout)

    monkeypatch.setattr(lock._lock, "acquire", slow)
    lock.acquire()
    assert len(turns) == 2
    with pytest.raises(ValueError, match="in use by"):
        claimed(place.folder)
    lock.release()


class Faulty:
    """Files and renames that fail from the n-th step on, after half of what is to be written."""

    def __init__(self, monkeypatch, step: int):
        self.left = step
        for module in (temporary, placing):
            monkeypatch.setattr(module, "open", self.open, raising=False)
        for name in ("fsync", "replace", "rename"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, function):
        def call(*args):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args)

        return call

    def open(self, *args, **options):
        file = self.counted(builtins.open)(*args, **options)
        write = self.counted(file.write)

        class Half:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                try:
                    return write(data)
                except OSError:
                    file.write(data[: len(data) // 2])
                    raise

        return Half()


@pytest.mark.parametrize("first", [True, False], ids=["first", "again"])
def test_a_full_disk_keeps_the_last_good_adapter(tmp_path, monkeypatch, first):
    """At each call that writes; nothing else is left either."""
    old = {"adapter_config.json": "old", TENSORS: "old"}
    new = {"adapter_config.json": b"new", TENSORS: b"new"}
    for step in range(100):
        folder = tmp_path / str(step) / "adapter"
        folder.parent.mkdir()
        if not first:
            write_together(folder, {name: text.encode() for name, text in old.items()})
        with monkeypatch.context() as patch:
            fault = Faulty(patch, step)
            try:
                write_together(folder, new)
            except NotWritten as error:
                assert "No space left on device" in str(error) and str(folder) in str(error)
                assert error.errno == errno.ENOSPC
            else:
                break
        assert fault.left < 0
        left = texts(folder.parent)
        found = {name: left.pop(f"adapter/{name}", None) for name in old}
        assert left == {}
        # The tensors carry the record and count; they change in one step.
        assert found[TENSORS] in ((None, "new") if first else ("old", "new"))
        assert found[TENSORS] == "new" or first or found[TENSORS] == "old"
        if first:
            assert found in (dict.fromkeys(old), dict.fromkeys(old, "new"))
    assert 8 < step < 30


def test_a_full_disk_keeps_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    for step in range(100):
        path.write_text("old")
        with monkeypatch.context() as patch:
            Faulty(patch, step)
            try:
                write_whole(path, b"new")
            except NotWritten as error:
                assert str(error).startswith(f"{path} could not be written (No space left")
            else:
                break
        assert texts(tmp_path) in ({"metrics.csv": "old"}, {"metrics.csv": "new"})
    assert step == 5  # opened, written, synced, renamed, folder synced
    assert path.read_text() == "new"


def test_a_full_disk_between_epochs_keeps_the_first(tmp_path, monkeypatch):
    output, row = tmp_path / "out", dict.fromkeys((*COLUMNS_BEFORE, *COLUMNS_AFTER), 1.0)
    folder = RunFolder(output, {"lr": 1}, (), lambda rows: f"{len(rows)}".encode())
    with pytest.raises(NotWritten, match=r"curves\.png could not be written"), folder:
        folder.begin()
        write_together(output / "adapter" / "last", {TENSORS: b"first"})
        folder.add_epoch(row)
        Faulty(monkeypatch, 0)
        write_whole(output / "curves.png", b"second")
    monkeypatch.undo()
    left = texts_of(output, "adapter/last/" + TENSORS, "settings.json", "metrics.csv")
    assert left[0] == "first" and json.loads(left[1]) == {"lr": 1}
    assert len(left[2].splitlines()) == 2
    assert {path.name for path in output.iterdir()} == {
        *("adapter", "metrics.csv", "settings.json", "tensorboard")
    }


@pytest.mark.slow
def test_a_full_disk_in_a_run_names_the_file(shared_data, tmp_path, monkeypatch, capfd):
    """The second epoch's adapter does not fit: the first one's results stay, whole."""
    output, saves = tmp_path / "out", []
    together = placing.write_together

    def write(folder, files):
        saves.append(folder.name)
        if len(saves) > 2:
            raise NotWritten(folder / TENSORS, FULL)
        together(folder, files)

    monkeypatch.setattr("samfast.files.adapter_files.write_together", write)
    arguments = ["finetune", "--data", str(shared_data), "--model", "vit_tiny", "--image-size"]
    arguments += ["64", "--repeats", "1", "--epochs", "2", "--output", str(output)]
    assert cli.main(arguments) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert f"adapter/last/{TENSORS} could not be written (No space left on device)" in err
    assert len((output / "metrics.csv").read_text().splitlines()) == 2
    for name in ("last", "best"):
        assert read_adapter(output / "adapter" / name).record["extra"]["epoch"] == 1
    assert not (output / LOCK).exists() and not (output / HOLDER).exists()


def test_temporary_files_of_the_living_are_left_alone(tmp_path):
    path = tmp_path / "a.txt"
    dead = [tmp_path / ".a.txt.77-0123abcd.tmp", tmp_path / ".a.txt.77.tmp"]
    for file in dead:
        file.touch()
    foreign = tmp_path / ".a.txt.tmp"
    foreign.touch()
    (tmp_path / ".best.5-0123abcd.tmp").mkdir()
    with (
        temporary.temporary_file(path) as (_, living),
        temporary.temporary_folder(tmp_path / "best") as living_folder,
    ):
        temporary.remove_dead(tmp_path, {"a.txt"})
        assert not any(file.exists() for file in dead)
        temporary.remove_dead(tmp_path)
        assert set(tmp_path.iterdir()) == {living, living_folder, foreign}
    assert list(tmp_path.iterdir()) == [foreign]


SAVE = """
import sys
from pathlib import Path
from samfast.files.placing import write_together
for turn in range(150):
    text = f"{sys.argv[2]} {turn}".encode() * 1000
    write_together(Path(sys.argv[1]), {"a": text, "b": text})
"""


@pytest.mark.slow
def test_two_processes_that_save_to_one_folder_do_not_disturb_each_other(tmp_path):
    folder = tmp_path / "adapter"
    command = [sys.executable, "-c", SAVE, str(folder)]
    running = [subprocess.Popen([*command, name], stderr=-1, text=True) for name in ("x", "y")]
    ends = [process.communicate()[1] for process in running]
    assert ends == ["", ""] and [process.returncode for process in running] == [0, 0]
    left = texts(tmp_path)
    assert set(left) == {"adapter/a", "adapter/b"} and left["adapter/a"] == left["adapter/b"]


TMPFS = """
mount -t tmpfs -o size={size} none {place} || exit 77
{python} -m samfast finetune --data {data} --model vit_tiny --image-size 64 --repeats 1 \
    --epochs 3 --output {place}/out
code=$?
cp -r {place} {copy}
exit $code
"""


@pytest.mark.slow
@pytest.mark.parametrize("size, fits", [("2m", False), ("20m", False), ("125m", True)])
def test_a_disk_of_that_size_loses_nothing(shared_data, tmp_path, size, fits):
    """Too small is noticed at once. 125 MiB take adapters and states; each is whole."""
    place, copy = tmp_path / "disk", tmp_path / "copy"
    place.mkdir()
    script = TMPFS.format(
        size=size, place=place, data=shared_data, copy=copy, python=sys.executable
    )
    command = ["unshare", "-rm", "sh", "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("unshare is missing")
    if done.returncode in (1, 77):
        pytest.skip(f"no tmpfs can be mounted: {done.stderr}")
    if fits:
        assert done.returncode == 0, done.stderr
        read_adapter(adapter_folder(copy / "out"))
        return
    assert done.returncode == 2 and "has too little space for a run" in done.stderr
    assert done.stderr.count("\n") == 1 and list(copy.iterdir()) == []


def test_a_run_folder_stands_for_its_best_adapter(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert adapter_folder(run) == run
    (run / "settings.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"run folder .*run has no adapter yet: nothing was"
    ):
        adapter_folder(run)
    (run / "adapter" / "last").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no adapter/best; name .*run/adapter/last"):
        adapter_folder(run)
    sam = samfast.attach(build_sam("vit_tiny", image_size=64, seed=0), samfast.Lora(rank=2))
    best = samfast.save_adapter(sam, run / "adapter" / "best")
    assert [adapter_folder(place) for place in (run, run / "adapter", best)] == [best] * 3


@pytest.mark.slow
def test_predict_and_evaluate_take_a_run_folder(tmp_path, shared_data, capfd):
    sam = samfast.attach(build_sam("vit_tiny", image_size=64, seed=0), samfast.DecoderOnly())
    samfast.save_adapter(sam, tmp_path / "run" / "adapter" / "best")
    image = str(shared_data / "images" / "p0.png")
    adapter = ["--adapter", str(tmp_path / "run")]
    assert cli.main(["predict", image, *adapter, "--output", str(tmp_path / "masks")]) == 0
    assert (tmp_path / "masks" / "p0_mask.png").is_file()
    capfd.readouterr()
    assert cli.main(["evaluate", "--data", str(shared_data), *adapter, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["images"] == 6 == len(found["per_image"])
    assert "val_loss" not in found  # of which loss, the adapter does not say


def test_clearing_leaves_what_is_not_a_result(tmp_path):
    result(tmp_path)
    for name in ("scores.csv", "classes.csv"):
        (tmp_path / name).write_text("old")
    (tmp_path / "mine.txt").write_text("keep")
    clear_results(tmp_path)
    assert texts(tmp_path) == {"mine.txt": "keep"}
