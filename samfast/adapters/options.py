# SPDX-License-Identifier: Apache-2.0
"""Fields of dataclasses that are options of the command line: help, choices, how they are given.

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

    help: says what the option does; ``hint`` or the default follows it in brackets
    name: on the command line, the field's own if not given   field: of the dataclass
    type: as the command line parses it, the field's own if not given
    default: as the command line would give it; a flag is off
    hint: takes the place of "default: VALUE"
    choices: the values there are   metavar: what stands for the value in the help
    least, most: the smallest and the largest number that is right
    positional: given without its name   repeatable: given once for each value
    alone: the value that the name alone means
    in_folder: a flag that the default output folder is named after
    as_option, as_field: from the field's value to the command line's, and back
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
    most: float = 2**31 - 1  # of whole numbers
    positional: bool = False
    repeatable: bool = False
    alone: str | None = None
    in_folder: bool = False
    as_option: Callable[[Any], Any] = _same
    as_field: Callable[[Any], Any] = _same


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that is an option; more: of ``Option``. ``...`` makes it required."""
    default = dataclasses.MISSING if default is ... else default
    return dataclasses.field(default=default, metadata={"option": Option(help=help, **more)})


def options_of(owner: Any) -> tuple[Option, ...]:
    """The options of a dataclass, or of an instance, whose values are the defaults then."""
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


# Options that several methods have.


def target_option(default: str | tuple[str, ...], layers: str = "") -> Any:
    """The option ``--target``. layers: its help, where the usual one does not fit"""
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
