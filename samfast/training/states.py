# SPDX-License-Identifier: Apache-2.0
"""The states of a run on disk, from which it goes on after a kill as if there had been none.

Each is a folder under ``state/``, which one rename puts in place with all its files:

adapter_model.safetensors, adapter_config.json    an adapter folder, for ``predict`` too
training.safetensors    tensors of the optimizer and of the random generators; its header holds the
                        record (place in the run, scores, schedule, settings) and a digest of both

A state that lacks a file, or whose digest is wrong, is not complete.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save

from samfast.adapters.foreign import Foreign
from samfast.files.format import CONFIG, TENSORS, digest, read_adapter
from samfast.files.placing import write_together
from samfast.training.run_folder import STATES

TRAINING = "training.safetensors"
VERSION = 1
_Place = tuple[int, int, float]  # epoch, batches of it that are done, when it was saved
_NAME = re.compile(r"(step|epoch)-\d+(-\d+)?")


@dataclass(frozen=True)
class State:
    """A complete state, read and checked. tensors: by name; the adapter's are in its folder"""

    folder: Path
    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, batches of it that are done)."""
        return self.record["epoch"], self.record["batch"]

    def title(self) -> str:
        """How sentences name the place."""
        epoch, batch = self.place
        step = f"step {self.record['step']}"
        return f"{step}, epoch {epoch}" if batch else f"{step}, the end of epoch {epoch - 1}"


def save_state(
    folder: Path,
    adapter: dict[str, bytes],
    record: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    keep: int,
) -> Path:
    """Write a state in one step, then remove all but the ``keep`` newest ones up to this one.

    folder: where; next to it if it is there already, because it may be the only state
    adapter: the files of an adapter folder. Later states are of a run that went on from an earlier
    state than theirs, so they go; what has another name than states have stays. OSError names the
    file that could not be written, and then earlier states are as they were.
    """
    record = {"format": VERSION, "saved": time.time(), **record}
    record = json.loads(json.dumps(record, default=os.fspath))
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {"samfast": json.dumps({"record": record, "sha256": digest(record, tensors)})}
    files = {**adapter, TRAINING: save(tensors, metadata=header)}
    name, number = folder.name, 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    write_together(folder, files)
    places = dict(_places(folder.parent))
    complete = _complete(places)
    now = complete[folder][:2]
    earlier = [own for own in sorted(complete, key=complete.__getitem__) if complete[own][:2] < now]
    for old in set(places) - {folder, *earlier[max(0, len(earlier) - keep + 1) :]}:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def newest_state(run: Path) -> tuple[State | None, list[str]]:
    """The newest complete state of a run's folder, and why others were left out."""
    places = dict(_places(run / STATES))
    left_out = [f"state {folder} is not complete" for folder, own in places.items() if own is None]
    complete = _complete(places)
    for folder in sorted(complete, key=complete.__getitem__, reverse=True):
        try:
            return read_state(folder), left_out
        except (ValueError, OSError) as error:
            left_out.append(str(error))
    return None, left_out


def later_states(state: State) -> list[Path]:
    """The states next to this one that are later, which go when the run saves again."""
    places = dict(_places(state.folder.parent))
    own = places.get(state.folder)
    return [folder for folder, place in places.items() if own and place and place > own]


def read_state(folder: Path) -> State:
    """Read a state and check it. Raises FileNotFoundError and ValueError with its name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"state {folder} does not exist")
    for name in (CONFIG, TENSORS, TRAINING):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"state {folder} is not complete: it has no {name}")
    try:
        with safetensors.safe_open(folder / TRAINING, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record, stored = _header(file)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"state {folder} is damaged: {TRAINING}: {error}") from None
    if record["format"] != VERSION:
        raise ValueError(
            f"state {folder} has the format {record['format']!r}, and this samfast reads {VERSION}"
        )
    if digest(record, tensors) != stored:
        raise ValueError(f"state {folder} is damaged: {TRAINING} does not have its digest")
    read_adapter(folder)
    return State(folder, record, tensors)


def _complete(places: Mapping[Path, _Place | None]) -> dict[Path, _Place]:
    """The places of what is complete."""
    return {folder: place for folder, place in places.items() if place is not None}


def _places(states: Path) -> Iterator[tuple[Path, _Place | None]]:
    """(folder, (epoch, batch, when)) of what has a state's name; None for what is not complete."""
    if not states.is_dir():
        return
    for folder in states.iterdir():
        if not folder.is_dir() or not _NAME.fullmatch(folder.name):
            continue
        try:
            complete = all((folder / name).is_file() for name in (CONFIG, TENSORS))
            with safetensors.safe_open(folder / TRAINING, framework="pt", device="cpu") as file:
                record, _ = _header(file)
            place = (int(record["epoch"]), int(record["batch"]), float(record["saved"]))
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError):
            complete = False
        yield folder, place if complete else None


def _header(file: Foreign) -> tuple[dict[str, Any], str]:
    """The record of a training file and its digest; ValueError, TypeError, KeyError without."""
    content = json.loads(file.metadata()["samfast"])
    return content["record"], content["sha256"]
