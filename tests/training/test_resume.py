# SPDX-License-Identifier: Apache-2.0
"""Going on with a run: the same final bytes, whatever ended it, and what is refused or listed."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kill_runs import compiler, runs, said
from PIL import Image
from safetensors import safe_open

from samfast import cli
from samfast.files.format import CONFIG, TENSORS, read_adapter_config
from samfast.training import records
from samfast.training.callbacks import Callback
from samfast.training.loop import finetune
from samfast.training.one_mask import OneMask
from samfast.training.recipe import with_recipe
from samfast.training.resume import check_same_run
from samfast.training.run import Run
from samfast.training.schedules import Schedule
from samfast.training.settings import FinetuneSettings
from samfast.training.states import TRAINING, newest_state, read_state, save_state
from samfast.training.stopping import Interrupted

CLOCKS = ("images_per_second", "peak_memory_mib")  # what no two runs share
WHOLE = {"epochs": 2, "repeats": 1, "batch_size": 1, "accumulate": 2, "dropout": 0.1, "lr": 3e-3}


MORE = {"overlays": 1, "save_every": 1, "val_fraction": 0.34}


def settings_for(data: Path, output: Path, **options) -> FinetuneSettings:
    more = {"model": "vit_tiny", "image_size": 64, **MORE}
    return FinetuneSettings(data=data, output=output, **{**more, **WHOLE, **options})


def results(output: Path) -> dict:
    """The bytes of adapters, scores and overlays, and the table without its clocks."""
    parts = [*(output / "adapter").rglob("*.*"), *(output / "overlays").glob("*")]
    found = {p.relative_to(output): p.read_bytes() for p in [*parts, output / "scores.csv"]}
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
    return {**found, "table": table}


class Ended(Exception):
    pass


class EndsAt(Callback):
    """As a crash would: after an optimizer step, before anything of it is saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, run, loss):
        if run.step == self.step:
            raise Ended


def ended(settings: FinetuneSettings, *steps: int) -> None:
    """A run that ends at these steps, each time after going on."""
    for step in steps:
        with pytest.raises(Ended):
            finetune(settings, callbacks=[EndsAt(step)])
        settings = replace(settings, resume="newest")


@pytest.fixture(scope="module")
def whole(shared_data, tmp_path_factory):
    """A run that nothing interrupted."""
    settings = settings_for(shared_data, tmp_path_factory.mktemp("whole") / "out")
    finetune(settings)
    return settings


@pytest.mark.slow_on_cpu
def test_a_run_that_ended_twice_has_the_same_final_bytes(whole, tmp_path, capsys):
    """Once in the first epoch, once in the second, with accumulation and dropout."""
    settings = replace(whole, output=tmp_path / "out")
    ended(settings, 2, 4)
    finetune(replace(settings, resume="newest"))
    said = capsys.readouterr().out
    assert f"resuming from {tmp_path}/out/state/step-000001 (step 1, epoch 1)" in said
    assert f"resuming from {tmp_path}/out/state/step-000003 (step 3, epoch 2)" in said
    assert results(tmp_path / "out") == results(whole.output)
    assert [p.name for p in (tmp_path / "out" / "state").iterdir()] == ["epoch-002"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "conv-lora", "dropout": None},
        {"method": "cobot-lora", "dropout": None},
        {"method": "adaptformer", "dropout": None},
        {"method": "decoder", "dropout": None},
        {"prompt": "box", "schedule": "OneCycleLR"},
        {"schedule": "ReduceLROnPlateau(patience=1)", "precision": "bf16"},
        {"memory": "minimal", "decoder_chunk": 1},
        {"fuse": False},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "lora",
)
def test_the_same_final_bytes_for_every_method(shared_data, tmp_path, options, workers):
    settings = settings_for(shared_data, tmp_path / "a", workers=workers, keep=2, **options)
    finetune(settings)
    for steps in ((1,), (2, 3, 4)):
        settings = replace(settings, output=tmp_path / str(steps))
        ended(settings, *steps)
        finetune(replace(settings, resume="newest"))
        assert results(settings.output) == results(tmp_path / "a"), steps


def test_a_finished_run_has_nothing_left_to_do(whole, tmp_path):
    output = shutil.copytree(whole.output, tmp_path / "out")
    before = results(output)
    summary = finetune(replace(whole, output=output, resume="newest"))
    assert results(output) == before and summary["epochs"] == 2
    assert summary == json.loads((output / "summary.json").read_text())


@pytest.mark.slow_on_cpu
def test_more_epochs_go_on_from_the_end(whole, tmp_path, capsys):
    output = shutil.copytree(whole.output, tmp_path / "out")
    summary = finetune(replace(whole, output=output, resume="newest", epochs=3))
    assert "changed since: epochs was 2 and is 3" in capsys.readouterr().out
    assert summary["epochs"] == 3 and len(results(output)["table"]) == 3
    assert results(output)["table"][:2] == results(whole.output)["table"]
    assert json.loads((output / "settings.json").read_text())["epochs"] == 3


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options, pattern",
    [
        ({"rank": 8}, "rank was 4 and is 8"),
        ({"seed": 1}, "seed was 0 and is 1|training images are not those"),
        ({"batch_size": 2}, "batch_size was 1 and is 2"),
        ({"loss": "structure"}, "loss was bce-dice and is structure"),
        ({"foreground": (255,)}, "foreground was None and is 255; continue a run with the foreg"),
        ({"keep": 0, "save_every": None}, "keep is 0, but --resume needs saved states"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_would_be_another_run_is_refused(whole, options, pattern):
    before = results(whole.output)
    with pytest.raises(ValueError, match=pattern):
        finetune(replace(whole, resume="newest", **options))
    assert results(whole.output) == before


def test_other_files_are_another_run(whole, data):
    (data / "images" / "p0.png").rename(data / "images" / "q.png")
    (data / "masks" / "p0.png").rename(data / "masks" / "q.png")
    with pytest.raises(ValueError, match=r"images are not those .*p0 is gone, p\d is new"):
        finetune(replace(whole, data=data, resume="newest"))


@pytest.mark.slow_on_cpu
def test_a_state_that_is_damaged_is_left_out(whole, tmp_path, capsys):
    """The next one is used, and named; a state that is named itself is an error."""
    settings = replace(whole, output=tmp_path / "out", keep=3)
    ended(settings, 4)
    states = tmp_path / "out" / "state"
    assert sorted(p.name for p in states.iterdir()) == ["epoch-001", "step-000002", "step-000003"]
    _flip(states / "step-000003" / TRAINING)
    with pytest.raises(ValueError, match=r"step-000003 is damaged: training\.safetensors does not"):
        finetune(replace(settings, resume=str(states / "step-000003")))
    (states / "epoch-001" / TENSORS).unlink()
    finetune(replace(settings, resume="newest"))
    said = capsys.readouterr().out
    assert "step-000003 is damaged: training.safetensors does not have its digest" in said
    assert f"resuming from {states / 'step-000002'} (step 2, epoch 1)" in said
    assert results(tmp_path / "out") == results(whole.output)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_without_a_complete_state_nothing_is_replaced(whole, tmp_path):
    output = shutil.copytree(whole.output, tmp_path / "out")
    _flip(output / "state" / "epoch-002" / TENSORS)
    before = results(output)
    with pytest.raises(ValueError, match=r"no state in .* is complete .*--overwrite starts"):
        finetune(replace(whole, output=output, resume="newest"))
    assert results(output) == before


@pytest.mark.slow_on_cpu
def test_a_named_state_or_run(whole, tmp_path, capsys):
    """The later ones go when the run has saved again."""
    settings = replace(whole, output=tmp_path / "out", keep=9)
    ended(settings, 4)
    states = tmp_path / "out" / "state"
    with pytest.raises(Ended):
        early = str(states / "step-000001")
        finetune(replace(settings, output=None, resume=early), callbacks=[EndsAt(3)])
    left = ["epoch-001", "step-000001", "step-000002-2"]  # made again
    assert sorted(p.name for p in states.iterdir()) == left
    finetune(replace(settings, output=None, resume=str(tmp_path / "out")))
    assert f"resuming from {states / 'epoch-001'}" in capsys.readouterr().out
    assert results(tmp_path / "out") == results(whole.output)


@pytest.mark.slow_on_cpu
def test_a_best_adapter_of_another_epoch_is_replaced(whole, tmp_path, monkeypatch, capsys):
    """As after a state that is earlier than it; every epoch is worse than the one before."""
    scores, dice = OneMask.scores, iter((0.9, 0.5, 0.4))

    def falling(self, model, loader, tick=None):
        scored = scores(self, model, loader, tick)
        return scored._replace(row={**scored.row, "val_dice": next(dice)})

    monkeypatch.setattr(OneMask, "scores", falling)
    settings = replace(whole, output=tmp_path / "out", save_every=None)
    assert finetune(settings)["best_epoch"] == 1
    shutil.rmtree(tmp_path / "out" / "adapter" / "best")
    with pytest.raises(ValueError, match="the best one, and no epoch is left; give more --epochs"):
        finetune(replace(settings, resume="newest"))
    assert finetune(replace(settings, epochs=3, resume="newest"))["best_epoch"] == 3
    said = capsys.readouterr().out
    assert "adapter/best is not of epoch 1, the best one: the next epoch replaces it" in said
    assert read_adapter_config(tmp_path / "out" / "adapter" / "best")["extra"]["epoch"] == 3


def test_bad_paths_to_resume_from(whole, tmp_path, shared_data):
    def resumed(path, **options):
        return replace(whole, resume=str(path), **{"output": None, **options})

    with pytest.raises(FileNotFoundError, match=r"resume .*missing does not exist; name a run"):
        finetune(resumed(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match=r"resume .*step-000009 does not exist"):
        finetune(resumed(whole.output / "state" / "step-000009"))
    with pytest.raises(ValueError, match="is neither a run folder with states nor a state"):
        finetune(resumed(shared_data))
    with pytest.raises(ValueError, match=r"is in the run .*, but output is .*; leave out --output"):
        finetune(resumed(whole.output, output=tmp_path / "other"))
    with pytest.raises(
        ValueError, match=r"--resume continues the run that --overwrite would replace"
    ):
        finetune(replace(whole, resume="newest", overwrite=True))
    with pytest.raises(ValueError, match="save_every is 1, but keep is 0"):
        finetune(replace(whole, keep=0))
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"holds something else and no state to resume from"):
        finetune(replace(whole, output=tmp_path, resume="newest"))
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_the_option_may_stand_alone():
    parse = cli._parsed
    assert parse(["finetune", "--resume", "--epochs", "3"]).resume == "newest"
    assert parse(["finetune", "--epochs", "3", "--resume"]).resume == "newest"
    assert parse(["finetune", "--resume", "runs/x", "--epochs", "3"]).resume == "runs/x"
    assert parse(["finetune"]).resume is None


def test_a_folder_with_states_is_not_empty(whole):
    with pytest.raises(ValueError, match=r"not empty; .*--resume to continue its run"):
        finetune(whole)


@pytest.mark.slow_on_cpu
def test_without_states_nothing_is_kept(shared_data, tmp_path):
    settings = settings_for(shared_data, tmp_path / "out", keep=0, save_every=None, epochs=1)
    finetune(settings)
    assert not (tmp_path / "out" / "state").exists()


def test_a_state_is_an_adapter_folder(whole, capsys):
    """And its header says where the run was."""
    folder = whole.output / "state" / "epoch-002"
    assert newest_state(whole.output)[0].folder == folder
    state = read_state(folder)
    assert state.place == (3, 0) and state.record["step"] == 4
    with (
        safe_open(folder / TENSORS, "pt") as now,
        safe_open(whole.output / "adapter" / "last" / TENSORS, "pt") as last,
    ):
        assert all(torch.equal(now.get_tensor(k), last.get_tensor(k)) for k in now.keys())  # noqa: SIM118
    assert cli.main(["evaluate", "--adapter", str(folder), "--data", str(whole.data)]) == 0


class Asks(Callback):
    """A signal to the process itself, as another program would send it."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_step(self, run, loss):
        if run.step == self.step:
            os.kill(os.getpid(), self.number)


def test_a_signal_saves_and_says_how_to_go_on(whole, tmp_path):
    settings = replace(whole, output=tmp_path / "out", save_every=None)
    told = (
        "stopped after step 3; .*state/step-000003 is kept; continue with .*--resume "
        f"{tmp_path}/out"
    )
    with pytest.raises(Interrupted, match=told) as stop:
        finetune(settings, callbacks=[Asks(3, signal.SIGTERM)])
    assert stop.value.signal == signal.SIGTERM
    finetune(replace(settings, resume="newest"))
    assert results(tmp_path / "out") == results(whole.output)


@pytest.mark.slow_on_cpu
def test_a_signal_in_validation_does_not_wait_for_its_end(whole, tmp_path, monkeypatch):
    settings = replace(whole, output=tmp_path / "out", save_every=None)
    scores = OneMask.scores

    def asked(self, model, loader, tick):
        def late(images):
            os.kill(os.getpid(), signal.SIGHUP)
            tick(images)

        return scores(self, model, loader, late)

    with monkeypatch.context() as patch:
        patch.setattr(OneMask, "scores", asked)
        with pytest.raises(Interrupted, match=r"stopped after step 2; .*step-000002 is kept"):
            finetune(settings)
    finetune(replace(settings, resume="newest"))
    assert results(tmp_path / "out") == results(whole.output)


@pytest.mark.slow_on_cpu
def test_a_stop_where_a_state_is_keeps_it(whole, tmp_path, monkeypatch):
    """In validation, after a step with a state; it may be the only one, so nothing replaces it."""
    settings = replace(whole, output=tmp_path / "out", save_every=2)
    scores, saves = OneMask.scores, []

    def asked(self, model, loader, tick):
        os.kill(os.getpid(), signal.SIGTERM)
        return scores(self, model, loader, tick)

    save = records.save_state
    monkeypatch.setattr(records, "save_state", lambda *a: saves.append(a[0].name) or save(*a))
    monkeypatch.setattr(OneMask, "scores", asked)
    for resume in (None, "newest"):
        with pytest.raises(Interrupted, match=r"step-000002 is kept"):
            finetune(replace(settings, resume=resume))
    assert saves == ["step-000002"]


def test_a_state_never_takes_the_place_of_another(whole, tmp_path):
    """It gets a name of its own, and the other goes when it is complete."""
    output = shutil.copytree(whole.output, tmp_path / "out")
    states = output / "state"
    before = {name: (states / "epoch-002" / name).read_bytes() for name in (CONFIG, TENSORS)}
    (states / "notes").mkdir()
    shutil.copytree(states / "epoch-002", states / "epoch-002-backup")
    record = {**read_state(states / "epoch-002").record, "saved": time.time()}
    again = save_state(states / "epoch-002", before, record, {}, 2)
    assert again.name == "epoch-002-2" and newest_state(output)[0].folder == again
    others = ["epoch-002-backup", "notes"]  # not a run's
    assert sorted(p.name for p in states.iterdir()) == ["epoch-002-2", *others]
    save_state(states / "epoch-002", before, record, {}, 1)
    assert sorted(p.name for p in states.iterdir()) == ["epoch-002", *others]


@pytest.mark.slow_on_cpu
def test_a_learning_rate_may_change(whole, tmp_path, capsys):
    output = shutil.copytree(whole.output, tmp_path / "out")
    finetune(replace(whole, output=output, resume="newest", epochs=3, lr=1e-4, schedule="constant"))
    said = capsys.readouterr().out
    assert "lr was 0.003 and is 0.0001, schedule was cosine and is constant" in said
    assert float(results(output)["table"][-1]["lr"]) == 1e-4


@pytest.mark.slow_on_cpu
def test_torch_s_schedules_follow_more_epochs(shared_data, tmp_path):
    """As samfast's own do: the rates of the later steps are those of a run of that length."""
    options = {"schedule": "OneCycleLR", "save_every": None}
    settings = settings_for(shared_data, tmp_path / "out", **options)
    finetune(settings)
    finetune(replace(settings, resume="newest", epochs=3))
    own = torch.optim.AdamW([torch.zeros(1)], lr=3e-3)
    schedule = Schedule(own, "OneCycleLR", 6)
    schedule.go_on(5, ())
    assert float(results(tmp_path / "out")["table"][-1]["lr"]) == schedule.lr()


@pytest.mark.slow_on_cpu
def test_images_that_changed_are_another_run(shared_data, whole, data, tmp_path):
    """Also where their names are the same."""
    path = next((data / "images").glob("p3.*"))
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    output = shutil.copytree(whole.output, tmp_path / "out")
    settings = replace(whole, data=data, output=output, resume="newest")
    with pytest.raises(ValueError, match=r"of (train|val)/p3 has changed since"):
        finetune(settings)
    shutil.copy(shared_data / "images" / path.name, path)
    assert finetune(settings)["epochs"] == 2  # elsewhere, but the same


def test_a_mistake_leaves_the_settings_as_they_were(whole, tmp_path):
    output = shutil.copytree(whole.output, tmp_path / "out")
    before = (output / "settings.json").read_bytes()
    wrong = ["finetune", "--resume", str(output), "--checkpoint", str(tmp_path / "typo.pth")]
    assert cli.main(wrong) == 2
    assert (output / "settings.json").read_bytes() == before


@pytest.mark.slow_on_cpu
def test_a_truncated_state_is_named(whole, tmp_path, capsys):
    settings = replace(whole, output=tmp_path / "out", keep=2)
    ended(settings, 4)
    path = tmp_path / "out" / "state" / "step-000003" / TRAINING
    path.write_bytes(path.read_bytes()[:1000])
    finetune(replace(settings, resume="newest"))
    assert "left out: state" in (said := capsys.readouterr().out)
    assert "step-000003 is not complete" in said


def test_what_differs_is_named(whole):
    facts = {**read_state(whole.output / "state" / "epoch-002").record["facts"]}
    state = read_state(whole.output / "state" / "epoch-002")
    state.record["facts"]["what is learned"] = {"tasks": [{"name": "a", "weight": 1.0}]}
    facts["what is learned"] = {"tasks": [{"name": "a", "weight": 0.5}]}
    with pytest.raises(ValueError, match=r"what is learned\.tasks\.0\.weight was 1\.0 and is 0\.5"):
        check_same_run(state, state.record["settings"], facts)


@pytest.mark.parametrize(
    "callbacks, pattern",
    [
        (Callback(), "expected a list of callbacks, got a Callback"),
        ([print], "has a builtin_function_or_method without on_begin; inherit samfast"),
    ],
)
def test_what_is_no_callback(whole, callbacks, pattern):
    with pytest.raises(ValueError, match=pattern):
        finetune(replace(whole, resume="newest"), callbacks=callbacks)


@pytest.mark.slow_on_cpu
def test_a_callback_may_end_the_run(shared_data, tmp_path, capsys):
    calls = []

    class Watches(Callback):
        def on_begin(self, run):
            assert isinstance(run, Run)
            calls.append("begin")

        def on_step(self, run, loss):
            calls.append(loss.item())

        def on_epoch(self, run, row):
            calls.append(row["epoch"])
            run.stop("enough seen")

        def on_end(self, run, summary):
            calls.append(summary["epochs"])

    settings = settings_for(shared_data, tmp_path / "out", save_every=None)
    finetune(settings, callbacks=[Watches()])
    assert [type(call) for call in calls] == [str, float, float, int, int] and calls[-1] == 1
    assert "enough seen" in capsys.readouterr().out


@pytest.mark.slow_on_cpu
def test_early_stopping(shared_data, tmp_path, capsys):
    """With a learning rate of almost nothing no epoch is better than the first."""
    options = {"epochs": 9, "patience": 2, "lr": 1e-12, "save_every": None}
    settings = settings_for(shared_data, tmp_path / "out", **options)
    assert finetune(settings)["epochs"] == 3
    assert "stopped early: no better validation score in 2 epochs" in capsys.readouterr().out
    assert finetune(replace(settings, resume="newest"))["epochs"] == 3


@pytest.mark.slow_on_cpu
@pytest.mark.skipif(compiler() is None, reason="needs a C compiler: cc, gcc or clang")
def test_a_run_that_was_killed_twice_has_the_same_final_bytes(whole, tmp_path):
    """Inside the write of a state, and between the results of an epoch; ``test_kills`` has all."""
    output = tmp_path / "out"
    argv = ["finetune", "--data", whole.data, "--model", "vit_tiny", "--image-size", 64, "--resume"]
    for name, value in {**MORE, **WHOLE, "output": output}.items():
        argv += [f"--{name.replace('_', '-')}", value]
    with runs(tmp_path) as go:
        for event in ("half of write {}/state/.step-000002", "rmdir {}/state/step-000003"):
            assert go(argv, output, event.format(output)) == -signal.SIGKILL
        assert go(argv, output) == 0, said(output).read_text()
    assert results(output) == results(whole.output)


COMMAND = """
import signal, sys
from samfast import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group(shared_data, tmp_path, number, workers):
    """As a terminal or a batch system sends it: 128 and its number, and one sentence."""
    output = tmp_path / "out"
    options = ["--model", "vit_tiny", "--image-size", 64, "--repeats", 50, "--batch-size", 1]
    options += ["--workers", workers, "--save-every", 1, "--output", output, "--epochs", 2]
    command = [sys.executable, "-c", COMMAND, "finetune", "--data", shared_data, *options]
    with subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not (output / "state").is_dir():
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, number)
        error = process.communicate()[1]
    assert process.returncode == 128 + number, error
    said = re.findall(r"samfast: .*", error)
    assert len(said) == 2 and "finishing this step, then saving" in said[0], error
    assert re.search(
        r"stopped after step \d+; .*; continue with samfast finetune --resume", said[1]
    )
    assert newest_state(output)[0] is not None and "Traceback" not in error


def test_a_named_run_gives_its_settings(whole, tmp_path):
    """But not where it wrote and how it printed; what the command line names wins."""
    state = whole.output / "state" / "epoch-002"
    for path in (whole.output, state):
        found = cli._parsed(["finetune", "--resume", str(path), "--epochs", "5"])
        expected = replace(with_recipe(whole), output=None, resume=str(path), epochs=5)
        assert with_recipe(found) == expected
        assert found.rank is None  # a recipe's: another method may be named
    (tmp_path / "more.yaml").write_text("epochs: 7\nkeep: 2\n")
    words = ["finetune", "--config", str(tmp_path / "more.yaml"), "--resume", str(whole.output)]
    assert (cli._parsed(words).epochs, cli._parsed(words).keep) == (7, 2)
    assert cli._parsed([*words, "--epochs", "8"]).epochs == 8
    assert cli._parsed(["finetune", "--resume", str(tmp_path)]).epochs == 20


@pytest.mark.slow_on_cpu
def test_going_on_from_the_command_line(whole, tmp_path, capsys):
    output = shutil.copytree(whole.output, tmp_path / "out")
    assert cli.main(["finetune", "--resume", str(output), "--epochs", "3"]) == 0
    assert len(results(output)["table"]) == 3
    saved = json.loads((output / "settings.json").read_text())
    assert saved["epochs"] == 3 and saved["output"] == str(output)
