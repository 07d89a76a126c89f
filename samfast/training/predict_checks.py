# SPDX-License-Identifier: Apache-2.0
"""Check options, prompts and names against the adapter and the images of a prediction."""

from collections.abc import Iterable, Sequence

import numpy as np

from samfast.models.sam3_folder import NAME as SAM3
from samfast.training.adapter_settings import PredictSettings
from samfast.training.automatic import check_grid
from samfast.training.boxes import check_box, parsed_box
from samfast.training.instances import are_instances
from samfast.training.object_prompts import Prompts, named_prompts
from samfast.training.points import check_point, parsed_point
from samfast.training.probabilities import has_probability
from samfast.training.prompted_tiles import Places, places_of
from samfast.training.remembered import Remembered
from samfast.training.stacks import Source
from samfast.training.tasks import TaskSpec
from samfast.training.tiles import chosen_tiles


def check_kind(settings: PredictSettings, kept: Remembered, base: str | None) -> None:
    """Raise ValueError for options that do not fit this kind of adapter.

    base: the name of the model that it was trained on
    """
    chosen_tiles(settings.tile, settings.overlap, kept.tiles)
    check_grid(settings)
    if settings.automatic:
        _check_automatic(settings, kept, base)
    if settings.tile and kept.prompt != "none" and not kept.by_object:
        raise ValueError(
            f"tile is {settings.tile}, but adapter {settings.adapter} needs prompts, which are "
            "for whole images; leave out --tile"
        )
    numbered = are_numbered(settings, kept) and (not kept.specs or are_instances(kept.specs))
    if settings.instances and settings.task is not None:
        raise ValueError(
            f"objects need all tasks, but task is {settings.task}; leave out --task or --instances"
        )
    if settings.instances and not numbered:
        raise ValueError(
            f"adapter {settings.adapter} was not trained on objects; leave out --instances, or "
            "train with --masks instances"
        )
    if not numbered and set(settings.formats) != {"labels"}:
        raise ValueError(
            f"formats are {', '.join(settings.formats)}, but no objects are numbered; give "
            "--instances"
        )
    if settings.min_size and kept.by_object and not settings.automatic:
        raise ValueError(
            f"min_size is {settings.min_size}, but each object has the number of its prompt; "
            "leave it out"
        )
    _check_probabilities(settings, kept)
    if settings.min_size and not numbered:
        raise ValueError(
            f"min_size is {settings.min_size}, but no objects are numbered; give --instances"
        )


def _check_probabilities(settings: PredictSettings, kept: Remembered) -> None:
    """Raise ValueError if nothing that is predicted has a probability of each pixel."""
    if not settings.probabilities:
        return
    if settings.automatic or kept.by_object:
        raise ValueError(
            "--probabilities needs one mask per image, but objects are prompted one by one; leave "
            "it out"
        )
    if kept.specs and not any(map(has_probability, kept.specs)):
        raise ValueError(
            f"adapter {settings.adapter} predicts measured values only, which have no "
            "probabilities; leave out --probabilities"
        )


def are_numbered(settings: PredictSettings, kept: Remembered) -> bool:
    """Whether objects are told apart, or asked for."""
    asked = settings.instances or settings.automatic
    return asked or kept.by_object or are_instances(kept.specs)


def refuse_files(settings: PredictSettings) -> None:
    """Raise ValueError for files of prompts, which are for adapters of single objects."""
    for name in ("boxes", "points"):
        if getattr(settings, name) is not None and not settings.automatic:
            raise ValueError(
                f"{name} is {getattr(settings, name)}, but adapter {settings.adapter} was not "
                f"trained on prompted objects; leave out --{name}"
            )


def _check_automatic(settings: PredictSettings, kept: Remembered, base: str | None) -> None:
    """Raise ValueError for what a grid of points cannot be combined with."""
    given = [*(["--tile"] if settings.tile else []), *named_prompts(settings)]
    for name in given:
        raise ValueError(f"--automatic makes its own points; leave out {name}")
    if kept.specs:
        raise ValueError(
            f"adapter {settings.adapter} has task decoders, which take no point prompts; leave "
            "out --automatic"
        )
    if base == SAM3:
        raise ValueError(f"--automatic needs a segment_anything model, got {SAM3}; leave it out")


def places_for(
    settings: PredictSettings, objects: Prompts | None, sizes: dict[Source, tuple[int, int]]
) -> dict[Source, Places] | None:
    """The tiles of single objects' prompts, which overlap by a half unless told; None for none."""
    tiles = chosen_tiles(settings.tile, settings.overlap)
    if tiles is None or objects is None:
        return None
    tile, overlap = tiles
    return places_of(objects, sizes, tile, tile // 2 if settings.overlap is None else overlap)


def boxes_for(
    settings: PredictSettings, prompt: str, sizes: dict[Source, tuple[int, int]]
) -> list[np.ndarray]:
    """The box, or the point, of each image; none where the adapter's prompt is none.

    sizes: (height, width) of each image. Raises ValueError when prompts and adapter, prompts and
    number of images, or a prompt and its image do not fit.
    """
    given = {
        "box": [parsed_box(text) for text in settings.box],
        "point": [parsed_point(text) for text in settings.point],
    }
    for kind, those in given.items():
        if those and prompt != kind:
            trained = "out prompts" if prompt == "none" else f" a {prompt} for each image"
            raise ValueError(
                f"adapter {settings.adapter} was trained with{trained}; leave out --{kind}"
            )
    if prompt == "none":
        return []
    prompts = given[prompt]
    if not prompts:
        form = {"box": "x0,y0,x1,y1", "point": "x,y"}[prompt]
        raise ValueError(
            f"adapter {settings.adapter} was trained with a {prompt} for each image; give it with "
            f"--{prompt} {form}, in pixels of the image"
        )
    if len(prompts) not in (1, len(sizes)):
        many = {"box": "boxes", "point": "points"}[prompt]
        raise ValueError(
            f"got {len(prompts)} {many} for {len(sizes)} images; give one for all, or one for each"
        )
    prompts = prompts * len(sizes) if len(prompts) == 1 else prompts
    check = {"box": check_box, "point": check_point}[prompt]
    for one, (path, size) in zip(prompts, sizes.items(), strict=True):
        check(one, size, str(path))
    return prompts


def check_files(names: Iterable[str], specs: Sequence[TaskSpec], probable: bool = False) -> None:
    """Raise ValueError if images and tasks have such names that two files would have one."""
    files: dict[str, str] = {}
    ends = ("", "_overlay", "_probability") if probable else ("", "_overlay")
    for name in names:
        for spec in specs:
            for file in (f"{name}_{spec.name}{end}" for end in ends):
                what = f"image {name} and task {spec.name}"
                if file in files:
                    raise ValueError(
                        f"{files[file]}, and {what}, would both write {file}; predict them "
                        "separately, with --task"
                    )
                files[file] = what
