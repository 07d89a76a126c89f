# SPDX-License-Identifier: Apache-2.0
"""JSON files of other programs: strictly what the standard allows, and one sentence otherwise."""

import json
from pathlib import Path
from typing import Any

from samfast.training.rle import shown

MOST_BYTES = 2 << 30
_MOST_DIGITS = 18  # of an integer; more do not fit into 64 bits
_ADVICE = "export it again"


class _Refused(Exception):
    """A phrase that follows "FILE "; no error of JSON's own, so that no handler takes it."""


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8, with or without a mark of its encoding.

    Raises FileNotFoundError for a missing file, and ValueError for one that is not a regular file,
    is too large, is not JSON, or has NaN, Infinity, a key twice, or numbers beyond 64 bits.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():  # a pipe or a device would block or never end
        raise ValueError(f"{path} is not a regular file")
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise _Refused(f"has {size} bytes, more than {MOST_BYTES}; split it")
        return _parsed(_text(path.read_bytes()))
    except _Refused as refused:
        raise ValueError(f"{path} {refused}") from None
    except RecursionError:
        raise ValueError(f"{path} nests JSON too deeply; {_ADVICE}") from None
    except MemoryError:
        raise ValueError(f"{path} does not fit into memory; split it") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} is not JSON: {error.msg} in {place}; {_ADVICE}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def _text(data: bytes) -> str:
    if not data.strip():
        raise _Refused(f"is empty; {_ADVICE}")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        raise _Refused("is in UTF-16 or UTF-32, or is not text; save it in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Refused(f"is not in UTF-8 (byte {error.start}); save it in UTF-8") from None


def _parsed(text: str) -> Any:
    return json.loads(
        text,
        object_pairs_hook=_object,
        parse_constant=_no_constant,
        parse_int=_integer,
        parse_float=_float,
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise _Refused(f"has the key {shown(key)} twice in one object; {_ADVICE}")
        made[key] = value
    return made


def _no_constant(name: str) -> Any:
    raise _Refused(f"holds {name}, which JSON does not have; {_ADVICE}")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _MOST_DIGITS:
        raise _Refused(f"holds the number {digits[:20]}... of {len(digits)} digits; {_ADVICE}")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Refused(f"holds the number {text[:20]}, which is too large; {_ADVICE}")
    return value
