# SPDX-License-Identifier: Apache-2.0
"""Scores of a saved adapter on a folder of images and masks."""

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn

from samfast.files.format import read_adapter
from samfast.files.placing import write_whole
from samfast.files.temporary import remove_dead
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models import image_size
from samfast.training.adapted import adapter_folder, base_of, load_adapted
from samfast.training.adapter_settings import EvaluateSettings
from samfast.training.automatic import check_grid
from samfast.training.automatic_scores import automatic_found, check_automatic, with_prompts
from samfast.training.automatic_scores import text as automatic_text
from samfast.training.checks import check_prediction
from samfast.training.decoded import Decoded
from samfast.training.foreground import chosen_foreground
from samfast.training.goal import Goal
from samfast.training.goals import goal_of
from samfast.training.object_scores import ObjectScores
from samfast.training.pictures import png_bytes
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.progress import Progress
from samfast.training.remembered import Remembered, remembered
from samfast.training.run_folder import check_folder
from samfast.training.score_files import score_files
from samfast.training.settings import FinetuneSettings
from samfast.training.tiled_goal import Tiled
from samfast.training.tiles import chosen_tiles, said_of_tiles
from samfast.training.try_out import backend_asked_for


def score(settings: EvaluateSettings) -> dict[str, Any]:
    """Return the scores as in a run's ``summary.json``, and a table of them as text.

    per_image and per_class are those of ``Scored``. An adapter of one mask that does not record its
    loss has no val_loss.

    Every file is decoded and checked first; a bad one raises ValueError.
    """
    check_prediction(settings)
    output = settings.output
    if output is not None:
        check_folder(output)
    adapter = read_adapter(adapter_folder(settings.adapter))
    kept = remembered(adapter, settings.task)
    check_grid(settings)
    tiles = tiles_for(settings, kept)
    goal = goal_of(_as_trained(settings, kept, tiles), kept.specs, only_score=True)
    rule = chosen_foreground(kept.foreground, kept.threshold)
    check_automatic(settings, kept, rule, adapter.record["base"].get("name"))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    declare_missing_schemas()  # torchmetrics imports torchvision where it finds it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype(settings.precision, device)
    with (
        backend_asked_for(settings.backend, adapter.method, settings.fuse, device, dtype),
        _decoded_for(goal),
    ):
        base = base_dtype("auto", dtype, device)
        sam = load_adapted(settings.adapter, settings.checkpoint, base, fuse=settings.fuse)
        build_base = partial(base_of, adapter.folder, settings.checkpoint)
        points = with_prompts(sam, build_base).to(device) if settings.automatic else None
        goal.check()
        model = goal.segmenter(sam, dtype).to(device)
        items, side = goal.split.val, image_size(sam)
        loader = goal.validation_loader(items, side, settings.batch_size)
        with Progress("evaluation", len(cast("Sized", loader.dataset)), main=True) as progress:
            scored = goal.scores(model, loader, progress.advance)
        row, images, table = scored.row, list(scored.images), goal.table(scored.row)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            remove_dead(output)
        automatic: dict[str, dict[str, float]] = {}
        if points is not None:
            automatic, rows = _automatic(settings, points, goal)
            images += rows
            table += f"\n{automatic_text(automatic['automatic'])}"
        if output is not None:
            for name, data in score_files(images, scored.classes).items():
                write_whole(output / name, data, durable=False)
            for name, panel in goal.overlays(model, items, side):
                write_whole(output / f"{name}.png", png_bytes(panel), durable=False)
    return {
        "adapter": str(adapter.folder),
        "data": str(settings.data),
        "images": len(items),
        **({} if tiles is None else {"tile": tiles[0], "overlap": tiles[1]}),
        **goal.summary(row),
        **automatic,
        "per_image": images,
        **({"per_class": scored.classes} if scored.classes else {}),
        "table": table,
    }


def _as_trained(
    settings: EvaluateSettings, kept: Remembered, tiles: tuple[int, int] | None
) -> FinetuneSettings:
    """The settings of a run that learned what the adapter remembers."""
    tile, overlap = tiles or (None, None)
    options = kept.options.config()
    return FinetuneSettings(
        data=settings.data,
        mask_suffix=settings.mask_suffix,
        stacks=settings.stacks,
        prompt=kept.prompt,
        foreground=kept.foreground,
        threshold=kept.threshold,
        ignore=kept.ignore,
        loss=kept.loss,
        bands=options["bands"],
        range=options["range"],
        decoder_chunk=settings.decoder_chunk,
        box_jitter=None if kept.by_object else 0.0,
        masks="instances" if kept.by_object else None,
        prompt_rounds=kept.rounds,
        tile=tile,
        overlap=overlap,
    )


def _automatic(
    settings: EvaluateSettings, points: nn.Module, goal: Goal
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """The generator's scores, and its rows of each image; its overlays are written."""
    scores, rows = ObjectScores(), []
    for found in automatic_found(points, goal, settings):
        scores.update(found.counts)
        rows.append(found.row())
        if settings.output is not None:
            name, panel = found.panel()
            write_whole(settings.output / f"{name}.png", png_bytes(panel), durable=False)
    return {"automatic": scores.compute()}, rows


def tiles_for(settings: EvaluateSettings, kept: Remembered) -> tuple[int, int] | None:
    """(tile, overlap) as given or as in training, which is said; None for whole images."""
    tiles = chosen_tiles(settings.tile, settings.overlap, kept.tiles)
    if tiles and kept.prompt != "none":
        raise ValueError(
            f"tile is {settings.tile}, but adapter {settings.adapter} needs prompts, which are "
            "for whole images; leave out --tile"
        )
    if kept.tiles is not None and settings.tile is None and not settings.json:
        print(said_of_tiles(kept.tiles, settings.overlap), flush=True)
    return tiles


@contextmanager
def _decoded_for(goal: Goal) -> Iterator[None]:
    """A place for decoded images, few at a time, where a goal cuts tiles from them."""
    if not isinstance(goal, Tiled):
        yield
        return
    with TemporaryDirectory(prefix="samfast-") as folder:
        goal.decoded = Decoded(Path(folder), most=2)  # a batch may have tiles of two
        yield
