# SPDX-License-Identifier: Apache-2.0
"""Scores of a saved adapter on a folder of images and masks."""

import torch

from samfast.files.format import read_adapter
from samfast.files.placing import write_whole
from samfast.files.temporary import remove_dead
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models import image_size
from samfast.training.adapted import adapter_folder, load_adapted
from samfast.training.checks import check_prediction
from samfast.training.goal import Goal
from samfast.training.instances import Instances, are_instances
from samfast.training.many_tasks import ManyTasks
from samfast.training.one_mask import OneMask
from samfast.training.pictures import png_bytes
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.progress import Progress
from samfast.training.prompted_objects import PromptedObjects
from samfast.training.remembered import remembered
from samfast.training.run_folder import check_folder
from samfast.training.score_files import score_files
from samfast.training.settings import EvaluateSettings, FinetuneSettings
from samfast.training.try_out import backend_asked_for


def score(settings: EvaluateSettings) -> dict:
    """The scores as ``summary.json`` of a run has them, and a table of them as text.

    per_image and per_class are those of ``Scored``. There is no val_loss for an adapter of one
    mask that does not know its loss.

    Every file is decoded and checked first: a bad one is a ValueError with one sentence.
    """
    check_prediction(settings)
    output = settings.output
    if output is not None:
        check_folder(output)
    adapter = read_adapter(adapter_folder(settings.adapter))
    kept = remembered(adapter, settings.task)
    specs, options = kept.specs, kept.options.config()
    as_trained = FinetuneSettings(
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
    )
    goal: Goal
    if specs:
        kind = Instances if are_instances(specs) else ManyTasks
        goal = kind(as_trained, specs, only_score=True)
    elif kept.by_object:
        goal = PromptedObjects(as_trained, only_score=True)
    else:
        goal = OneMask(as_trained, only_score=True)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    declare_missing_schemas()  # torchmetrics imports torchvision where it finds it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype(settings.precision, device)
    with backend_asked_for(settings.backend, adapter.method, settings.fuse, device, dtype):
        base = base_dtype("auto", dtype, device)
        sam = load_adapted(settings.adapter, settings.checkpoint, base, fuse=settings.fuse)
        goal.check()
        model = goal.segmenter(sam, dtype).to(device)
        items, side = goal.split.val, image_size(sam)
        loader = goal.validation_loader(items, side, settings.batch_size)
        with Progress("evaluation", len(items), main=True) as progress:
            scored = goal.scores(model, loader, progress.advance)
        row = scored.row
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            remove_dead(output)
            for name, data in score_files(scored.images, scored.classes).items():
                write_whole(output / name, data, durable=False)
            for name, panel in goal.overlays(model, items, side):
                write_whole(output / f"{name}.png", png_bytes(panel), durable=False)
    return {
        "adapter": str(adapter.folder),
        "data": str(settings.data),
        "images": len(items),
        **goal.summary(row),
        "per_image": scored.images,
        **({"per_class": scored.classes} if scored.classes else {}),
        "table": goal.table(row),
    }
