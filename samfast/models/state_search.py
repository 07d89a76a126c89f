# SPDX-License-Identifier: Apache-2.0
"""Find a SAM's state dict in what training scripts save: nested dicts, prefixes, other parts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_USUAL = ("model", "state_dict", "model_state_dict")  # preferred to other copies in the same file
_WRAPPING = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ENCODERS = ("image_encoder", "vision_encoder")  # segment_anything's name, Hugging Face's
_PARTS = (*_ENCODERS, "mask_decoder", "prompt_encoder", "shared_image_embedding")
_PATCHES = ("patch_embed.proj.weight", "patch_embed.projection.weight")
_DEEPEST = 4


@dataclass(frozen=True)
class Found:
    """A SAM in a checkpoint.

    place: keys and prefix in front of its names, such as "model_state.sam.", or ""
    names: maps the file's keys to names without prefix and wrappers' components
    values: the file's values under these keys
    left: tensors, and dicts of tensors, that do not belong to the SAM
    copies: places of other SAMs
    """

    place: str
    names: dict[str, str]
    values: Mapping[str, Any]
    left: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)


def find_sam(content: Mapping[Any, Any]) -> Found | None:
    """Find the SAM in a checkpoint; return None if there is none.

    If there are several, the one under a usual key ("model", "state_dict", "model_state_dict")
    counts, and the others are in ``copies``. Raises ValueError, with the end of a sentence, unless
    exactly one of them has a usual key.
    """
    found = [one for path, state in _states(content) for one in _sams(path, state)]
    if not found:
        return None
    most = max(_completeness(one) for one in found)
    full = [one for one in found if _completeness(one) == most]
    usual = [[one for one in full if one.place.partition(".")[0] == key] for key in _USUAL]
    chosen = full if len(full) == 1 else next(filter(None, usual), full)
    if len(chosen) > 1:
        places = " and ".join(shown(one.place) for one in full)
        raise ValueError(
            f"holds {len(full)} SAMs, {places}; save the state dict of only one of them"
        )
    copies = [one for one in full if one is not chosen[0]]
    left = _left(content, chosen[0], [id(one.values) for one in copies])
    others = [one.place for one in copies]
    return Found(chosen[0].place, chosen[0].names, chosen[0].values, left, others)


def _states(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield every nested dict once, except optimizers', with the keys that lead there."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    while waiting:
        path, state = waiting.pop(0)
        if id(state) in seen or "param_groups" in state:
            continue
        seen.add(id(state))
        yield path, state
        if len(path) < _DEEPEST:
            inner = ((k, v) for k, v in state.items() if isinstance(k, str))
            waiting += [((*path, k), v) for k, v in inner if isinstance(v, Mapping)]


def _sams(path: tuple[str, ...], state: Mapping[Any, Any]) -> list[Found]:
    """Group the names of one dict by the prefix in front of "image_encoder."."""
    named = (k for k, v in state.items() if isinstance(k, str) and not isinstance(v, Mapping))
    plain = {key: _without_wrapping(key) for key in named}
    prefixes: dict[str, None] = {}  # in the file's order
    for key in plain:
        components = key.split(".")
        for i, component in enumerate(components[:-1]):
            if component in _ENCODERS:
                prefixes[".".join(components[:i])] = None
                break
    found = []
    for prefix in prefixes:
        start = f"{prefix}." if prefix else ""
        inside = len(_without_wrapping(start))
        names = {k: plain[k][inside:] for k in plain if k.startswith(start)}
        names = {k: n for k, n in names.items() if n.partition(".")[0] in _PARTS}
        found.append(Found(".".join((*path, prefix)).strip("."), names, state))
    return found


def _without_wrapping(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPING)


def _completeness(found: Found) -> int:
    """Count a SAM's parts; an encoder without patches counts as half."""
    names = set(found.names.values())
    parts = {name.partition(".")[0] for name in names}
    encoder = any(f"{part}.{patches}" in names for part in _ENCODERS for patches in _PATCHES)
    return 2 * len(parts & {"mask_decoder", "prompt_encoder"}) + 1 + encoder


def _left(content: Mapping[Any, Any], chosen: Found, others: list[int]) -> list[str]:
    """List tensors next to the SAM's, and other dicts that hold tensors by name."""
    left, skipped = [], set()
    for path, state in _states(content):
        if any(path[:i] in skipped for i in range(len(path) + 1)) or id(state) in others:
            continue
        named = [k for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)]
        if not path or state is chosen.values:
            mine = chosen.names if state is chosen.values else ()
            left += [".".join((*path, key)) for key in named if key not in mine]
        elif named:
            skipped.add(path)
            left.append(".".join(path))
    return left


def shown(place: str) -> str:
    """Name a prefix for a sentence."""
    return repr(place) if place else "one without a prefix"
