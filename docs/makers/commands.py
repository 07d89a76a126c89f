# SPDX-License-Identifier: Apache-2.0
"""The page of the command line, made of the options that the settings declare."""

import inspect
from collections.abc import Iterable, Iterator

from samfast.adapters.options import Option, options_of
from samfast.cli import InfoSettings
from samfast.command_line import _hint, _metavar
from samfast.methods.registry import VARIANTS
from samfast.profiling.settings import ProfileSettings
from samfast.training.export_settings import ExportSettings
from samfast.training.merge_settings import MergeSettings
from samfast.training.settings import (
    GROUPS,
    EvaluateSettings,
    FinetuneSettings,
    MethodSettings,
    PredictSettings,
    WarmupSettings,
)

COMMANDS = {
    "finetune": FinetuneSettings,
    "evaluate": EvaluateSettings,
    "predict": PredictSettings,
    "merge": MergeSettings,
    "export": ExportSettings,
    "warmup": WarmupSettings,
    "profile": ProfileSettings,
    "info": InfoSettings,
}
ABOUT = """# Command line

`samfast` takes the name of a command, then its options. This page is made of the code, as
`--help` is.

Wrong options, files or memory end in one sentence and exit code 2. A bug ends in its traceback and
exit code 1. `SAMFAST_TRACEBACK=1` shows where a sentence arose.
"""
CONFIG = """`--config PATH` reads options from a YAML or JSON file, a mapping of their names to
values. Options on the command line win.
"""


def page() -> str:
    """The page, one section for each command."""
    return "\n".join([ABOUT, *(line for name in COMMANDS for line in section(name))])


def section(command: str) -> Iterator[str]:
    """A command: what it is for, then tables of its options."""
    settings = COMMANDS[command]
    yield f"## samfast {command}\n\n{inspect.getdoc(settings)}\n"
    own = {option.name for option in options_of(MethodSettings)} - {"method"}
    of_methods = own <= {option.name for option in options_of(settings)}
    if settings is FinetuneSettings:
        yield CONFIG
        for name, group in GROUPS.items():
            title = f"### finetune: {name}\n\n{inspect.getdoc(group)}\n"
            yield title + "\n" + table(o for o in options_of(group) if o.name not in own)
        yield from methods()
        return
    if of_methods:
        yield "The options of [methods](#options-of-methods) are those of `finetune`.\n"
    yield table(o for o in options_of(settings) if not of_methods or o.name not in own)


def methods() -> Iterator[str]:
    """The options of each method, whose defaults are its own."""
    yield "### Options of methods\n\nEach belongs to the methods under which it stands.\n"
    for name, variant in VARIANTS.items():
        needs = " It needs `--tasks`." if variant.needs_tasks else ""
        yield f"#### --method {name}\n\n{variant.summary()}.{needs}\n"
        yield table(variant.options()) if variant.options() else "It has no options.\n"


def table(options: Iterable[Option]) -> str:
    """A row for each option."""
    lines = ["| option | what it does |", "|---|---|"]
    for option in options:
        hint = _hint(option)
        hint = None if option.default is False else hint  # an option that is not given is off
        told = option.help if hint is None else f"{option.help} ({hint})"
        lines.append(f"| {_cell(f'`{_flags(option)}`')} | {_cell(told)} |")
    return "\n".join(lines) + "\n"


def _flags(option: Option) -> str:
    name = f"--{option.name.replace('_', '-')}"
    if option.positional:
        return _metavar(option)
    if option.type is bool:
        return f"{name}, --no-{name[2:]}" if option.default is True else name
    return f"{name} {_metavar(option)}"


def _cell(text: str) -> str:
    """Text that may stand in a table: bars and angle brackets are no Markdown there."""
    return text.replace("|", "\\|").replace("<", "&lt;")
