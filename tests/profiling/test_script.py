# SPDX-License-Identifier: Apache-2.0
"""Training programs under ``samfast profile --script``: unchanged, stopped in time, or refused."""

import json
import sys

import pytest
from programs import BACKWARD, FORWARD, PROGRAM

from samfast import cli

SMALL = ("--skip", "2", "--steps", "2")


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(PROGRAM)
    return path


def profiled(capsys, program, mode, steps=100, options=SMALL):
    words = ["profile", *options, "--json", "--script", str(program), mode, str(steps)]
    assert cli.main(words) == 0
    out = capsys.readouterr()
    return json.loads(out.out), out.err


def refused(capsys, *words):
    assert cli.main(["profile", *map(str, words)]) == 2
    out = capsys.readouterr()
    *_, sentence = out.err.strip().splitlines()
    assert sentence.startswith("samfast: ")
    return sentence.removeprefix("samfast: ")


def test_a_script_stops_after_its_steps(capsys, program):
    argv, path = list(sys.argv), list(sys.path)
    result, said = profiled(capsys, program, "plain")
    lines = [line for line in said.splitlines() if line.startswith(("step", "cleaned"))]
    assert lines == ["step 0", "step 1", "step 2", "cleaned up"]  # in its fourth it is stopped
    assert result["steps"]["timed"] == 2
    assert (sys.argv, sys.path) == (argv, path)
    flop = {row["name"]: row["flop"] for row in result["phases"]}
    assert (flop["forward"], flop["backward"]) == (FORWARD, BACKWARD)
    assert {"forward", "backward", "optimizer", "data", "host gap"} == set(flop)
    flop = {row["name"]: row["flop"] for row in result["blocks"]}
    product = 2 * 8 * 16 * 16
    assert (flop["blocks.0"], flop["blocks.1"]) == (5 * product, 6 * product)
    assert flop["head"] == 3 * product // 4


@pytest.mark.parametrize(
    ("mode", "times"), [("two", 1), ("accumulate", 3), ("autocast", 1)], ids=str
)
def test_steps_of_other_loops(mode, times, capsys, program):
    result, _ = profiled(capsys, program, mode)
    assert result["totals"]["flop"] == times * (FORWARD + BACKWARD)
    assert result["dtype"] == ("bfloat16" if mode == "autocast" else "float32")


def test_a_checkpoint_s_second_forward_is_executed(capsys, program):
    plain, _ = profiled(capsys, program, "plain")
    result, _ = profiled(capsys, program, "checkpoint")
    again = 2 * 2 * 8 * 16 * 16  # of both blocks the first product; nothing needs the last one
    assert result["totals"]["flop"] == plain["totals"]["flop"] + again
    assert result["totals"]["saved_bytes"] < plain["totals"]["saved_bytes"]


@pytest.mark.slow
def test_a_compiled_model(capsys, program):
    result, _ = profiled(capsys, program, "compile")
    assert result["totals"]["flop"] == FORWARD + BACKWARD
    rows = {row["name"]: row for row in result["operations"]}
    assert rows["compiled graph"]["calls"]  # the counted step has not driven it out
    assert any("torch.compile" in note for note in result["notes"])


def test_a_script_that_ends_early_says_so(capsys, program):
    result, _ = profiled(capsys, program, "plain", steps=3)
    assert result["steps"]["timed"] == 1
    assert "the script ended after 1 of 2 timed steps" in result["notes"]


@pytest.mark.parametrize(
    ("mode", "steps", "sentence"),
    [
        ("fail", 9, "failed in step 4: OSError: no space left; nothing was written"),
        ("exit", 9, "ended itself in step 4 with sys.exit(enough); nothing was written"),
        ("never", 2, "ended without a step; a step ends when"),
        ("plain", 2, "ended after 2 steps, but the first 2 are skipped; let it run longer"),
    ],
)
def test_scripts_that_cannot_be_profiled(mode, steps, sentence, capsys, program):
    page = program.parent / "page.html"
    words = (*SMALL, "--html", page, "--script", program, mode, steps)
    assert f"the script {program} {sentence}" in refused(capsys, *words)
    assert [path.name for path in program.parent.iterdir()] == ["train.py"]


def test_scripts_that_are_not_there_or_not_python(capsys, tmp_path):
    path = tmp_path / "gone.py"
    assert refused(capsys, "--script", path) == f"the script {path} does not exist"
    assert "is not a file" in refused(capsys, "--script", tmp_path)
    path.write_text("a = 1\nwhile:\n")
    assert refused(capsys, "--script", path).startswith(
        f"the script {path} is not Python in line 2: "
    )


def test_options_that_the_script_decides(capsys, program):
    assert "leave it out, or --script" in refused(capsys, "--compare", "--script", program)
    sentence = refused(capsys, "--batch", 4, "--script", program)
    assert sentence.startswith("batch is 4, but the script sets that itself; leave out --batch")


def test_words_after_the_script_are_its_own(capsys, tmp_path):
    path = tmp_path / "words.py"
    path.write_text("import sys; raise RuntimeError(repr(sys.argv[1:]))")
    sentence = refused(capsys, f"--script={path}", "--json", "--help", "--steps=x")
    assert "['--json', '--help', '--steps=x']" in sentence


LOOP = """
import os, subprocess, sys, torch
weight = torch.nn.Parameter(torch.ones(4, 4))
optimizer = torch.optim.SGD([weight], lr=0.1)
other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)

def steps(count):
    for _ in range(count):
        optimizer.zero_grad()
        (weight @ weight).sum().backward()
        optimizer.step()
"""


def looped(capsys, tmp_path, text, *options):
    path = tmp_path / "loop.py"
    path.write_text(LOOP + text)
    words = ["profile", *SMALL, *map(str, options), "--json", "--script", str(path)]
    code = cli.main(words)
    out = capsys.readouterr()
    return code, out.out, out.err, path


def test_a_script_is_not_written_over(capsys, tmp_path):
    code, _out, err, path = looped(capsys, tmp_path, "steps(9)", "--html", tmp_path / "loop.py")
    assert code == 2 and "is the profiled script; give another file" in err
    assert path.read_text() == LOOP + "steps(9)"


def test_files_are_where_they_were_named(capsys, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    try:
        code, *_ = looped(capsys, tmp_path, "os.chdir('elsewhere'); steps(9)", "--trace", "t.json")
    finally:
        monkeypatch.chdir(tmp_path)
    assert code == 0 and (tmp_path / "t.json").is_file()


@pytest.mark.parametrize(
    "text, remark",
    [
        ("other.step(); steps(9)", None),  # a warm-up's optimizer ends no step
        ("steps(3); os._exit(0)", "the script ended after 1 of 2 timed steps"),
        (
            "try:\n    steps(9)\nfinally:\n    raise OSError('late')",
            "after its timed steps the script failed: late",
        ),
        ("try:\n    steps(9)\nexcept BaseException:\n    pass", None),
        (
            "sys.__stdout__.write('x'); os.write(1, b'y'); subprocess.run(['echo', 'z']); steps(9)",
            None,
        ),
    ],
    ids=["warm-up", "left", "late", "swallowed", "printed"],
)
def test_what_scripts_do_loses_no_profile(text, remark, capfd, tmp_path):
    code, out, err, _ = looped(capfd, tmp_path, text)
    assert code == 0, err
    notes = json.loads(out)["notes"]  # and nothing else was printed
    assert [note for note in notes if "script" in note] == ([remark] if remark else [])


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("steps(1); os._exit(0)", "ended after 1 steps, but the first 2 are skipped"),
        ("os._exit(3)", "ended itself in step 1"),
        (
            "loss = torch.func.grad(lambda w: (w @ w).sum())\n"
            "for _ in range(9):\n    weight.grad = loss(weight.detach()); optimizer.step()",
            "cannot be profiled: what step",
        ),
    ],
    ids=["left", "code", "func"],
)
def test_scripts_that_leave_too_early(text, sentence, capfd, tmp_path):
    code, out, err, _ = looped(capfd, tmp_path, text)
    assert code == 2 and out == "" and sentence in err, err


@pytest.mark.parametrize(
    "step, note",
    [
        ("optimizer.step(lambda: (weight @ weight).sum())", "the optimizer calls a closure"),
        ("optimizer.step(); other.step()", "several optimizers step"),
        ("optimizer.step()", None),
    ],
    ids=["closure", "several", "one"],
)
def test_steps_whose_phases_mix_say_so(step, note, capfd, tmp_path):
    text = f"for _ in range(9):\n    (weight @ weight).sum().backward(); {step}"
    code, out, err, _ = looped(capfd, tmp_path, text)
    assert code == 0, err
    notes = [own for own in json.loads(out)["notes"] if "optimizer" in own]
    assert [own.startswith(note) for own in notes] == ([True] if note else [])
