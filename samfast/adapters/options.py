# SPDX-License-Identifier: Apache-2.0
"""Dataclass fields that are command-line options: help, choices and form.

Nothing here imports torch, so that ``--help`` is quick.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of the command line.

    help: what the option does; ``hint`` or the default follows it in brackets
    name: name on the command line (default: the field's)   field: name in the dataclass
    type: type that the command line parses (default: the field's)
    default: default in the command line's form; flags are off
    hint: text instead of "default: VALUE"
    choices: allowed values   metavar: placeholder of the value in the help
    least, most: smallest and largest allowed number
    positional: given without its name   repeatable: given once per value
    alone: value that the name means without a value
    in_folder: a flag that names the default output folder
    as_option, as_field: convert the field's value to the command line's, and back
    """

    help: str
    name: str = ""
    field: str = ""
    type: Any = None
    default: Any = None
    hint: str | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    least: float | None = None
    most: float = 2**31 - 1  # the largest whole number allowed
    positional: bool = False
    repeatable: bool = False
    alone: str | None = None
    in_folder: bool = False
    as_option: Callable[[Any], Any] = _same
    as_field: Callable[[Any], Any] = _same


def option(default: Any, help: str, **more: Any) -> Any:
    """Make a dataclass field an option; more: fields of ``Option``. ``...`` makes it required."""
    default = dataclasses.MISSING if default is ... else default
    return dataclasses.field(default=default, metadata={"option": Option(help=help, **more)})


def options_of(owner: Any) -> tuple[Option, ...]:
    """List the options of a dataclass or an instance; an instance's values are the defaults."""
    found = []
    for field in dataclasses.fields(owner):
        told = field.metadata.get("option")
        if told is None:
            continue
        default = field.default if isinstance(owner, type) else getattr(owner, field.name)
        found.append(
            dataclasses.replace(
                told,
                name=told.name or field.name,
                field=field.name,
                type=told.type or field.type,
                default=default if default is dataclasses.MISSING else told.as_option(default),
            )
        )
    return tuple(found)


# Options that several methods share.


def target_option(default: str | tuple[str, ...], layers: str = "") -> Any:
    """Make the option ``--target``. layers: its help, if the usual one does not fit"""
    return option(
        default,
        layers or "Encoder layers to adapt: qkv, proj, lin1, lin2, or a regular expression",
        type=tuple[str, ...],
        metavar="LAYER ...",
        as_option=lambda target: (target,) if isinstance(target, str) else target,
        as_field=lambda target: target[0] if len(target) == 1 else target,
    )


def alpha_option(default: float | None) -> Any:
    """The option ``--alpha``."""
    return option(
        default,
        "Scale the update by alpha / rank",
        type=float,
        hint="default: the rank" if default is None else None,
        as_option=lambda alpha: alpha if alpha is None else float(alpha),
    )


def dropout_option(default: float) -> Any:
    """The option ``--dropout``."""
    return option(default, "Dropout on the adapter's input during training")
