# SPDX-License-Identifier: Apache-2.0
"""Check what each key of an adapter's record holds, whoever wrote it."""

import re
from collections.abc import Callable
from typing import Any

from samfast.adapters.wrappers import ENCODER, ENCODER_OF_HF, ENCODER_OF_META

_SHOWN = 80  # characters shown of a wrong value
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_ENCODERS = ("", ENCODER, ENCODER_OF_HF, ENCODER_OF_META)  # "" for a model without one
_HASH = re.compile(r"[0-9a-f]{64}")
_SIDE = 2**15  # pixels
_INT64 = 2**63


def _or_none(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return _is_whole(value) and 0 < value <= _SIDE


def _is_size(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    return all(map(_is_side, value)) if pair else _is_side(value)


def _is_seed(value: Any) -> bool:
    return _is_whole(value) and -_INT64 <= value < _INT64


def _is_layers(value: Any) -> bool:
    names = isinstance(value, list) and all(map(_is_text, value))
    return names and len(set(value)) == len(value)


_RECORD = {  # key: (rule, what it says)
    "samfast": (_or_none(_is_text), "a version"),
    "layers": (_is_layers, "a list of different names of layers"),
    "base": (lambda value: isinstance(value, dict), "an object"),
    "base_digest": (_is_hash, "a digest of 64 hexadecimal digits"),
    "base_identity": (_or_none(_is_hash), "a digest of 64 hexadecimal digits"),
    "base_dtype": (_or_none(lambda value: value in _DTYPES), f"one of {', '.join(_DTYPES)}"),
    "encoder": (_or_none(lambda value: value in _ENCODERS), "a name of SAM's image encoder"),
    "image_size": (_or_none(_is_size), f"a number of pixels up to {_SIDE}"),
    "head": (_or_none(_is_text), "a name"),
    "extra": (lambda value: isinstance(value, dict), "an object"),
}
_BASE = {
    "name": (_or_none(_is_text), "a name"),
    "checkpoint": (_or_none(_is_text), "a file name"),
    "image_size": (_or_none(_is_side), f"a number of pixels up to {_SIDE}"),
    "seed": (_or_none(_is_seed), "a whole number of 64 bits"),
}


def check_record(record: dict[str, Any]) -> None:
    """Raise ValueError for a value that no adapter has; the method checks its own."""
    _check("", record, _RECORD)
    check_base(record["base"])


def check_base(base: dict[str, Any]) -> None:
    """Raise ValueError for a value that no base model has."""
    _check("base ", base, _BASE)


def _check(
    where: str, given: dict[str, Any], schema: dict[str, tuple[Callable[[Any], bool], str]]
) -> None:
    for key, (rule, wanted) in schema.items():
        if not rule(given.get(key)):
            found = repr(given.get(key))
            found = found if len(found) <= _SHOWN else f"{found[:_SHOWN]}…"
            raise ValueError(f"its record has {where}{key} {found}, not {wanted}")
