# SPDX-License-Identifier: Apache-2.0
"""Masks for new photographs from a saved adapter."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from samfast.files.format import read_adapter
from samfast.files.temporary import remove_dead
from samfast.training.adapted import adapter_folder, load_adapted
from samfast.training.checks import check_prediction
from samfast.training.images import SUFFIXES, read_image
from samfast.training.instances import are_instances
from samfast.training.object_files import ObjectFiles
from samfast.training.object_prompts import object_prompts
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.predict_checks import (
    are_numbered,
    boxes_for,
    check_files,
    check_kind,
    places_for,
    refuse_files,
)
from samfast.training.predict_files import said_of, write_prediction
from samfast.training.predict_maps import predicted_maps
from samfast.training.prompted_scores import kinds_of
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.remembered import remembered
from samfast.training.run_folder import check_folder
from samfast.training.segmenters import Segmenter, TaskSegmenter
from samfast.training.settings import PredictSettings
from samfast.training.tiles import said_of_tiles
from samfast.training.try_out import backend_asked_for


def predict(settings: PredictSettings) -> dict:
    """Write one mask and one overlay for each image; returns what was written.

    Every image is decoded before anything is written: a bad one is a ValueError with one sentence.
    """
    check_prediction(settings)
    if not settings.images:
        raise ValueError("no image is named; give files or folders of them")
    paths = find_images(settings.images)
    names = _output_names(paths)
    check_folder(settings.output)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype(settings.precision, device)
    adapter = read_adapter(adapter_folder(settings.adapter))
    kept = remembered(adapter, settings.task, settings.bands, settings.range)
    options, specs = kept.options, kept.specs
    shapes = {path: read_image(path, options).shape[:2] for path in paths}
    if not are_instances(specs):
        check_files(names, specs)
    objects, boxes = None, []
    if kept.by_object and not settings.automatic:
        objects = object_prompts(settings, kinds_of(kept.prompt), shapes)
    elif not settings.automatic:
        refuse_files(settings)
        boxes = boxes_for(settings, kept.prompt, shapes)
    check_kind(settings, kept, adapter.record["base"].get("name"))
    if kept.tiles and settings.tile is None and not (settings.automatic or settings.json):
        print(said_of_tiles(kept.tiles, settings.overlap), flush=True)
    places = places_for(settings, objects, shapes)
    files = None
    if are_numbered(settings, kept):
        files = ObjectFiles(settings.output, settings.formats, paths)
    with backend_asked_for(settings.backend, adapter.method, settings.fuse, device, dtype):
        sam = load_adapted(
            settings.adapter,
            settings.checkpoint,
            base_dtype("auto", dtype, device),
            fuse=settings.fuse,
        )
        kind = PromptedSegmenter if objects is not None else Segmenter
        model = (TaskSegmenter if specs else kind)(sam, dtype, settings.decoder_chunk).to(device)
        settings.output.mkdir(parents=True, exist_ok=True)
        remove_dead(settings.output)
        found = predicted_maps(settings, model, kept, shapes, boxes, objects, places)
        written = []
        for path, name, maps in zip(paths, names, found, strict=True):
            image = read_image(path, options)
            written.append(write_prediction(settings, name, path, image, maps, specs, files))
            if objects is not None:  # in the prompts' order; 0 of one that others cover
                areas = np.bincount(maps["objects"].ravel(), minlength=len(objects[path]) + 1)
                written[-1]["areas"] = areas[1:].tolist()
            if not settings.json:
                print(f"{path}: {said_of(written[-1])}", flush=True)
    together = {} if files is None else files.finish()
    if together and not settings.json:
        print(f"all images: {together['coco']}", flush=True)
    return {"output": str(settings.output), "images": written, **together}


def find_images(given: Sequence[Path]) -> list[Path]:
    """Files as named, folders as the images in them (not below), sorted."""
    paths = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            inside = [p for p in inside if not p.name.startswith(".")]
            if not inside:
                raise ValueError(f"folder {path} holds no image ({', '.join(SUFFIXES)})")
            paths += inside
        elif path.exists():
            paths.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    return paths


def _output_names(paths: Sequence[Path]) -> list[str]:
    """Stems; where two images share one, their whole names."""
    stems = [path.stem for path in paths]
    names = [p.name if stems.count(p.stem) > 1 else p.stem for p in paths]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two of the images are called {name}; predict them separately")
    return names
