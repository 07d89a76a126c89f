# SPDX-License-Identifier: Apache-2.0
"""0.1.0's command lines: each still means what it meant, and what was refused still is."""

import dataclasses
import json
from pathlib import Path

import pytest

from samfast import cli

KEPT = json.loads(
    (Path(__file__).parents[1] / "golden" / "command_lines-0.1.0.json").read_text("utf-8")
)


def plain(settings):
    """The settings as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("line", KEPT["parsed"], ids=lambda line: " ".join(line["argv"]))
def test_a_line_is_parsed_as_before(line):
    settings = cli._parsed(line["argv"])
    assert type(settings).__name__ == line["command"]
    now = plain(settings)
    assert {name: now[name] for name in line["settings"]} == line["settings"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("argv", KEPT["refused"], ids=" ".join)
def test_a_line_is_refused_as_before(argv, capsys):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err


def test_options_that_came_later_are_parsed():
    argv = "finetune --data d --foreground 1 any --threshold -0.5 --bands 4,3,2 --range=-3.5,4.5"
    settings = cli._parsed(argv.split())
    assert (settings.foreground, settings.threshold) == ((1, "any"), -0.5)
    assert (settings.bands, settings.range) == ("4,3,2", "-3.5,4.5")
    predict = cli._parsed("predict a.png --adapter a --bands 1 --range full".split())
    assert (predict.bands, predict.range) == ("1", "full")
