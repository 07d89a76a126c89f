# SPDX-License-Identifier: Apache-2.0
"""The help: every option once in its group, every choice, and each method with its own options."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest

from samfast import backends, cli
from samfast.adapters.options import options_of
from samfast.methods.registry import VARIANTS
from samfast.models.architectures import ARCHITECTURES
from samfast.training.settings import (
    BACKENDS,
    GROUPS,
    MODELS,
    EvaluateSettings,
    FinetuneSettings,
    MethodSettings,
    PredictSettings,
    WarmupSettings,
)

SETTINGS = {
    "finetune": FinetuneSettings,
    "evaluate": EvaluateSettings,
    "predict": PredictSettings,
    "warmup": WarmupSettings,
}
NEW_METHOD = """
import dataclasses, sys
from typing import ClassVar
from samfast.adapters.method import Method
from samfast.adapters.options import option
from samfast.methods import registry

@dataclasses.dataclass(frozen=True)
class Shift(Method):
    '''A shift of every layer.'''
    name: ClassVar[str] = "shift"
    width: int = option(7, "Width of the shift", name="shift_width", least=1)
    round: bool = option(False, "Round it")
    target: str = "qkv"

registry.VARIANTS.update(Shift.variants())
from samfast import cli
parsed = cli._parsed("finetune --shift-width 3 --method shift --round --data d".split())
from samfast.training.recipe import method_of
from samfast.training.checks import check_settings
check_settings(parsed)
assert method_of(parsed) == Shift(3, True), parsed
left_open = cli._parsed(["finetune", "--method", "shift"])
assert method_of(left_open) == Shift(7, False)
print(cli.main(["finetune", "--data", "d", "--shift-width", "3"]), file=sys.stderr)
cli.main(["finetune", "--help"])
"""


def words(text: str) -> str:
    """The help without its line breaks and boxes."""
    return " ".join(text.replace("│", " ").split())


def help_of(command: str, capsys, monkeypatch, columns: int = 100) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([command, "--help"]) == 0
    return capsys.readouterr().out


def flags(text: str) -> list[str]:
    """The options that begin a line, in their order; a line of help is indented further."""
    found = re.findall(r"^( +)--([a-z-]+)", text, re.MULTILINE)
    least = min((len(indent) for indent, _ in found), default=0)
    return [name for indent, name in found if len(indent) == least]


def spelt(names) -> list[str]:
    return [name.replace("_", "-") for name in names]


def boxes(text: str) -> dict[str, str]:
    """The text of each group by its title."""
    _, *parts = re.split(r"^ ?(\w+ options|options) *\n -+ *\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_every_option_is_in_its_group(capsys, monkeypatch, columns):
    found = boxes(help_of("finetune", capsys, monkeypatch, columns))
    assert list(found) == ["options", *(f"{name} options" for name in GROUPS)]
    for name, group in GROUPS.items():
        if group is not MethodSettings:
            assert flags(found[f"{name} options"]) == spelt(f.name for f in fields(group))
    grouped = [field.name for group in GROUPS.values() for field in fields(group)]
    assert sorted(grouped) == sorted(field.name for field in fields(FinetuneSettings))


def test_every_method_has_exactly_its_options(capsys, monkeypatch):
    text = boxes(help_of("finetune", capsys, monkeypatch))["method options"]
    method, *parts = re.split(r"^ +([a-z-]+): ", text, flags=re.MULTILINE)
    assert flags(method) == ["method"]
    names, listed = parts[::2], parts[1::2]
    assert names == list(VARIANTS)
    for name, part in zip(names, listed, strict=True):
        options = VARIANTS[name].options()
        assert flags(part) == spelt(option.name for option in options)
        for option in options:
            assert words(option.help) in words(part)
    of_methods = {option.name for method in VARIANTS.values() for option in method.options()}
    assert {field.name for field in fields(MethodSettings)} == {"method", *of_methods}


def test_the_defaults_of_methods_are_shown(capsys, monkeypatch):
    text = words(help_of("finetune", capsys, monkeypatch, 120))
    for shown in (
        "--rank INT Rank of the update (default: 4)",
        "--rank INT Rank of the update (default: 3)",
        "alpha / rank (default: 32.0)",
        "mlp, or a regular expression (default: mlp)",
        "(default: qkv proj)",
        "learning rate of the core (default: --lr / 20)",
        "from a checkpoint 0.0002, with conv-lora 0.0001",
        "(default: cosine, with conv-lora polynomial)",
        "(required, except with --dry-run)",
    ):
        assert shown in text, shown
    assert "None" not in text


@pytest.mark.parametrize("command", SETTINGS)
def test_every_choice_shows(capsys, monkeypatch, command):
    text = help_of(command, capsys, monkeypatch)
    for option in options_of(SETTINGS[command]):
        flag = "IMAGE ..." if option.positional else f"--{option.name.replace('_', '-')} "
        assert flag in text or f"{flag[:-1]}, --no-" in text, option.name
        if option.choices:
            assert f"{{{','.join(option.choices)}}}" in text
    assert "None" not in text


def test_choices_are_those_of_the_library():
    assert sorted(MODELS) == sorted(ARCHITECTURES)
    assert BACKENDS == backends.NAMES


def test_methods_agree_on_options_that_they_share():
    kinds = {}
    for method in VARIANTS.values():
        for option in method.options():
            assert kinds.setdefault(option.name, option.type) == option.type, option.name
            assert option.type is not bool or option.default is False


def test_required_options_are_marked(capsys, monkeypatch):
    text = words(help_of("evaluate", capsys, monkeypatch))
    assert text.count("(required)") == 2
    assert "(required)" in words(help_of("predict", capsys, monkeypatch))


@pytest.mark.slow_on_cpu
def test_a_new_method_is_on_the_command_line():
    code = [sys.executable, "-c", NEW_METHOD]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "shift_width is 3, but method lora has none\n2\n" in done.stderr
    text = words(done.stdout)
    assert "shift: A shift of every layer" in text
    assert "--shift-width INT Width of the shift (default: 7)" in text


def test_help_comes_whatever_else_is_given(capsys):
    for argv in (["finetune", "--rank", "4", "-h"], ["--help"], ["predict", "a.png", "--help"]):
        assert cli.main(argv) == 0
        assert "usage: samfast" in capsys.readouterr().out


def test_after_two_dashes_help_is_a_name(capsys):
    assert cli.main(["predict", "--adapter", "x", "--", "--help"]) == 2
    assert "samfast: --help does not exist" in capsys.readouterr().err
