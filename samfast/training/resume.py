# SPDX-License-Identifier: Apache-2.0
"""Which state a run resumes from, and which of its settings may have changed since."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from samfast.training.run_folder import (
    STATES,
    check_folder,
    has_result,
    has_states,
    holds_something,
)
from samfast.training.settings import FinetuneSettings
from samfast.training.states import State, later_states, newest_state, read_state

NEWEST = "newest"
OF_NO_EFFECT = {  # on what is trained
    "output",
    "overwrite",
    "overlays",
    "dry_run",
    "json",
    "resume",
    "save_every",
    "keep",
    "threads",
    "license",
    "workers",
    # What settings.json records with them; ``facts`` has those of them that matter.
    "versions",
    "device",
    "command",
    "processes",
}
_MAY_CHANGE = {
    "data",  # the folder may have moved; its files are compared by name
    "tasks",
    "mask_suffix",
    "checkpoint",  # its weights are compared by their digest
    "epochs",
    "patience",
    "lr",
    "relation_lr",
    "schedule",
    "clip",
    "weight_decay",
    "precision",
    "base_dtype",
    "memory",
    "decoder_chunk",
    "fuse",
    "graph",
    "cache",  # an image is encoded by itself, and in a batch where nothing is kept
    "backend",
}


def run_of(settings: FinetuneSettings) -> Path | None:
    """The run's folder that ``resume`` names by itself or by one of its states; None for neither.

    Raises FileNotFoundError when a named path is missing, ValueError when it has no state or is of
    another run than ``output``.
    """
    if settings.resume in (None, NEWEST):
        return None
    path = Path(settings.resume)
    if not path.exists():
        raise FileNotFoundError(f"resume {path} does not exist; name a run's folder or a state")
    is_state = path.parent.name == STATES
    run = path.parent.parent if is_state else path
    if not is_state and not (run / STATES).is_dir():
        raise ValueError(
            f"resume {path} is neither a run folder with states nor a state; to begin a run that "
            f"saved none, name its folder with --output"
        )
    if settings.output is not None and settings.output.resolve() != run.resolve():
        raise ValueError(
            f"resume {path} is in the run {run}, but output is {settings.output}; leave out "
            "--output, since a run continues in its own folder"
        )
    return run


def check_resumable(folder: Path) -> None:
    """Raise ValueError if results without a state would be in the way; changes nothing."""
    check_folder(folder)
    if holds_something(folder) and not has_states(folder):
        what = "an earlier run's results" if has_result(folder) else "something else"
        raise ValueError(
            f"output folder {folder} holds {what} and no state to resume from; choose another "
            "--output, or use --overwrite instead of --resume to start again"
        )


def state_for(settings: FinetuneSettings, folder: Path) -> tuple[State | None, list[str]]:
    """The state that ``resume`` names, or the newest complete one; and what to say about it."""
    assert settings.resume is not None
    if settings.resume == NEWEST or Path(settings.resume).parent.name != STATES:
        found, left_out = newest_state(folder)
        if found is None and (left_out or settings.resume != NEWEST):
            said = "; ".join(left_out) or "there is none"
            raise ValueError(
                f"no state in {folder} is complete ({said}); --overwrite starts the run again"
            )
        if found is None:
            return None, [f"no state to resume from in {folder}: the run starts from the beginning"]
        remarks = [f"left out: {why}" for why in left_out]
    else:
        found, remarks = read_state(Path(settings.resume)), []
    later = len(later_states(found))
    more = f"; the next save removes {later} that came later" if later else ""
    return found, [*remarks, f"resuming from {found.folder} ({found.title()}){more}"]


def check_same_run(state: State, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return what has changed since the state, as a sentence; "" if nothing has.

    settings: as ``settings.json`` has them   facts: of the machine, the versions and the images
    Raises ValueError for a change that makes it a different run.
    """
    before = state.record["settings"]
    defaults = {f.name: f.default for f in dataclasses.fields(FinetuneSettings)}
    changes = []
    for name, now in _as_json(settings).items():
        old = before.get(name, defaults.get(name))
        if name in OF_NO_EFFECT or old == now:
            continue
        if name in ("train", "val"):
            raise ValueError(f"resume {state.folder}: {_files(name, old or [], now)}")
        change = f"{name} was {_text(old)} and is {_text(now)}"
        if name not in _MAY_CHANGE:
            raise ValueError(
                f"resume {state.folder}: {change}; continue a run with the {name} that it began "
                "with"
            )
        changes.append(change)
    known = state.record["facts"]
    for name, now in _as_json(facts).items():
        for where, old, new in _differences(known.get(name), now, name):
            change = f"{where} was {_text(old)} and is {_text(new)}"
            if name == "images":
                path = where.partition(".")[2]
                raise ValueError(
                    f"resume {state.folder}: the image or mask of {path} has changed since the "
                    "run began; continue a run with the same images"
                )
            if name in ("processes", "what is learned"):
                raise ValueError(f"resume {state.folder}: {change}; continue a run as it began")
            changes.append(change)
    return f"changed since: {', '.join(changes)}" if changes else ""


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(values), default=os.fspath))


def _differences(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """(place, old, new) of each value in which two JSON values differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}")
    elif old != new:
        yield where, old, new


def _files(part: str, old: list[str], now: list[str]) -> str:
    what = {"train": "training", "val": "validation"}[part]
    gone, new = sorted(set(old) - set(now)), sorted(set(now) - set(old))
    said = [f"{names[0]} is {kind}" for names, kind in ((gone, "gone"), (new, "new")) if names]
    said = said or ["their order differs"]
    return (
        f"the {what} images are not those that the run began with ({len(old)} then, {len(now)} "
        f"now; {', '.join(said)})"
    )


def _text(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
