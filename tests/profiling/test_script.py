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
        ("never", 2, "ended without a step, so there is nothing to profile; a step ends at"),
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
    assert sentence.startswith("batch is 4, but the script decides that itself; leave out --batch")


def test_words_after_the_script_are_its_own(capsys, tmp_path):
    path = tmp_path / "words.py"
    path.write_text("import sys; raise RuntimeError(repr(sys.argv[1:]))")
    sentence = refused(capsys, f"--script={path}", "--json", "--help", "--steps=x")
    assert "['--json', '--help', '--steps=x']" in sentence
