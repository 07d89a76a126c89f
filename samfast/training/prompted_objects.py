# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for single objects by prompts: their data, loss, scores and pictures.

A goal, see ``samfast.training.goal``. A mask file holds the number of an object in each of its
pixels. Each object has a prompt of its own, a box or a point, and is one mask.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samfast.training.coco_items import check_no_stacks, check_no_suffix, coco_parts, is_coco
from samfast.training.file_pairs import Marked
from samfast.training.fingerprints import of_pairs
from samfast.training.folders import Split, check_sizes, find_scored, find_split, split_pairs
from samfast.training.image_options import image_options
from samfast.training.images import read_image
from samfast.training.losses import Loss, chosen_loss
from samfast.training.panels import titled
from samfast.training.pictures import classes_over
from samfast.training.prompted_data import (
    ObjectBatch,
    ObjectCollate,
    ObjectDataset,
    ResizedObjects,
    ScoredObjects,
    read_objects,
)
from samfast.training.prompted_scores import kinds_of, predicted_labels, score_objects
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.scored import DataFacts, Scored, Tick
from samfast.training.segmenters import SamSegmenter
from samfast.training.settings import FinetuneSettings
from samfast.training.sides import model_side
from samfast.training.stopping import ignore_signals
from samfast.training.task_scores import listed

_PROMPTS = {
    "box": "its box, with sides moved by up to {jitter:g} pixels in training",
    "point": "a point on it: a random one in training, otherwise the innermost",
    "mixed": (
        "its box, with sides moved by up to {jitter:g} pixels in training, or a point on it, with "
        "equal probability"
    ),
}


class _Found(NamedTuple):
    """What an image's files hold: how many objects, and of each the IoU of its filled box."""

    objects: int
    boxes: np.ndarray


def objects_loss(model: nn.Module, batch: ObjectBatch, loss: Loss) -> Tensor:
    """The mean over objects and rounds; 0 with a gradient of 0 for a batch without objects.

    model: a PromptedSegmenter, wrapped or not
    """
    rounds, valid = model(
        batch.images,
        batch.sizes,
        batch.counts,
        batch.first,
        batch.masks,
        batch.draws,
        batch.names,
    )
    if not len(batch.masks):
        return cast("Tensor", sum(logits.sum() for logits in rounds))
    return cast("Tensor", sum(loss(logits, batch.masks, valid) for logits in rounds)) / len(rounds)


def _split(settings: FinetuneSettings, only_score: bool) -> Split[Marked]:
    """The pairs of images and masks, or annotations, by their names."""
    suffix, fraction, seed = settings.mask_suffix, settings.val_fraction, settings.seed
    if not is_coco(settings.folder):
        if only_score:
            return Split((), find_scored(settings.folder, suffix, settings.stacks))
        return find_split(
            settings.folder,
            val_fraction=fraction,
            seed=seed,
            mask_suffix=suffix,
            stacks=settings.stacks,
        )
    check_no_suffix(suffix)
    check_no_stacks(settings.stacks)
    parts = {
        name: tuple(Marked(image.stem, image, mask) for image, mask in own)
        for name, own in coco_parts(settings.folder).items()
    }
    if only_score:
        return Split((), parts.get("val") or parts[""])
    if "" in parts:
        return split_pairs(parts[""], fraction, seed)
    return Split(parts["train"], parts["val"])


class PromptedObjects:
    """Single objects of each image, each by a prompt of its own.

    val_miou: the mean over objects of the IoU after the first prompt, at the files' own size; with
        prompt mixed the mean of val_miou_box and val_miou_point
    val_miou_rounds: the same after all rounds of clicks, where there are several
    """

    score = "val_miou"
    joins_steps = True
    tasks = None

    def __init__(self, settings: FinetuneSettings, only_score: bool = False):
        """Find the files without decoding them. only_score: nothing is trained."""
        self.settings = settings
        self.options = image_options(settings.bands, settings.range)
        self.split = _split(settings, only_score)
        self.kinds = kinds_of(settings.prompt)
        self.rounds = settings.prompt_rounds or 1
        self.loss_name = settings.loss
        scores = [f"val_miou_{kind}" for kind in self.kinds]
        scores += ["val_miou_rounds"] if self.rounds > 1 else []
        loss = [] if settings.loss is None else ["val_loss"]
        self.columns = (*loss, self.score, *scores)
        names = {"val_miou": "mean IoU"} if len(self.kinds) > 1 else {}
        names |= {name: f"mean IoU, {name.removeprefix('val_miou_')}" for name in scores}
        self.curves = tuple(names.items())

    def fingerprints(self) -> dict[str, str]:
        return of_pairs({"train": self.split.train, "val": self.split.val})

    def check(self) -> None:
        """Decode every file and check it, or raise the first broken rule."""
        train, val = self.split.train, self.split.val
        with ThreadPoolExecutor() as pool:
            try:
                found = list(pool.map(self._checked, (*train, *val)))
                left = list(pool.map(self._there, (*train, *val)))
            finally:
                pool.shutdown(cancel_futures=True)
        trained, scored = found[: len(train)], found[len(train) :]
        for name, pairs, own in (("training", train, trained), ("validation", val, scored)):
            if pairs and not any(one.objects for one in own):
                raise ValueError(
                    f"none of the {name} masks in {pairs[0].mask.parent} holds an object (a "
                    "number above 0); move images with objects there, or choose another --seed "
                    "if samfast makes the split"
                )
        there = left[: len(train)]
        for name, counts in (("training", there), ("validation", left[len(train) :])):
            if counts and not any(counts):
                raise ValueError(
                    f"no {name} object has a pixel left at {model_side(self.settings)} pixels; "
                    "take a larger --image-size"
                )
        self.there = there
        self.objects = sum(one.objects for one in trained), sum(one.objects for one in scored)
        self.lost = self.objects[0] - sum(there)
        self.filled_boxes = float(np.concatenate([one.boxes for one in scored]).mean())

    def _checked(self, pair: Marked) -> _Found:
        image, objects = read_image(pair.image, self.options), read_objects(pair.mask)
        check_sizes(pair, image, np.broadcast_to(False, objects.size))
        x0, y0, x1, y1 = objects.boxes.T
        boxes = objects.areas / ((x1 - x0 + 1) * (y1 - y0 + 1))
        return _Found(len(objects), boxes)

    def _there(self, pair: Marked) -> int:
        """Count the objects that keep a pixel at the model's size."""
        resized = ResizedObjects(read_objects(pair.mask), model_side(self.settings))
        return int(resized.there().sum())

    def labels(self, pair: Marked) -> np.ndarray:
        """int32 (H, W): the objects of a pair's file, from 1 on."""
        return read_objects(pair.mask).labels()

    def sentences(self) -> Iterator[str]:
        """Sentences that a run prints before it begins."""
        settings = self.settings
        prompt = _PROMPTS[settings.prompt].format(jitter=settings.box_jitter or 0)
        yield f"each object is prompted by {prompt}"
        if self.rounds > 1:
            yield f"{self.rounds - 1} clicks then correct each mask, at random in training"
        if self.lost:
            yield (
                f"{self.lost} training objects are smaller than one pixel at image size "
                f"{model_side(settings)} and are left out"
            )
        pairs = (self.split.train, self.split.val)
        counts = [f"{n} objects in {len(own)}" for n, own in zip(self.objects, pairs, strict=True)]
        yield f"{counts[0]} training and {counts[1]} validation images{self._boxes('; ')}"

    def _boxes(self, before: str) -> str:
        """What the filled box of each object scores, where boxes are prompts."""
        if "box" not in self.kinds:
            return ""
        return f"{before}the filled box of each object scores mean IoU {self.filled_boxes:.4f}"

    def segmenter(self, sam: nn.Module, dtype: torch.dtype) -> SamSegmenter:
        return PromptedSegmenter(sam, dtype, self.settings.decoder_chunk)

    def views(self, part: str) -> Sequence[Marked]:
        return getattr(self.split, part)

    def training_data(self, side: int) -> tuple[ObjectDataset, ObjectCollate]:
        settings = self.settings
        data = ObjectDataset(
            self.split.train,
            side,
            prompt=settings.prompt,
            objects=self._objects(),
            rounds=self.rounds,
            box_jitter=settings.box_jitter or 0.0,
            flips=settings.flips,
            augment=settings.augment,
            options=self.options,
            seed=settings.seed,
        )
        return data, ObjectCollate(side)

    def steady(self) -> int:
        changes = self.settings.flips or self.settings.augment != "none"
        return 0 if changes else len(self.split.train)

    def validation_loader(
        self, items: Sequence[Marked], side: int, batch_size: int, workers: int = 0
    ) -> DataLoader:
        return DataLoader(
            ScoredObjects(items, side, self.options),
            batch_size=batch_size,
            collate_fn=ObjectCollate(side),
            num_workers=workers,
            worker_init_fn=ignore_signals,
        )

    def counts(self, indices: Sequence[int]) -> list[int]:
        return [sum(min(self._objects(), self.there[i]) for i in indices)]

    def _objects(self) -> int:
        """The most objects of an image and pass, as the settings or else the recipe have it."""
        assert self.settings.objects is not None
        return self.settings.objects

    def loss(
        self, model: nn.Module, batch: ObjectBatch, weights: Sequence[float] | None = None
    ) -> Tensor:
        loss = objects_loss(model, batch, chosen_loss(self.settings.loss))
        return loss if weights is None else weights[0] * loss

    def scores(self, model: nn.Module, loader: DataLoader, tick: Tick | None = None) -> Scored:
        loss = None if self.settings.loss is None else chosen_loss(self.settings.loss)
        segmenter = cast("PromptedSegmenter", model)
        found = score_objects(segmenter, loader, self.kinds, self.rounds, loss, tick)
        row = {} if found.loss is None else {"val_loss": found.loss}
        row[self.score] = sum(found.iou.values()) / len(found.iou)
        row |= {f"val_miou_{kind}": value for kind, value in found.iou.items()}
        row |= {"val_miou_rounds": found.rounds} if self.rounds > 1 else {}
        pairs = cast("ScoredObjects", loader.dataset).pairs
        images = [
            {"image": pair.stem, "objects": objects, "miou": miou}
            for pair, (objects, miou) in zip(pairs, found.images, strict=True)
        ]
        return Scored(row, images)

    def _listed(self, row: Mapping[str, Any]) -> str:
        """Each score by its name."""
        names = [name for name in self.columns if name.startswith("val_miou_")]
        parts = [f"{name.removeprefix('val_miou_')} {row[name]:.4f}" for name in names]
        return f"mean IoU {row[self.score]:.4f} ({', '.join(parts)})"

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        return f"val loss {row['val_loss']:.4f}  {self._listed(row)}"

    def closing(self, best: Mapping[str, Any]) -> str:
        return f"best validation {self._listed(best)} in epoch {best['epoch']}{self._boxes('; ')}"

    def table(self, row: Mapping[str, Any]) -> str:
        return f"{self._listed(row)}  {self.objects[1]} objects{self._boxes('; ')}"

    def summary(self, best: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **{name: best[name] for name in self.columns},
            "objects": self.objects[1],
            "filled_box_miou": self.filled_boxes,
        }

    def facts(self) -> DataFacts:
        boxes = {"val_miou_box": self.filled_boxes} if "box" in self.kinds else {}
        return DataFacts(self.objects, "filled box of each object", boxes)

    def remembered(self) -> dict[str, Any]:
        """What the adapter's folder keeps for evaluation and prediction."""
        return {
            **self.options.config(),
            "masks": "instances",
            "prompt": self.settings.prompt,
            "prompt_rounds": self.rounds,
            "loss": self.settings.loss,
            "box_jitter": self.settings.box_jitter,
        }

    def baseline_line(self) -> tuple[float, str] | None:
        if "box" not in self.kinds:
            return None
        return self.filled_boxes, "mean IoU of filled boxes"

    def overlays(
        self, model: nn.Module, items: Sequence[Marked], side: int
    ) -> Iterator[tuple[str, Image.Image]]:
        """(name, titled image | truth | prediction by the first kind of prompt) for each image."""
        loader = self.validation_loader(items, side, 1)
        kind = self.kinds[0]
        found = predicted_labels(cast("PromptedSegmenter", model), loader, kind)
        for pair, (objects, labels, ious) in zip(items, found, strict=True):
            image = read_image(pair.image, self.options)
            drawn = [classes_over(image, own - 1) for own in (objects.labels(), labels)]
            scores = {"miou": sum(ious) / len(ious)} if ious else {}
            title = f"{pair.image.name}  {kind}  {listed(scores) or 'no object'}"
            yield pair.stem, titled(title, [image, *drawn])
