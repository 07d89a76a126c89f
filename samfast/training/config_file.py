# SPDX-License-Identifier: Apache-2.0
"""Read fine-tuning options from a YAML or JSON file, as if given on the command line.

    data: photos/kvasir
    method: conv-lora
    batch-size: 4        # or batch_size
    target: [qkv, proj]
    flips: false

A run's settings.json is such a file too. Every mistake is one ValueError or FileNotFoundError, a
sentence with the file, the option and the value. Importing this loads neither torch nor yaml.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from samfast.adapters.options import Option, options_of
from samfast.training.settings import FinetuneSettings

# What settings.json holds next to the options; see ``run_record``.
OF_COMMAND = ("output", "overwrite", "resume", "json", "dry_run")  # not of the training
RECORDED = ("train", "val", "versions", "device", "command", "processes")
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_TAGS = ("null", "bool", "int", "float", "str", "timestamp", "merge", "value")  # YAML's scalars
_KINDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}


class _Scalar(NamedTuple):
    """A value as the file spells it; kind: "null", "bool" or "text", as numbers are too."""

    text: str
    kind: str


class _Entry(NamedTuple):
    """One key of the file. value: a _Scalar, a list of such values, or a dict (of anything)

    line: of the key, None in JSON
    """

    key: str
    value: Any
    line: int | None


def settings_from_file(path: Path | str) -> dict[str, Any]:
    """Read the options in a file, by name, as ``FinetuneSettings`` takes them.

    Options that are null or missing are absent. The file is YAML or JSON: a mapping of options to
    values, or a run's settings.json, without its output folder and recipe defaults. Raises
    ValueError or FileNotFoundError, one sentence.
    """
    path = Path(path)
    entries = _entries(path)
    options = {option.name: option for option in options_of(FinetuneSettings)}
    found: dict[str, _Entry] = {}
    is_record = _is_record(entries)
    for entry in entries:
        name = entry.key.replace("-", "_")
        if is_record and name in RECORDED:
            continue
        if name not in options:
            raise ValueError(f"{_place(path, entry)} has the unknown option {_nearest(name)}")
        if name in found:
            raise ValueError(f"{path} gives {_twice(found[name], entry)}")
        found[name] = entry
    given: dict[str, Any] = {}
    for name, entry in found.items():
        alone, value = options[name].alone, entry.value
        if alone is not None and isinstance(value, _Scalar) and value.kind == "bool":
            given |= {name: alone} if _FLAGS[value.text.lower()] else {}
        elif not (isinstance(value, _Scalar) and value.kind == "null"):
            given[name] = _converted(options[name], entry, path)
    return _without_recipe(given) if is_record else given


def _without_recipe(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a run's record that were chosen, not filled in, and are of training.

    So ``--method`` may name another method next to the record.
    """
    from samfast.training.recipe import with_recipe  # which loads torch

    given = {name: value for name, value in given.items() if name not in OF_COMMAND}
    open_ = {f.name for f in dataclasses.fields(FinetuneSettings) if f.default is None}
    told = {name: value for name, value in given.items() if name not in open_}
    about = {name: given[name] for name in ("checkpoint", "image_size") if name in given}
    filled = vars(with_recipe(FinetuneSettings(**told, **about)))
    return {
        name: value
        for name, value in given.items()
        if name not in open_ or name in about or filled[name] != value
    }


def _is_record(entries: Sequence[_Entry]) -> bool:
    """Whether this is a run's settings.json, which lists the files it trained on."""
    lists = {entry.key for entry in entries if isinstance(entry.value, list)}
    return {"train", "val"} <= lists


def _nearest(name: str) -> str:
    known = [option.name for option in options_of(FinetuneSettings)]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else "samfast finetune --help lists the options"
    return f"{name!r}; {hint}"


def _twice(first: _Entry, second: _Entry) -> str:
    spelt = first.key if first.key == second.key else f"{first.key} and {second.key}, one option,"
    lines = "" if first.line is None else f" in lines {first.line} and {second.line}"
    return f"{spelt} {'twice' if first.key == second.key else 'both'}{lines}; keep one"


def _place(path: Path, entry: _Entry) -> str:
    return f"{path}" if entry.line is None else f"{path}, line {entry.line},"


# Values


def _converted(option: Option, entry: _Entry, path: Path) -> Any:
    """The value as the command line would make it; ValueError for one of another type."""
    kind = option.type
    if isinstance(kind, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    several = get_origin(kind) is tuple
    kinds = _parts(get_args(kind)[0] if several else kind)
    values = entry.value if several and isinstance(entry.value, list) else [entry.value]
    if not values:
        raise ValueError(
            f"{_place(path, entry)} has an empty list for {option.name}; give at least one value, "
            "or leave it out"
        )
    made = tuple(_one(option, value, kinds, entry, path) for value in values)
    return made if several else made[0]


def _parts(kind: Any) -> tuple[Any, ...]:
    """The types that one value may have."""
    return get_args(kind) if get_origin(kind) not in (None, Literal) else (kind,)


def _one(option: Option, value: Any, kinds: Sequence[Any], entry: _Entry, path: Path) -> Any:
    if isinstance(value, _Scalar):
        if value.kind != "null" and not value.text:
            raise ValueError(
                f"{_place(path, entry)} has an empty {option.name}; give it a value, or leave it "
                "out"
            )
        for kind in kinds:
            try:
                return _as(kind, value)
            except ValueError:
                continue
        given = repr(value.text) if value.kind == "text" else value.text
    else:
        given = "a list" if isinstance(value, list) else "a mapping"
    wanted = " or ".join(_name(kind) for kind in kinds)
    raise ValueError(f"{_place(path, entry)} has {option.name} {given}; expected {wanted}")


def _as(kind: Any, value: _Scalar) -> Any:
    """The value as int, float, str, Path, bool or one of a Literal's; ValueError otherwise."""
    if kind is bool:
        if value.kind != "bool":
            raise ValueError
        return _FLAGS[value.text.lower()]
    if value.kind == "null":
        raise ValueError
    if get_origin(kind) is Literal:
        if value.text not in get_args(kind):
            raise ValueError
        return value.text
    return kind(value.text)


def _name(kind: Any) -> str:
    if kind is bool:
        return "true or false"
    return _KINDS.get(kind) or " or ".join(get_args(kind))


# Files


def _entries(path: Path) -> Sequence[_Entry]:
    """What the file's mapping holds, in its order; an empty file holds nothing."""
    text = _text(path)
    if not text.strip():
        return []
    try:
        content = _from_json(text)
    except (json.JSONDecodeError, RecursionError):
        content = _from_yaml(text, path)
    if not isinstance(content, _Mapping):
        raise ValueError(f"{path} is not a mapping of options to values, such as epochs: 20")
    return content


def _text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"config {path} is a folder, not a file")
    if not path.exists():
        raise FileNotFoundError(f"config {path} does not exist")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"config {path} is not a text file in UTF-8") from None
    except OSError as error:
        raise ValueError(f"config {path} cannot be read ({error.strerror})") from None


class _Mapping(list):
    """A mapping as pairs or entries, with all its keys, also those given twice."""


def _from_json(text: str) -> Any:
    """A _Mapping of entries for an object, a _Scalar or a list for anything else."""

    def of(value: Any) -> Any:
        if isinstance(value, _Mapping):
            return dict(value)
        if isinstance(value, list):
            return [of(part) for part in value]
        if value is None or isinstance(value, bool):
            kind = "null" if value is None else "bool"
            return _Scalar(json.dumps(value), kind)
        return _Scalar(value, "text")

    content = json.loads(
        text, object_pairs_hook=_Mapping, parse_int=str, parse_float=str, parse_constant=str
    )
    if isinstance(content, _Mapping):
        return _Mapping(_Entry(key, of(value), None) for key, value in content)
    return of(content)


def _from_yaml(text: str, path: Path) -> Any:
    """As _from_json. Scalars keep their spelling, so that 010 and yes are what they look like."""
    import yaml  # comes with accelerate

    def of(node: Any, depth: int = 0) -> Any:
        if isinstance(node, yaml.MappingNode):
            return {}
        if isinstance(node, yaml.SequenceNode):  # one may hold itself
            return [of(part, depth + 1) for part in node.value] if depth == 0 else []
        name = node.tag.removeprefix("tag:yaml.org,2002:")
        if name not in _TAGS:
            line = node.start_mark.line + 1
            raise ValueError(f"{path}, line {line}, has the tag {name}; write a plain value")
        return _Scalar(node.value, name if name in ("null", "bool") else "text")

    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise ValueError(f"config {path} is not valid YAML{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"config {path} is not valid YAML: {first}") from None
    except RecursionError:
        raise ValueError(f"config {path} is not valid YAML: it is nested too deeply") from None
    if root is None or (root.tag.endswith(":null") and root.value == ""):  # only comments, ---
        return _Mapping()
    if not isinstance(root, yaml.MappingNode):
        return of(root)
    entries = _Mapping()
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{path}, line {line}, has a key that is not the name of an option")
        entries.append(_Entry(key.value, of(value), line))
    return entries
