# SPDX-License-Identifier: Apache-2.0
"""The files of a prediction: masks, classes, values or objects of an image, and pictures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samfast.files.placing import write_whole
from samfast.training.adapter_settings import PredictSettings
from samfast.training.georeference import read_georeference
from samfast.training.instances import are_instances, objects_of
from samfast.training.object_files import ObjectFiles, parts
from samfast.training.pictures import PREDICTION_COLOUR, png_bytes, task_picture, tinted
from samfast.training.probabilities import key_of
from samfast.training.stack_files import Name, StackFiles, write_pages
from samfast.training.stacks import Slice, Source, of_stacks
from samfast.training.tasks import TaskSpec


class Results:
    """Writes what images are predicted into the output folder.

    numbered: whether objects are told apart   files: of these, None where there are none
    stacks: holds the files of stacks until they are whole; the caller enters it
    Raises ValueError for a georeference that cannot be read, where files keep it.
    """

    def __init__(
        self,
        settings: PredictSettings,
        specs: Sequence[TaskSpec],
        paths: Sequence[Source],
        numbered: bool,
    ):
        self.settings, self.specs, self.folder = settings, specs, settings.output
        placed = numbered or settings.probabilities
        self.places = {path: read_georeference(path) for path in paths} if placed else {}
        self.stacks = StackFiles(of_stacks(paths))
        self.files: ObjectFiles | None = None
        if numbered:
            self.files = ObjectFiles(self.folder, settings.formats, self.places, self.stacks)

    def write(
        self, name: Name, path: Source, image: np.ndarray, maps: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        """Write what one image is predicted; returns the files' names and what they hold."""
        if "objects" in maps:
            return self._objects(name, path, image, maps["objects"])
        if self.specs and are_instances(self.specs):
            by_map = {spec.object_map: maps[spec.name] for spec in self.specs}
            objects = objects_of(by_map, self.settings.min_size)
            made = self._objects(name, path, image, objects)
            foreground = next(spec.name for spec in self.specs if spec.derive == "foreground")
            return made | self._probability(name, path, maps, foreground, "")
        if self.specs:
            return self._tasks(name, path, image, maps)
        made = self._mask(name, path, image, maps[""])
        made |= self._probability(name, path, maps, "", "")
        if self.settings.instances:
            objects = parts(maps[""], self.settings.min_size)
            return made | self._objects(name, path, image, objects)
        return made

    def _objects(
        self, name: Name, path: Source, image: np.ndarray, labels: np.ndarray
    ) -> dict[str, Any]:
        assert self.files is not None, labels.shape  # where objects are numbered
        return self.files.write(name, path, image, labels)

    def _mask(
        self, name: Name, path: Source, image: np.ndarray, mask: np.ndarray
    ) -> dict[str, Any]:
        mask_path = self._pixels(name, path, "_mask", mask.astype(np.uint8) * 255)
        overlay_path = self.folder / f"{name.image}_overlay.png"
        overlay = tinted(image, mask, PREDICTION_COLOUR)
        write_whole(overlay_path, png_bytes(overlay), durable=False)
        return {
            "image": str(path),
            "mask": str(mask_path),
            "overlay": str(overlay_path),
            "foreground": float(mask.mean()),
        }

    def _tasks(
        self, name: Name, path: Source, image: np.ndarray, maps: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        """A file of each task with its classes or values, and a picture of it."""
        tasks = {}
        for spec in self.specs:
            values = maps[spec.name]
            mask_path = self._task(name, path, spec, values)
            overlay_path = self.folder / f"{name.image}_{spec.name}_overlay.png"
            write_whole(overlay_path, png_bytes(task_picture(spec)(image, values)), durable=False)
            tasks[spec.name] = {"mask": str(mask_path), "overlay": str(overlay_path)}
            tasks[spec.name] |= self._probability(name, path, maps, spec.name, f"_{spec.name}")
        return {"image": str(path), "tasks": tasks}

    def _task(self, name: Name, path: Source, spec: TaskSpec, values: np.ndarray) -> Path:
        """Write a task's prediction; returns the file."""
        if spec.kind == "binary":
            return self._pixels(name, path, f"_{spec.name}", values.astype(np.uint8) * 255)
        if spec.kind == "semantic":
            dtype = np.uint8 if spec.channels <= 256 else np.uint16
            return self._pixels(name, path, f"_{spec.name}", values.astype(dtype))
        if spec.channels == 1 and isinstance(path, Slice):
            return self._pixels(name, path, f"_{spec.name}", values[0].astype(np.float32))
        suffix, data = _values_file(values.astype(np.float32))
        mask_path = self.folder / f"{name.image}_{spec.name}{suffix}"
        write_whole(mask_path, data, durable=False)
        return mask_path

    def _pixels(self, name: Name, path: Source, what: str, values: np.ndarray) -> Path:
        """Write a value of each pixel: a PNG, or the page of a slice. Returns the file."""
        if isinstance(path, Slice):
            file = self.folder / f"{name.file}{what}.tif"
            self.stacks.add(file, path, values)
            return file
        file = self.folder / f"{name.image}{what}.png"
        write_whole(file, png_bytes(values), durable=False)
        return file

    def _probability(
        self, name: Name, path: Source, maps: dict[str, np.ndarray], task: str, what: str
    ) -> dict[str, Any]:
        """Write a task's probabilities where there are some; returns the file by what it is."""
        values = maps.get(key_of(task))
        if values is None:
            return {}
        place = self.places[path]
        if len(values) == 1 and isinstance(path, Slice):
            file = self.folder / f"{name.file}{what}_probability.tif"
            self.stacks.add(file, path, values[0], place)
        else:
            file = self.folder / f"{name.image}{what}_probability.tif"
            write_pages(file, values, [place] * len(values))
        return {"probability": str(file)}


def said_of(made: dict[str, Any]) -> str:
    """What a line of output says of an image."""
    if "tasks" in made:
        return ", ".join(task["mask"] for task in made["tasks"].values())
    if "objects" in made:
        named = [made[kind] for kind in ("labels", "csv", "geojson") if kind in made]
        return ", ".join([f"{made['objects']} objects", *named])
    return f"{made['foreground']:.1%} foreground, {made['mask']}"


def _values_file(values: np.ndarray) -> tuple[str, bytes]:
    """Suffix and content of a file of float32 (channels, H, W)."""
    buffer = io.BytesIO()
    if len(values) == 1:
        Image.fromarray(values[0]).save(buffer, format="TIFF")
        return ".tif", buffer.getvalue()
    np.save(buffer, values.transpose(1, 2, 0), allow_pickle=False)
    return ".npy", buffer.getvalue()
