# SPDX-License-Identifier: Apache-2.0
"""tasks.yaml: what each of several tasks predicts, where its truth lies, and what it weighs.

    tasks:
      - name: classes
        kind: semantic
        channels: 11
        ignore: 11
      - name: boundary
        derive: boundary
        from: classes

Every mistake is one ValueError or FileNotFoundError, a sentence with the file and the values.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from samfast.models import Task
from samfast.models.heads import MULTI_TASK
from samfast.models.multi_task import tasks_from_config
from samfast.training.foreground import ANY, Foreground, chosen_foreground
from samfast.training.settings import TASK_LOSSES

Values = TypeVar("Values", Tensor, np.ndarray)

UNLABELLED = 255  # of semantic masks, whatever else is ignored
DERIVED = {"boundary": "binary", "distance": "regression"}  # of classes
OF_OBJECTS = {"foreground": "binary", "centre": "regression", "depth": "regression"}
_OF_KIND = dict.fromkeys(("foreground", "threshold"), "binary")
_OF_KIND |= dict.fromkeys(("scale", "offset"), "regression") | {"classes": "semantic"}


@dataclass(frozen=True)
class TaskSpec:
    """One task of a run.

    name, kind, channels: as in ``samfast.models.Task``
    folder: its masks under the data folder (with train/ and val/, under each of them); or a folder
        with images/ and masks/ of its own
    derive: made of the folder's class labels: "boundary", the pixels next to another class, or
        "distance", in pixels to the nearest of these; or of objects' numbers, see ``objects_maps``
    weight: of its loss in the sum   loss: see samfast.training.settings.TASK_LOSSES
    ignore: stored values that count nowhere; of semantic tasks 255 too
    foreground: of binary tasks, stored values that are foreground, or ("any",): all above 0; if not
        given, masks together hold 0 and one other value
    threshold: of binary tasks, in place of foreground: stored values above it are foreground
    scale, offset: of regression, the model predicts scale * stored value + offset
    classes: of semantic tasks, the name of each class from 0 on; () for none
    """

    name: str
    kind: str = "binary"
    channels: int = 1
    folder: str = "masks"
    derive: str | None = None
    weight: float = 1.0
    loss: str = ""
    ignore: tuple[float, ...] = ()
    foreground: tuple[int | str, ...] | None = None
    threshold: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        task = self.task  # checks name, kind and channels
        losses = TASK_LOSSES[self.kind]
        object.__setattr__(self, "loss", self.loss or losses[0])
        if self.loss not in losses:
            raise ValueError(
                f"task {task.name} has loss {self.loss!r}; known for {self.kind} tasks are "
                f"{', '.join(losses)}"
            )
        self._check_numbers()
        made = (DERIVED | OF_OBJECTS).get(self.derive or "")
        if self.derive is not None and (self.kind, self.channels) != (made, 1):
            raise ValueError(
                f"task {task.name} is {self.kind} with {self.channels} channels, but derive "
                f"{self.derive} is {made} with 1"
            )
        for key, kind in _OF_KIND.items():
            if getattr(self, key) != TaskSpec.__dataclass_fields__[key].default:
                if self.kind != kind or (kind == "binary" and self.derive is not None):
                    raise ValueError(f"task {task.name} has {key}, which only {kind} masks have")
        if self.classes:
            self._check_classes()
        try:
            chosen_foreground(self.foreground, self.threshold)
        except ValueError as error:
            raise ValueError(f"task {task.name}: {error}") from None
        if self.loss == "cosine" and self.channels != 3:
            raise ValueError(
                f"task {task.name} has {self.channels} channels, but loss cosine needs 3 (the x, "
                "y and z of directions)"
            )
        parts = PurePath(self.folder).parts
        if not parts or PurePath(self.folder).is_absolute() or ".." in parts or "\0" in self.folder:
            raise ValueError(
                f"task {task.name} has folder {self.folder!r}, which is not a folder inside the "
                "data folder"
            )

    def _check_numbers(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"task {self.name} has weight {self.weight:g}; it must be above 0")
        if self.scale == 0 or not math.isfinite(self.scale):
            raise ValueError(
                f"task {self.name} has scale {self.scale:g}; it must be a finite number, not 0"
            )
        if not math.isfinite(self.offset):
            raise ValueError(f"task {self.name} has offset {self.offset:g}; it must be finite")

    def _check_classes(self) -> None:
        if len(self.classes) != self.channels:
            raise ValueError(
                f"task {self.name} has {self.channels} channels, but {len(self.classes)} classes; "
                f"name each from 0 to {self.channels - 1}"
            )
        for name in self.classes:
            if not name.strip():
                raise ValueError(f"task {self.name} has a class without a name: {name!r}")
            if self.classes.count(name) > 1:
                raise ValueError(f"task {self.name} has two classes called {name!r}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class of a semantic task, or its number."""
        return self.classes or tuple(str(i) for i in range(self.channels))

    @property
    def task(self) -> Task:
        return Task(self.name, self.kind, self.channels)

    @property
    def labels(self) -> bool:
        """Whether its files hold class labels."""
        return self.kind == "semantic" or self.derive is not None

    @property
    def of_objects(self) -> bool:
        """Whether its files hold the numbers of objects."""
        return self.derive in OF_OBJECTS

    @property
    def object_map(self) -> str:
        """Which map of the objects it predicts; "" of a task that is not of objects."""
        return self.derive or ""

    @property
    def rule(self) -> Foreground:
        """Which stored values of a binary task are foreground."""
        return chosen_foreground(self.foreground, self.threshold)

    def stored_units(self, values: Tensor) -> Tensor:
        """What a regression's values would be in a file."""
        return (values - self.offset) / self.scale

    def model_units(self, stored: Values) -> Values:
        """What the model predicts where a regression's file holds ``stored``."""
        return self.scale * stored + self.offset

    def config(self) -> dict[str, Any]:
        """The task as JSON values."""
        config = dataclasses.asdict(self)
        if not self.classes:  # so that versions without this key read it
            del config["classes"]
        return config


def specs_from_config(config: Any) -> tuple[TaskSpec, ...]:
    """The tasks that ``TaskSpec.config`` describes; ValueError when it describes none."""
    known = set(TaskSpec.__dataclass_fields__)
    if not isinstance(config, list) or not all(
        isinstance(task, dict) and "name" in task and set(task) <= known for task in config
    ):
        raise ValueError(f"{config!r} does not describe tasks")
    given = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in task.items() if v is not None}
        for task in config
    ]
    for task in given:
        if not isinstance(task.get("name"), str):
            raise ValueError(f"a task has the name {task.get('name')!r}; expected text")
    return tuple(_spec(_checked(task), {}) for task in given)


def chosen_specs(folder: Path, record: dict[str, Any], task: str | None) -> tuple[TaskSpec, ...]:
    """The tasks of an adapter's record, or the one of this name; () for an adapter of one mask.

    folder: the adapter's, for the sentence when there is no such task
    """
    if record.get("head") != MULTI_TASK:
        if task is not None:
            raise ValueError(f"adapter {folder} has one mask and no tasks; leave out --task")
        return ()
    # An adapter that the command line did not write knows what its decoders predict.
    config = record["extra"].get("tasks", record.get("classes"))
    try:
        specs = specs_from_config(config)
        if tuple(spec.task for spec in specs) != tasks_from_config(record.get("classes")):
            raise ValueError("its tasks do not match its decoders")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"adapter {folder} cannot be used: {error}") from None
    if task is None:
        return specs
    names = [spec.name for spec in specs]
    if task not in names:
        raise ValueError(f"adapter {folder} has no task {task!r}; {_nearest(task, names)}")
    return (specs[names.index(task)],)


_ANY = ("foreground", ANY)
_KEYS = {
    "name": str,
    "kind": str,
    "channels": int,
    "folder": str,
    "weight": float,
    "loss": str,
    "ignore": list,
    "foreground": list,
    "threshold": float,
    "scale": float,
    "offset": float,
    "classes": tuple,
    "derive": str,
    "from": str,
}


def read_tasks(path: Path | str) -> tuple[TaskSpec, ...]:
    """The tasks of a YAML file, checked."""
    import yaml  # comes with accelerate

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"tasks file {path} does not exist or is not a file")
    twice: list[str] = []

    class Loader(yaml.SafeLoader):
        """Notices a key that stands twice in one place, of which YAML keeps the last."""

        def compose_mapping_node(self, anchor: str | None) -> Any:
            node = super().compose_mapping_node(anchor)  # before << brings keys from elsewhere
            twice.extend(_keys_given_twice(node))
            return node

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        if twice:
            raise ValueError(twice[0])
        return parsed(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _keys_given_twice(mapping: Any) -> Iterator[str]:
    """A sentence for each key that a mapping of YAML has had before."""
    lines: dict[tuple[str, str], int] = {}
    names = [value.value for key, value in mapping.value if key.value == "name"]
    what = f"task {names[0]}" if names and isinstance(names[0], str) else "the file"
    for key, _ in mapping.value:
        kind, line = (key.tag, str(key.value)), key.start_mark.line + 1
        if kind in lines and not key.tag.endswith(":merge"):
            yield (
                f"{what} has the key {key.value!r} twice, in line {lines[kind]} and in line {line}"
            )
        lines.setdefault(kind, line)


def parsed(content: Any) -> tuple[TaskSpec, ...]:
    """The tasks of what a YAML file holds."""
    if not isinstance(content, dict):
        raise ValueError("there is no list under tasks:")
    _check_keys("the file", content, ("tasks",))
    given = content.get("tasks")
    if not isinstance(given, list) or not given:
        raise ValueError("there is no list under tasks:")
    for number, entry in enumerate(given, start=1):
        if not isinstance(entry, dict) or "name" not in entry:
            raise ValueError(f"task {number} has no name")
        if not isinstance(entry["name"], str):
            raise ValueError(
                f"task {number} has the name {entry['name']!r}; expected text, so quote it"
            )
        if (made := entry.get("derive")) in OF_OBJECTS:
            raise ValueError(
                f"task {entry['name']} has derive {made}, which is for objects; train them with "
                "--masks instances instead of --tasks"
            )
    names = [entry["name"] for entry in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tasks are called {name}")
    entries = {entry["name"]: _checked(entry) for entry in given}
    return tuple(_spec(entry, entries) for entry in entries.values())


def _check_keys(what: str, entry: dict, known: Collection[str]) -> None:
    for key in entry:
        if key not in known:
            raise ValueError(f"{what} has an unknown key {key!r}; {_nearest(key, known)}")


def _nearest(given: Any, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(given), known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def _checked(entry: dict) -> dict:
    """The entry with its values' types checked."""
    name = entry["name"]
    _check_keys(f"task {name}", entry, _KEYS)
    checked = {}
    for key, value in entry.items():
        kind = _KEYS[key]
        if kind is list and (isinstance(value, (int, float)) or (key, value) == _ANY):
            value = [value]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        right = {
            str: isinstance(value, str),
            int: number and isinstance(value, int),
            float: number,
            list: isinstance(value, list) and all(_is_number(v) or (key, v) == _ANY for v in value),
            tuple: isinstance(value, list) and all(isinstance(v, str) for v in value),
        }[kind]
        if not right:
            wanted = {str: "a text", int: "a whole number", float: "a number"}
            wanted[tuple] = "a list of texts; quote numbers and words such as no"
            raise ValueError(f"task {name} has {key} {value!r}, not {wanted.get(kind, 'numbers')}")
        if key in ("foreground", "classes") and not value:
            raise ValueError(f"task {name} has an empty {key}; give at least one value")
        checked[key] = tuple(value) if kind in (list, tuple) else value
    return checked


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _spec(entry: dict, entries: dict[str, dict]) -> TaskSpec:
    """The task of an entry; one derived from another task takes its folder and what it ignores."""
    entry, name = dict(entry), entry["name"]
    derive, source = entry.get("derive"), entry.pop("from", None)
    if derive is not None:
        known = DERIVED | OF_OBJECTS
        if derive not in known:
            raise ValueError(
                f"task {name} has an unknown derive {derive!r}; {_nearest(derive, DERIVED)}"
            )
        entry.setdefault("kind", known[derive])
    if source is not None:
        if derive is None:
            raise ValueError(f"task {name} has from {source!r}, but no derive")
        origin = entries.get(source)
        if origin is None or origin.get("kind") != "semantic":
            classes = [n for n, other in entries.items() if other.get("kind") == "semantic"]
            raise ValueError(
                f"task {name} is derived from {source!r}, which is not a semantic task; "
                + (f"semantic tasks are {', '.join(classes)}" if classes else "there is none")
            )
        for key in ("folder", "ignore"):
            if key in entry:
                raise ValueError(
                    f"task {name} has {key}, but also takes it from task {source}; leave out one "
                    "of them"
                )
            if key in origin:
                entry[key] = origin[key]
    if entry.get("kind") == "semantic" and "channels" not in entry:
        raise ValueError(f"task {name} is semantic; give its number of classes with channels:")
    return TaskSpec(**entry)
