# SPDX-License-Identifier: Apache-2.0
"""Command lines from dataclasses, by the standard library alone."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any


def parsed(settings: type, arguments: Sequence[str] | None = None) -> Any:
    """An instance of the dataclass ``settings`` from the command line or from ``arguments``.

    A field ``image_size: int`` is the option --image-size or --image_size; a bool is a pair
    --record and --no-record; a Literal gives choices; with ``| None`` the word None is None.
    """
    parser = argparse.ArgumentParser(description=settings.__doc__, allow_abbrev=False)
    kinds = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        names = dict.fromkeys((f"--{field.name.replace('_', '-')}", f"--{field.name}"))
        told = field.metadata.get("help", "")
        parser.add_argument(
            *names,
            dest=field.name,
            default=field.default,
            help=f"{told} (default: {field.default})".strip(),
            **_kind(kinds[field.name]),
        )
    return settings(**vars(parser.parse_args(arguments)))


def _kind(kind) -> dict[str, Any]:
    """How argparse reads a value of a type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (inner,) = (one for one in typing.get_args(kind) if one is not type(None))

        def read(text: str):
            return None if text == "None" else inner(text)

        return {"type": read, "metavar": f"{inner.__name__.upper()}|None"}
    return {"type": kind, "metavar": kind.__name__.upper()}
