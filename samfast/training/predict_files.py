# SPDX-License-Identifier: Apache-2.0
"""The files of a prediction: masks, classes, values or objects of an image, and pictures."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from samfast.files.placing import write_whole
from samfast.training.instances import are_instances, objects_of
from samfast.training.object_files import ObjectFiles, parts
from samfast.training.pictures import PREDICTION_COLOUR, png_bytes, task_picture, tinted
from samfast.training.settings import PredictSettings
from samfast.training.tasks import TaskSpec


def write_prediction(
    settings: PredictSettings,
    name: str,
    path: Path,
    image: np.ndarray,
    maps: dict[str, np.ndarray],
    specs: Sequence[TaskSpec],
    files: ObjectFiles | None,
) -> dict:
    """Write what one image is predicted; returns the files' names and what they hold."""
    folder = settings.output
    if "objects" in maps:
        return files.write(name, path, image, maps["objects"])
    if specs and are_instances(specs):
        by_map = {spec.derive: maps[spec.name] for spec in specs}
        return files.write(name, path, image, objects_of(by_map, settings.min_size))
    if specs:
        return _write_tasks(folder, name, path, image, [(s, maps[s.name]) for s in specs])
    made = _write(folder, name, path, image, maps[""])
    if settings.instances:
        return made | files.write(name, path, image, parts(maps[""], settings.min_size))
    return made


def said_of(made: dict) -> str:
    """What a line of output says of an image."""
    if "tasks" in made:
        return ", ".join(task["mask"] for task in made["tasks"].values())
    if "objects" in made:
        named = [made[kind] for kind in ("labels", "csv", "geojson") if kind in made]
        return ", ".join([f"{made['objects']} objects", *named])
    return f"{made['foreground']:.1%} foreground, {made['mask']}"


def _write(folder: Path, name: str, path: Path, image: np.ndarray, mask: np.ndarray) -> dict:
    mask_path, overlay_path = folder / f"{name}_mask.png", folder / f"{name}_overlay.png"
    overlay = tinted(image, mask, PREDICTION_COLOUR)
    write_whole(mask_path, png_bytes(mask.astype(np.uint8) * 255), durable=False)
    write_whole(overlay_path, png_bytes(overlay), durable=False)
    return {
        "image": str(path),
        "mask": str(mask_path),
        "overlay": str(overlay_path),
        "foreground": float(mask.mean()),
    }


def _write_tasks(
    folder: Path,
    name: str,
    path: Path,
    image: np.ndarray,
    maps: list[tuple[TaskSpec, np.ndarray]],
) -> dict:
    """A file of each task with its classes or values, and a picture of it."""
    tasks = {}
    for spec, values in maps:
        suffix, data = _file_of(spec, values)
        mask_path = folder / f"{name}_{spec.name}{suffix}"
        overlay_path = folder / f"{name}_{spec.name}_overlay.png"
        write_whole(mask_path, data, durable=False)
        write_whole(overlay_path, png_bytes(task_picture(spec)(image, values)), durable=False)
        tasks[spec.name] = {"mask": str(mask_path), "overlay": str(overlay_path)}
    return {"image": str(path), "tasks": tasks}


def _file_of(spec: TaskSpec, values: np.ndarray) -> tuple[str, bytes]:
    """Suffix and content of the file that holds a task's prediction."""
    if spec.kind == "binary":
        return ".png", png_bytes(values.astype(np.uint8) * 255)
    if spec.kind == "semantic":
        dtype = np.uint8 if spec.channels <= 256 else np.uint16
        return ".png", png_bytes(values.astype(dtype))
    buffer = io.BytesIO()
    if spec.channels == 1:
        Image.fromarray(values[0].astype(np.float32)).save(buffer, format="TIFF")
        return ".tif", buffer.getvalue()
    np.save(buffer, values.astype(np.float32).transpose(1, 2, 0), allow_pickle=False)
    return ".npy", buffer.getvalue()
