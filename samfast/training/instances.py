# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for all objects of an image, without prompts: ``ManyTasks`` of their maps.

Scored by the objects that a watershed makes of the maps, see ``watershed`` and ``object_scores``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from samfast.training.chosen_tasks import INSTANCES
from samfast.training.images import read_image
from samfast.training.many_tasks import ManyTasks
from samfast.training.metrics import MeanLoss
from samfast.training.object_numbers import numbered
from samfast.training.object_scores import ObjectScores, matched, object_scores
from samfast.training.panels import titled
from samfast.training.pictures import objects_over
from samfast.training.scored import DataFacts
from samfast.training.task_files import read_stored
from samfast.training.task_items import Item
from samfast.training.task_scores import TaskScores, listed, predictions
from samfast.training.tasks import OF_OBJECTS, TaskSpec
from samfast.training.watershed import objects_of_maps


def are_instances(specs: Sequence[TaskSpec]) -> bool:
    """Whether these tasks together say what the objects of an image are."""
    return {spec.derive for spec in specs} == set(OF_OBJECTS)


def objects_of(predicted: Mapping[str, np.ndarray], min_size: int = 0) -> np.ndarray:
    """int32 (H, W) from what each task predicts at the file's size, by ``derive``."""
    maps = [np.asarray(predicted[name]) for name in ("centre", "depth")]
    centre, depth = (values[0] if values.ndim == 3 else values for values in maps)
    return objects_of_maps(np.asarray(predicted["foreground"]) > 0, centre, depth, min_size)


class Instances(ManyTasks):
    """The objects of label images; the best epoch is that of the largest AP50."""

    score = "val_ap50"

    def _name_columns(self) -> None:
        super()._name_columns()
        own = [name for name in self.columns if name not in ("val_loss", self.score)]
        self.columns = ("val_loss", self.score, "val_pq", *own)
        self.curves = [(self.score, "AP50"), ("val_pq", "PQ"), *self.curves[1:]]

    def check(self) -> None:
        """As ``ManyTasks``; ValueError, too, for a part without any object."""
        super().check()
        self.counts_of_objects = {}
        for part in ("train", "val"):
            items = getattr(self.split, part)
            counts = [int(self.labels(item).max(initial=0)) for item in items]
            self.counts_of_objects[part] = counts
            if counts and not any(counts):
                what = {"train": "training", "val": "validation"}[part]
                raise ValueError(
                    f"none of the {what} masks has an object (a value above 0); add one, or "
                    "choose another --seed or --val-fraction"
                )

    def sentences(self) -> Iterator[str]:
        yield from self.remarks
        counts = self.counts_of_objects
        yield (
            f"{len(counts['train'])} training images with {sum(counts['train'])} objects and "
            f"{len(counts['val'])} validation images with {sum(counts['val'])}"
        )
        if max(*counts["train"], *counts["val"], 0) == 1:
            yield (
                "no mask holds more than one object; if they hold foreground and background, "
                "train with --masks binary"
            )

    def _row(self, scores: dict[str, TaskScores], losses: dict[str, MeanLoss]) -> dict[str, float]:
        row = super()._row(scores, losses)
        del row[self.score]  # the tasks' mean, in whose place is what the objects score
        return row

    def together(self, device: torch.device) -> "_Objects":
        return _Objects(device, self.labels)

    def labels(self, item: Item) -> np.ndarray:
        """int32 (H, W): the objects of an item's file, numbered from 1 on."""
        return numbered(read_stored(INSTANCES[0], next(iter(item.targets.values()))))[0]

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        own = {"AP50": row[self.score], "PQ": row["val_pq"]}
        return f"val loss {row['val_loss']:.4f}  {listed(own)}"

    def closing(self, best: Mapping[str, Any]) -> str:
        return (
            f"best validation AP50 {best[self.score]:.4f}, PQ {best['val_pq']:.4f} in epoch "
            f"{best['epoch']}"
        )

    def table(self, row: Mapping[str, Any]) -> str:
        own = {"AP50": row[self.score], "PQ": row["val_pq"]}
        return f"objects  {listed(own)}\n{super().table(row)}"

    def summary(self, best: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().summary(best), "val_pq": best["val_pq"]}

    def facts(self) -> DataFacts:
        train, val = (sum(self.counts_of_objects[part]) for part in ("train", "val"))
        return super().facts()._replace(objects=(train, val))

    def remembered(self) -> dict[str, Any]:
        return {**super().remembered(), "masks": "instances"}

    def overlays(
        self, model: nn.Module, items: Sequence[Item], side: int
    ) -> Iterator[tuple[str, Image.Image]]:
        """(name, titled image | true objects | predicted objects) for each item."""
        found: dict[int, dict[str, np.ndarray]] = {}
        loader = self.validation_loader(items, side, 1)
        for spec, number, prediction, _ in predictions(model, loader):
            maps = found.setdefault(number, {})
            maps[spec.object_map] = prediction.cpu().numpy()
            if len(maps) < len(self.specs):
                continue
            item, objects = items[number], objects_of(found.pop(number))
            truth = self.labels(item)
            image = read_image(item.image, self.options)
            scores = listed(object_scores(*matched(objects, truth)))
            drawn = image, objects_over(image, truth), objects_over(image, objects)
            yield self._name(item), titled(f"{item.image.name}  {scores or 'no object'}", drawn)


class _Objects:
    """Objects against those of the files, as their maps come in."""

    def __init__(self, device: torch.device, labels: Callable[[Item], np.ndarray]):
        self._labels = labels
        self._scores = ObjectScores(device)
        self._maps: dict[int, dict[str, np.ndarray]] = {}
        self._images: list[dict[str, Any]] = []

    def add(self, item: Item, spec: TaskSpec, prediction: Tensor) -> None:
        maps = self._maps.setdefault(id(item), {})
        maps[spec.object_map] = prediction.cpu().numpy()
        if len(maps) == len(OF_OBJECTS):
            counts = matched(objects_of(self._maps.pop(id(item))), self._labels(item))
            self._scores.update(counts)
            found, added, missed, _ = counts
            own = {"found": found, "added": added, "missed": missed, **object_scores(*counts)}
            self._images.append({"image": item.stem, "task": "objects", **own})

    def row(self) -> dict[str, float]:
        return {f"val_{name}": value for name, value in self._scores.compute().items()}

    def images(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*self._images, *rows]
