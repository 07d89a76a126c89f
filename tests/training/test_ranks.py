# SPDX-License-Identifier: Apache-2.0
"""Several processes train as one process on the joined batch, and end as one."""

import csv
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from budgets import all_within_budget
from conftest import fill_folder
from objects_folder import fill_with_objects
from PIL import Image
from rank_runs import (
    STILL,
    as_it_is,
    first_cannot_write,
    in_float64,
    light,
    light_in_float64,
    recorded,
    second_fails,
    second_has_a_bug,
)
from stock_runs import by_reference
from test_resume import results

import samfast
from samfast import cli
from samfast.training import launched, loop, ranks
from samfast.training.data import Batch, EpochSampler
from samfast.training.joined import JoinedBatches
from samfast.training.launched import ALONE, Launched

HERE = Path(__file__).parent
needs_fork = pytest.mark.skipif(
    not torch.distributed.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"
)
TINY = ["--model", "vit_tiny", "--image-size", 64, "--epochs", 1, "--repeats", 1, "--overlays", 0]


def environment(**more):
    """Of a process that finds samfast and the tests, on one thread and on CPUs."""
    found = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}
    found["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    found["ACCELERATE_USE_CPU"] = "1"
    return found


def started(words) -> list[subprocess.Popen]:
    """Both ranks of a command, without torchrun, which would end one with the other."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-m", "samfast", *map(str, words)],
            env=environment(**place, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def two_ranks(folder, change, *arguments):
    """Exit codes, records and standard error of both."""
    words = [change.__name__, "finetune", *map(str, arguments), "--output", str(folder / "two")]
    done = subprocess.run(
        [sys.executable, str(HERE / "rank_runs.py"), str(folder), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (first, own), (second, other) = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return (first, second), (own, other), done


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def alone(change, folder, *arguments):
    words = ["finetune", *arguments, "--output", folder / "one", "--overwrite"]
    code, found = recorded(words, change)
    assert code == 0
    return found


def same_as_one_process(folder, arguments, change=as_it_is, exact=in_float64, reference=None):
    """Gradients of every step, loss and scores, within the budget of a run on the joined batch.

    reference: replaces more in that run
    """
    codes, (own, other), done = two_ranks(folder, change, *arguments, "--batch-size", 2)
    assert codes == (0, 0), done.stderr
    steps = {name for name in own if name.startswith("step")}
    assert steps and all(torch.equal(own[name], other[name]) for name in steps)
    runs = []
    for kind in (change, exact):

        def changed(patch, kind=kind):
            kind(patch)
            if reference is not None:
                reference(patch)

        runs.append(by_reference(alone, changed, folder, *arguments, "--batch-size", 4))
    all_within_budget(own, *runs, torch.float32)


@pytest.mark.slow_on_cpu
@needs_fork
def test_two_ranks_train_as_one_process(tmp_path):
    """Seven images: a batch of four, then two and one."""
    data = fill_folder(tmp_path / "data", 9)
    same_as_one_process(tmp_path, ["--data", data, *TINY, *STILL], light, light_in_float64)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "lora", "--accumulate", 2],
        ["--method", "cobot-lora", "--prompt", "box"],
        ["--method", "adaptformer", "--dropout", 0],
        ["--method", "cobot-adaptformer", "--dropout", 0],
        ["--method", "kronecker"],
        ["--method", "decoder", "--loss", "structure"],
    ],
    ids=lambda options: options[1],
)
def test_each_method_trains_as_in_one_process(tmp_path, options):
    """Seven images: a batch of four, then two and one."""
    data = fill_folder(tmp_path / "data", 9)
    same_as_one_process(tmp_path, ["--data", data, *TINY, *STILL, *options])


@needs_fork
@pytest.mark.slow
def test_objects_train_as_in_one_process(tmp_path):
    """Images have two objects or none, so that parts and batches have other numbers of them."""
    data = fill_with_objects(tmp_path / "data", 9, empty=(1, 2, 5))
    options = ["--masks", "instances", "--prompt", "mixed", "--accumulate", 2]
    same_as_one_process(tmp_path, ["--data", data, *TINY, *STILL, *options])


@needs_fork
@pytest.mark.slow
def test_tiles_train_as_in_one_process(tmp_path):
    """Both ranks cut tiles from the same decoded files, and share the images that are scored."""
    data = fill_folder(tmp_path / "data", 4)
    options = ["--tile", 40, "--overlap", 4, "--val-fraction", 0.5]
    same_as_one_process(tmp_path, ["--data", data, *TINY, *STILL, *options])
    assert scored_images(tmp_path / "two") == scored_images(tmp_path / "one")
    assert not list((tmp_path / "two").glob(".decoded*"))


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ta-lora"])
def test_tasks_train_as_in_one_process(tmp_path, method):
    """Some images lack a task, so each task has an uneven share of its own."""
    data = fill_folder(tmp_path / "data", 9)
    (data / "depth").mkdir()
    for i in (0, 1, 4, 5, 7):
        mask = np.asarray(Image.open(data / "masks" / f"p{i}.png"))
        depth = np.where(mask > 0, np.float32(0.5), np.float32(1.5))
        Image.fromarray(depth).save(data / "depth" / f"p{i}.tif")
    file = data / "tasks.yaml"
    file.write_text(
        "tasks:\n  - {name: rectangle, kind: binary, foreground: [255]}\n"
        "  - {name: depth, kind: regression, folder: depth, weight: 0.5}\n"
    )
    options = ["--tasks", file, "--method", method]
    options += ["--dropout", 0] if method == "ta-lora" else []
    same_as_one_process(tmp_path, ["--data", data, *TINY, *STILL, *options])
    one, two = (scored_images(tmp_path / name) for name in ("one", "two"))
    assert one == two and len({image for image, _ in one}) == 2


def scored_images(output) -> set[tuple[str, str]]:
    with (output / "scores.csv").open() as file:
        return {(row["image"], row.get("task")) for row in csv.DictReader(file)}


def in_parts(patch):
    """Each half of a batch by itself, with the random numbers of the rank that would have it."""
    streams = []

    def loss(self, batch, weights=None):
        if not streams:
            streams.append(torch.get_rng_state())
            torch.manual_seed(self.settings.seed + 1)
            streams.append(torch.get_rng_state())
        count, total = len(batch.images), 0.0
        bounds = (0, -(-count // 2), count)
        for rank in (0, 1):
            part = slice(*bounds[rank : rank + 2])
            own = Batch(*(None if t is None else t[part] for t in batch))
            torch.set_rng_state(streams[rank])
            part_loss = self.goal.loss(self.model, own) + samfast.aux_loss(self.sam)
            streams[rank] = torch.get_rng_state()
            total = total + len(own.images) / count * part_loss
        return total

    patch.setattr(loop.Run, "loss", loss)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("method", ["conv-lora", "adaptformer"])
def test_random_methods_train_as_in_one_process_that_takes_parts(tmp_path, method):
    """Dropout and noise are each rank's own, and so is Conv-LoRA's balancing loss."""
    data = fill_folder(tmp_path / "data", 9)
    arguments = ["--data", data, *TINY, *STILL, "--method", method]
    same_as_one_process(tmp_path, arguments, reference=in_parts)


def test_a_batch_is_shared_without_loss_or_repetition():
    """Parts in turn are the batch of one process; what is repeated has no weight."""
    sampler = EpochSampler(11, seed=3, repeats=1)
    sampler.set_epoch(2)
    whole = list(JoinedBatches(sampler, 8, ALONE))
    parts = [JoinedBatches(sampler, 2, Launched(rank, 4)) for rank in range(4)]
    assert [len(batch) for batch in whole] == [8, 3] == list(parts[0].counts())
    assert all(len(part) == 2 for part in parts)

    def counts(indices):  # of a task that only even images have
        return [sum(index % 2 == 0 for index in indices)]

    weights = [list(part.weights(counts)) for part in parts]
    for number, (joined, *own) in enumerate(zip(whole, *parts, strict=True)):
        shares = [share[number] for share in weights]
        real = [keys if share > 0 else [] for keys, (share, _) in zip(own, shares, strict=True)]
        assert list(itertools.chain(*real)) == joined and all(own)
        (evens,) = counts([index for index, _ in joined])
        for keys, found in zip(real, shares, strict=True):
            (even,) = counts([index for index, _ in keys])
            assert found == [4 * len(keys) / len(joined), 4 * even / max(1, evens)]
    assert list(JoinedBatches(sampler, 8, ALONE).weights(counts)) == [None, None]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, (2, 3)),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set.*torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2; it must be from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "accelerate launch started only one of several processes.*torchrun",
        ),
    ],
)
def test_what_the_environment_says(variables, expected, monkeypatch, capsys, tmp_path):
    for names in launched._NAMES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert launched.launched() == expected
        return
    assert cli.main(["finetune", "--data", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert re.match(f"samfast: {expected}", err) and err.count("\n") == 1


@pytest.fixture
def place(monkeypatch):
    """The first of two processes; the other never comes."""
    ranks._met.cache_clear()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # which it sets, here until the test's end
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(ranks, "SECONDS_TO_MEET", 0.2)
    yield
    ranks._met.cache_clear()


def test_a_process_that_stays_the_only_one_stops(place, shared_data, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        words = ["finetune", "--data", shared_data, *TINY, "--output", tmp_path / "out"]
        assert cli.main([str(word) for word in words]) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
    (line,) = re.findall("^samfast: .*", capsys.readouterr().err, re.MULTILINE)
    assert re.search("not all of 2 processes started within 0.2 s .*unset WORLD_SIZE", line)
    assert not (tmp_path / "out").exists()


def test_cpus_on_request(monkeypatch):
    """accelerate's own variable decides, also where a GPU is."""
    from accelerate.state import PartialState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    PartialState._reset_state()
    try:
        assert ranks.start().device.type == "cpu"
    finally:
        PartialState._reset_state()


def test_what_shards_the_model_is_refused():
    ranks.check_kind("MULTI_GPU")
    with pytest.raises(ValueError, match="accelerate is set to FSDP; start it with torchrun"):
        ranks.check_kind("FSDP")


def test_accumulation_is_samfast_s(monkeypatch, shared_data, tmp_path):
    """accelerate launch says 1 unless it is told another number."""
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    monkeypatch.setenv(name, "4")
    ranks.check_accumulation(4)
    with pytest.raises(ValueError, match=r"4 steps, but samfast 2; pass --accumulate 4"):
        ranks.check_accumulation(2)
    monkeypatch.setenv(name, "1")
    words = ["finetune", "--data", shared_data, *TINY, "--batch-size", 1, "--accumulate", 2]
    assert cli.main([*map(str, words), "--output", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 3  # of five images


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("change", [as_it_is, second_fails, first_cannot_write])
def test_an_error_is_said_once_and_ends_all(tmp_path, change):
    """Of both, of the second alone, of the first alone."""
    data = fill_folder(tmp_path / "data", 6)
    if change is as_it_is:
        (data / "masks" / "p3.png").unlink()
    codes, _, done = two_ranks(tmp_path, change, "--data", data, *TINY, *STILL)
    assert codes == (2, 2), done.stderr
    sentences = re.findall("^samfast: .*", done.stderr, re.MULTILINE)
    expected = {
        as_it_is: r"samfast: image .*p3\.png has no mask",
        second_fails: "samfast: the second has enough",
        first_cannot_write: "samfast: .*no room",
    }
    assert len(sentences) == 1 and re.match(expected[change], sentences[0]), done.stderr
    assert "Traceback" not in done.stderr


@needs_fork
@pytest.mark.slow
def test_a_bug_in_one_ends_all_and_is_said_once(tmp_path):
    data = fill_folder(tmp_path / "data", 9)
    codes, _, done = two_ranks(tmp_path, second_has_a_bug, "--data", data, *TINY)
    assert codes == (1, 1) and done.stderr.count("TypeError: a slip") == 1, done.stderr
    assert done.stderr.count("samfast: this is a bug in samfast; please report it") == 1


@needs_fork
@pytest.mark.slow
def test_ranks_that_keep_embeddings_train_to_the_same_bits(tmp_path):
    """Five images, of which each rank meets its own; batches of one, as encoded for keeping."""
    data = fill_folder(tmp_path / "data", 6)
    arguments = ["--data", data, *TINY, "--method", "decoder", "--no-flips", "--batch-size", 1]
    found = []
    for name in ("--cache", "--no-cache"):
        (tmp_path / name).mkdir()
        codes, (own, _), done = two_ranks(tmp_path / name, as_it_is, *arguments, name)
        assert codes == (0, 0), done.stderr
        assert ("keeps 11 embeddings" in done.stdout) is (name == "--cache")
        found.append(own)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@needs_fork
@pytest.mark.slow
def test_wrong_options_are_said_once(tmp_path):
    codes, _, done = two_ranks(tmp_path, as_it_is, "--lerning-rate", 3)
    assert codes == (2, 2) and done.stderr.count("Unrecognized options:") == 1


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_killed_rank_ends_the_other(tmp_path, killed):
    """Without torchrun, which would do so itself."""
    data = fill_folder(tmp_path / "data", 6)
    words = ["finetune", "--data", data, *TINY, "--epochs", 1000, "--output", tmp_path / "out"]
    both = started(words)
    try:
        for line in both[0].stdout:
            if line.startswith("epoch 1/"):
                break
        both[killed].kill()
        left = both[1 - killed]
        _, err = left.communicate(timeout=60)
    finally:
        for process in both:
            process.kill()
    assert left.returncode == 2
    assert err.count("samfast: the other process ended, so this one cannot continue") == 1
    assert (tmp_path / "out" / "adapter" / "last").is_dir()


def together(words, act=lambda both: None) -> list[tuple[int, str]]:
    """(exit code, standard error) of both ranks of a command; act: what to do to them meanwhile"""
    both = started(words)
    try:
        act(both)
        return [(one.returncode, err) for one in both for _, err in [one.communicate(timeout=200)]]
    finally:
        for process in both:
            process.kill()


@needs_fork
@pytest.mark.slow
def test_two_ranks_stop_together_and_go_on(tmp_path):
    """A signal to one of them; the final bytes are those of two that nothing interrupted."""
    data = fill_folder(tmp_path / "data", 6)
    words = ["finetune", "--data", data, *TINY, "--epochs", 3, "--repeats", 9, "--batch-size", 1]
    words += ["--dropout", 0.1, "--save-every", 1, "--output"]
    assert [code for code, _ in together([*words, tmp_path / "a"])] == [0, 0]

    def stop_one(both):
        while not list((tmp_path / "b").glob("state/step-*")):
            assert both[1].poll() is None
            time.sleep(0.05)
        both[1].send_signal(signal.SIGTERM)

    ended = together([*words, tmp_path / "b"], stop_one)
    assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert sum(err.count("continue with samfast finetune --resume") for _, err in ended) == 1
    alone = [sys.executable, "-m", "samfast", *map(str, words), str(tmp_path / "b"), "--resume"]
    done = subprocess.run(alone, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "processes was 2 and is 1" in done.stderr
    assert [code for code, _ in together([*words, tmp_path / "b", "--resume"])] == [0, 0]
    assert results(tmp_path / "b") == results(tmp_path / "a")
