# SPDX-License-Identifier: Apache-2.0
"""Predict masks for new photographs with a saved adapter."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from samfast.files.format import read_adapter
from samfast.files.temporary import remove_dead
from samfast.training.adapted import adapter_folder, load_adapted
from samfast.training.adapter_settings import PredictSettings
from samfast.training.checks import check_prediction
from samfast.training.file_pairs import STACK_SUFFIXES
from samfast.training.images import SUFFIXES, read_image
from samfast.training.instances import are_instances
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
from samfast.training.predict_files import Results, said_of
from samfast.training.predict_maps import predicted_maps
from samfast.training.prompted_scores import kinds_of
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.remembered import remembered
from samfast.training.run_folder import check_folder
from samfast.training.segmenters import Segmenter, TaskSegmenter
from samfast.training.stack_files import Name
from samfast.training.stacks import Slice, Source, file_of, image_slices
from samfast.training.tiles import said_of_tiles
from samfast.training.try_out import backend_asked_for


def predict(settings: PredictSettings) -> dict:
    """Write a mask and an overlay for each image; return what was written.

    Every image is decoded before anything is written; a bad one raises ValueError.
    """
    check_prediction(settings)
    if not settings.images:
        raise ValueError("expected images; give files or folders of images")
    paths = find_images(settings.images, settings.stacks)
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
        called = dict.fromkeys(own for name in names for own in name)
        check_files(called, specs, settings.probabilities)
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
    results = Results(settings, specs, paths, are_numbered(settings, kept))
    asked = backend_asked_for(settings.backend, adapter.method, settings.fuse, device, dtype)
    with results.stacks, asked:
        sam = load_adapted(
            settings.adapter,
            settings.checkpoint,
            base_dtype("auto", dtype, device),
            fuse=settings.fuse,
        )
        kind = PromptedSegmenter if objects is not None else Segmenter
        model = (TaskSegmenter if specs else kind)(sam, dtype, settings.decoder_chunk)
        model = model.to(device).eval()
        settings.output.mkdir(parents=True, exist_ok=True)
        remove_dead(settings.output)
        found = predicted_maps(settings, model, kept, shapes, boxes, objects, places)
        written = []
        for path, name, maps in zip(paths, names, found, strict=True):
            image = read_image(path, options)
            written.append(results.write(name, path, image, maps))
            if objects is not None:  # in the prompts' order; 0 of one that others cover
                areas = np.bincount(maps["objects"].ravel(), minlength=len(objects[path]) + 1)
                written[-1]["areas"] = areas[1:].tolist()
            if not settings.json:
                print(f"{path}: {said_of(written[-1])}", flush=True)
    together = {} if results.files is None else results.files.finish()
    if together and not settings.json:
        print(f"all images: {together['coco']}", flush=True)
    return {"output": str(settings.output), "images": written, **together}


def find_images(given: Sequence[Path], stacks: bool = False) -> list[Source]:
    """Files as named, folders as the images in them (not below), sorted.

    stacks: take each slice of a stack as an image
    """
    suffixes = STACK_SUFFIXES if stacks else SUFFIXES
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
            inside = [p for p in inside if not p.name.startswith(".")]
            if not inside:
                raise ValueError(f"folder {path} has no images ({', '.join(suffixes)})")
            paths += inside
        elif path.exists():
            paths.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    return [own for path in paths for own in (image_slices(path) if stacks else (path,))]


def _output_names(paths: Sequence[Source]) -> list[Name]:
    """Stems; where two files share one, their whole names. Slices have names of their own."""
    files = Counter(path.stem for path in {file_of(path) for path in paths})
    names = []
    for path in paths:
        file = file_of(path)
        whole = file.name if files[file.stem] > 1 else file.stem
        names.append(Name(whole, path.name if isinstance(path, Slice) else whole))
    images = Counter(name.image for name in names)
    for name, count in images.items():
        if count > 1:
            raise ValueError(f"two images are called {name}; predict them separately")
    return names
