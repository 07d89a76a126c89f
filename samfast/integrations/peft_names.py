# SPDX-License-Identifier: Apache-2.0
"""Find the modules that the names in a PEFT config mean, by PEFT's rules."""

import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from samfast.adapters.foreign import Foreign

Entries = str | Collection[str]

_ALL_LINEAR = "all-linear"


def layers_of(config: Any, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the linear layers that the config adapts, by full name.

    prefix: what a wrapper puts before the names; they match with it or without it

    Raises ValueError if there are none, or if one is of another class.
    """
    target = _checked(config.target_modules, "target_modules")
    if not target:
        raise ValueError(
            f"target_modules is {config.target_modules!r}, but PEFT has no default for SAM; name "
            'layers, such as ["qkv"]'
        )
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(target, str) and target.lower() == _ALL_LINEAR:
        target = _every_linear(model)
    matched = {n: m for n, m in modules.items() if _matches(target, n, prefix)}
    if not matched:
        known = {n.rpartition(".")[2]: n for n, m in modules.items() if isinstance(m, nn.Linear)}
        some = ", ".join(list(known.values())[:4])
        raise ValueError(
            f"target_modules {_shown(target)} match no layer; linear layers there are {some}"
        )
    exclude = _checked(getattr(config, "exclude_modules", None), "exclude_modules")
    layers = {
        name: module
        for name, module in matched.items()
        if not (exclude and _matches(exclude, name, prefix)) and not _saved_whole(config, name)
    }
    if not layers:
        raise ValueError(
            f"target_modules {_shown(target)} match {len(matched)} layers, but exclude_modules or "
            "modules_to_save leave all of them out"
        )
    for name, module in layers.items():
        if not isinstance(module, nn.Linear):
            raise ValueError(_not_linear(name, module, target, layers, prefix))
    return layers


def trained_modules(config: Any, model: nn.Module) -> tuple[str, ...]:
    """Return full names of the modules whose names end as modules_to_save says."""
    entries = config.modules_to_save or ()
    if isinstance(entries, str):
        raise ValueError(f"modules_to_save is {entries!r}; pass a list of names")
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name, m in modules.items() if name and any(True for _ in m.parameters())]
    found: dict[str, None] = {}
    for entry in entries:
        if not isinstance(entry, str):
            raise ValueError(f"modules_to_save has {entry!r}, which is not the name of a module")
        matched = [name for name in names if entry and name.endswith(entry)]
        if not matched:
            parts = ", ".join(leaf for leaf, _ in model.named_children())
            raise ValueError(
                f"modules_to_save names {entry!r}, but no module with parameters ends so; the "
                f"model's parts are {parts}"
            )
        found.update(dict.fromkeys(matched))
    return tuple(found)


def patterns_of(config: Any, model: nn.Module, layers: Collection[str]) -> tuple[str, ...]:
    """Return regular expressions for exactly these layers: short ones, or else their names."""
    target = config.target_modules
    if isinstance(target, str):
        short: tuple[str, ...] = (".*",) if target.lower() == _ALL_LINEAR else (_apart(target),)
    else:
        short = tuple(rf"(.*\.)?{re.escape(entry)}" for entry in sorted(target))
    linear = [name for name, m in model.named_modules() if name and isinstance(m, nn.Linear)]
    if {n for n in linear if any(re.fullmatch(t, n) for t in short)} == set(layers):
        return short
    return tuple(f"(?:{re.escape(name)})" for name in layers)


def _apart(pattern: str) -> str:
    """Return a regular expression for ``attach``, never a plain name."""
    return f"(?:{pattern})" if pattern.isidentifier() else pattern


def _checked(entries: Entries | None, option: str) -> Entries | None:
    """Raise ValueError for an invalid regular expression."""
    if isinstance(entries, str):
        try:
            re.compile(entries)
        except re.error as error:
            raise ValueError(
                f"{option} {entries!r} is not a regular expression: {error}; pass a list of names"
            ) from None
    return entries


def _matches(entries: Entries, name: str, prefix: str = "") -> bool:
    """Match a name: a string is a regular expression, a list entry is a name or its end."""
    if isinstance(entries, str):
        return any(re.fullmatch(entries, full) for full in {name, prefix + name})
    return any(
        full in entries or any(full.endswith(f".{entry}") for entry in entries)
        for full in {name, prefix + name}
    )


def _saved_whole(config: Any, name: str) -> bool:
    """True inside modules of modules_to_save, where PEFT adapts nothing (0.15 still did)."""
    whole = config.modules_to_save or ()
    try:
        return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in whole)
    except re.error as error:
        raise ValueError(
            f"modules_to_save {whole!r} has a name that is not a regular expression: {error}; PEFT "
            "takes them as such"
        ) from None


def _every_linear(model: nn.Module) -> set[str]:
    """Return the layers of "all-linear": all linear ones but a transformers model's output."""
    found = {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) or _has_class(m, "transformers.pytorch_utils", "Conv1D")
    }
    if _has_class(model, "transformers.modeling_utils", "PreTrainedModel"):
        transformers_model: Foreign = model
        output = transformers_model.get_output_embeddings()
        found -= {name for name, m in model.named_modules() if output is not None and m is output}
    return found


def _has_class(module: nn.Module, package: str, name: str) -> bool:
    kinds = type(module).__mro__
    return any((kind.__module__, kind.__qualname__) == (package, name) for kind in kinds)


def _not_linear(
    name: str,
    module: nn.Module,
    target: Entries,
    layers: Mapping[str, nn.Module],
    prefix: str,
) -> str:
    """Write a sentence about a match of another class, with a longer entry that excludes it."""
    way = "leave it out with exclude_modules"
    entries = () if isinstance(target, str) else sorted(target)
    for entry in (e for e in entries if _matches([e], name, prefix)):
        for other in (n for n, m in layers.items() if isinstance(m, nn.Linear)):
            longer = ".".join(other.split(".")[-entry.count(".") - 2 :])
            if _matches([entry], other, prefix) and not _matches([longer], name, prefix):
                way = f'write "{longer}" instead of "{entry}"'
    return (
        f"target_modules also match {name}, a {type(module).__name__}, but samfast.attach adapts "
        f"only nn.Linear; {way}"
    )


def _shown(target: Entries) -> str:
    return repr(target) if isinstance(target, str) else reprlib.repr(sorted(target))
