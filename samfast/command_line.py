# SPDX-License-Identifier: Apache-2.0
"""Parse the command line into settings, and build its help, from the options of both.

Options belong to settings and to methods. Importing this loads tyro but not torch.
"""

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import tyro

from samfast.adapters.options import Option, options_of
from samfast.methods.registry import VARIANTS
from samfast.training.config_file import settings_from_file
from samfast.training.settings import GROUPS, FinetuneSettings, MethodSettings

_VALUES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
_MARGIN = 30  # columns of a box and its flags around a help text
_TWO_BOXES = 130  # terminal columns from which tyro puts boxes side by side
_FLAG = 24  # columns of a method's option before its help
_CONFIG = Option(  # on the command line only: not a setting, but a file of settings
    help="YAML or JSON file of options: a mapping of names to values, or a run's settings.json. "
    "The command line overrides it; paths are relative to the working directory",
    name="config",
    type=Path | None,
    hint="default: none",
)


def parse(argv: list[str], commands: Mapping[str, type]) -> Any:
    """Return the settings that a command line names.

    commands: the class of each command's settings, whose fields are options

    Raises SystemExit after ``--help`` and for wrong options. Raises ValueError for an empty value,
    which as a path would mean the current folder.
    """
    options = argv[: argv.index("--")] if "--" in argv else argv
    asked = "-h" in options or "--help" in options
    if asked:
        argv = [*(word for word in argv[:1] if word in commands), "--help"]
    _check_values(argv)
    if argv and argv[0] in commands:
        argv = _completed(argv, options_of(commands[argv[0]]))
    kind, words = _parsed(argv, commands, asked, {})
    config, resume = words.pop("config", None), words.get("resume")
    given = {} if resume is None else _settings_of_run(Path(resume))
    if config is not None:
        _check_once("--config", argv)
        given |= settings_from_file(config)
    if given:
        _, words = _parsed(argv, commands, asked, given)
        words.pop("config")
    return kind(**words)


def _settings_of_run(path: Path) -> dict[str, Any]:
    """Read the settings of the run with this folder or state; {} if there are none."""
    run = path.parent.parent if path.parent.name == "state" else path
    if not (run / "settings.json").is_file():
        return {}  # training reports a wrong path
    return settings_from_file(run / "settings.json")


def _parsed(
    argv: Sequence[str], commands: Mapping[str, type], asked: bool, given: Mapping[str, Any]
) -> tuple[type, dict[str, Any]]:
    """Parse; return the class of the settings and the value of each option.

    given: options of fine-tuning in place of their defaults
    """
    made = {name: _made(kind, asked, given) for name, kind in commands.items()}
    about = {name: _about(kind, argv[:1] == [name]) for name, kind in commands.items()}
    subcommands = [
        Annotated[made[name], tyro.conf.subcommand(name, description=about[name])]
        for name in commands
    ]
    found = tyro.cli(
        Union[tuple(subcommands)],  # noqa: UP007
        prog="samfast",
        description="Parameter-efficient fine-tuning of the Segment Anything Model.",
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    kind = next(kind for name, kind in commands.items() if type(found) is made[name])
    return kind, dict(_flat(found))


def _check_once(option: str, argv: Sequence[str]) -> None:
    if sum(word.partition("=")[0] == option for word in argv) > 1:
        raise ValueError(f"{option} is given twice; pass one file")


def _completed(argv: Sequence[str], options: Sequence[Option]) -> list[str]:
    """Return the words, with values added to options that have none."""
    alone = {f"--{o.name.replace('_', '-')}": o.alone for o in options if o.alone is not None}
    found = []
    for word, after in zip(argv, [*argv[1:], "--"], strict=True):
        found.append(f"{word}={alone[word]}" if word in alone and after.startswith("-") else word)
    return found


def _check_values(argv: Sequence[str]) -> None:
    option = "one of the values"
    for word in argv:
        name, equals, value = word.partition("=")
        option = name if name.startswith("--") else option
        if word == "" or (name.startswith("--") and equals and not value):
            raise ValueError(f"{option} is empty; give it a value, or leave it out")


def _made(kind: type, asked: bool, given: Mapping[str, Any]) -> type:
    """Make a class for tyro with the settings' options; those of fine-tuning in groups.

    asked: True for the help, where methods list their own options, such as ``--rank``
    given: options of fine-tuning in place of their defaults
    """
    if kind is not FinetuneSettings:
        return _struct(kind.__name__, _shown(options_of(kind), asked))
    groups: list[Any] = [
        ("config", _annotated(_CONFIG), dataclasses.field(default=None, kw_only=True))
    ]
    for name, group in GROUPS.items():
        options = tuple(
            dataclasses.replace(option, default=given.get(option.name, option.default))
            for option in options_of(group)
        )
        struct: Any = _struct(name, _shown(options, asked))
        groups.append((name, Annotated[struct, tyro.conf.arg(help="")]))
    return dataclasses.make_dataclass(kind.__name__, groups, frozen=True)


def _shown(options: Sequence[Option], asked: bool) -> Sequence[Option]:
    """List the options; for the help, put those of methods into the text of ``--method``."""
    own = {option.name for option in options_of(MethodSettings)}
    if not asked or not own <= {option.name for option in options}:
        return options
    return [
        dataclasses.replace(option, help=_methods_help(option), hint="")
        if option.name == "method"
        else option
        for option in options
        if option.name == "method" or option.name not in own
    ]


def _struct(name: str, options: Sequence[Option]) -> type:
    fields = [(o.name, _annotated(o), dataclasses.field(default=o.default)) for o in options]
    return dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)


def _flat(found: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) for every option, in any group."""
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value)
        else:
            yield field.name, value


def _about(kind: type, whole: bool) -> str:
    """Describe a command: in full, or by the first line for the list of commands."""
    text = inspect.getdoc(kind) or ""
    return text if whole else text.partition("\n")[0]


def _annotated(option: Option) -> Any:
    """Return the option's type in tyro's form."""
    hint = _hint(option)
    told = tyro.conf.arg(
        help=option.help,
        metavar=None if option.type is bool else _metavar(option),
        help_behavior_hint=f"({hint})" if hint else "",
    )
    kind = option.type
    if isinstance(kind, UnionType):  # tyro imports typeguard for this form and for None at its end
        kind = Union[tuple([None, *_kinds(kind)])]  # noqa: UP007
    if option.positional:
        kind = tyro.conf.Positional[kind]
    if option.repeatable:
        kind = tyro.conf.UseAppendAction[kind]
    return Annotated[kind, told]


def _hint(option: Option) -> str | None:
    """Return the text in brackets after the help."""
    if option.hint is not None or option.default is None:
        return option.hint
    value = option.default
    return f"default: {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _kinds(union: UnionType) -> list[Any]:
    """Return the union's types except None."""
    return [kind for kind in get_args(union) if kind is not type(None)]


def _metavar(option: Option) -> str:
    if option.metavar is not None:
        return option.metavar
    kind = _kinds(option.type)[0] if isinstance(option.type, UnionType) else option.type
    if option.choices:
        name = f"{{{','.join(option.choices)}}}"
    else:
        name = _VALUES[get_args(kind)[0] if get_origin(kind) is tuple else kind]
    return f"{name} ..." if get_origin(kind) is tuple else name


def _methods_help(method: Option) -> str:
    """Build ``--method``'s help: each method with its own options and their defaults."""
    columns = shutil.get_terminal_size().columns
    box = columns if columns < _TWO_BOXES else columns // 2
    width = max(_FLAG + 16, box - _MARGIN)
    lines = [f"{method.help} ({_hint(method)}). Each has options of its own:"]
    for name, variant in VARIANTS.items():
        needs = " (needs --tasks)" if variant.needs_tasks else ""
        lines += ["", *textwrap.wrap(f"{name}: {variant.summary()}{needs}", width)]
        for option in variant.options():
            value = "" if option.type is bool else f" {_metavar(option)}"
            hint = _hint(option)
            lines += textwrap.wrap(
                option.help if hint is None else f"{option.help} ({hint})",
                width,
                initial_indent=f"  --{option.name.replace('_', '-')}{value} ".ljust(_FLAG),
                subsequent_indent=" " * _FLAG,
            )
    return "\n".join(lines)
