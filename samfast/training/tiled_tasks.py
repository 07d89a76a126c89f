# SPDX-License-Identifier: Apache-2.0
"""``ManyTasks`` and ``Instances`` whose images are cut into tiles."""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samfast.training import pictures
from samfast.training.evaluate import scoring
from samfast.training.instances import Instances, objects_of
from samfast.training.many_tasks import ManyTasks
from samfast.training.metrics import MeanLoss
from samfast.training.object_numbers import numbered
from samfast.training.object_scores import matched, object_scores
from samfast.training.panels import titled
from samfast.training.scored import Scored, Tick
from samfast.training.task_data import TaskCollate, labels_of, truth_of
from samfast.training.task_items import Item
from samfast.training.task_scores import TaskScores, listed, predicted, task_logits
from samfast.training.tasks import TaskSpec
from samfast.training.tiled_data import Cut, TiledItems
from samfast.training.tiled_goal import Strip, Tiled, at_size


class TiledTasks(Tiled, ManyTasks):
    """Several tasks of tiles."""

    def truths(self, spec: TaskSpec) -> Iterator[Tensor]:
        for item in self.split.val:
            if spec.name in item.targets:
                for lines in self.lines_of(self.arrays.size(item)[0]):
                    yield self.truth(item, spec, lines)

    def truth(self, item: Item, spec: TaskSpec, lines: slice) -> Tensor:
        return torch.from_numpy(self.arrays.truth_lines(item, spec, lines))

    def holds_something(self, cut: Cut) -> bool:
        return any(
            _holds_something(spec, cut.tile.of(self.arrays.stored(cut.item, spec)))
            for spec in self.specs
            if spec.name in cut.targets
        )

    def training_data(self, side: int) -> tuple[TiledItems, TaskCollate]:
        settings = self.settings
        data = TiledItems(
            self.views("train"),
            self.specs,
            side,
            self.arrays,
            flips=settings.flips,
            augment=settings.augment,
            seed=settings.seed,
        )
        return data, TaskCollate(self.specs, side, truths=False)

    def validation_loader(
        self, items: Sequence[Item], side: int, batch_size: int, workers: int = 0
    ) -> DataLoader:
        data = TiledItems(self._cuts(items), self.specs, side, self.arrays)
        collate = TaskCollate(self.specs, side, truths=False)
        return self._loader(data, batch_size, collate, workers)

    def _maps(
        self,
        model: nn.Module,
        loader: DataLoader,
        losses: dict[str, MeanLoss] | None = None,
        tick: Tick | None = None,
    ) -> Iterator[np.ndarray]:
        """Logits of each tile at its own size, the channels of the tasks that its image has."""
        device = next(model.parameters()).device
        cuts = iter(_cuts_of(loader))
        for batch in loader:
            logits = task_logits(model, batch, device)
            if losses is not None:
                self.add_losses(losses, logits, batch, device)
            if tick is not None:
                tick(len(batch.images))
            rows = {spec.name: iter(logits[spec.name]) for spec in self.specs}
            for size, cut in zip(batch.sizes.tolist(), cuts, strict=False):
                own = [next(rows[spec.name]) for spec in self._own(cut.item)]
                yield at_size(torch.cat(own), size, cut.tile)

    def _own(self, item: Item) -> list[TaskSpec]:
        return [spec for spec in self.specs if spec.name in item.targets]

    def predicted(self, strip: Strip) -> Iterator[tuple[TaskSpec, Tensor]]:
        own = self._own(strip.item)
        parts = strip.maps.split([spec.channels for spec in own])
        for spec, maps in zip(own, parts, strict=True):
            yield spec, predicted(spec, maps)

    def scores(self, model: nn.Module, loader: DataLoader, tick: Tick | None = None) -> Scored:
        device = next(model.parameters()).device
        scores = {spec.name: TaskScores(spec, device) for spec in self.specs}
        losses = {spec.name: MeanLoss(device) for spec in self.specs}
        sums: dict[tuple[str, str], Tensor] = {}
        together = self.together(device)
        whole = _Whole(None if together is None else together.add, self.arrays.size)
        with scoring(model):
            maps = self._maps(model, loader, losses, tick)
            for strip in self.strips(_cuts_of(loader), maps):
                for spec, found in self.predicted(strip):
                    truth = self.truth(strip.item, spec, strip.lines).to(device)
                    key = self._name(strip.item), spec.name
                    own = scores[spec.name].update(found.to(device), truth)
                    sums[key] = sums[key] + own if key in sums else own
                    whole.add(strip, spec, found)
        images = [
            {"image": name, "task": task} | scores[task].image(own)
            for (name, task), own in sums.items()
        ]
        classes = [row for own in scores.values() for row in own.classes()]
        row = self._row(scores, losses)
        if together is not None:
            row, images = row | together.row(), together.images(images)
        return Scored(row, images, classes)

    @torch.no_grad()
    def overlays(
        self, model: nn.Module, items: Sequence[Item], side: int
    ) -> Iterator[tuple[str, Image.Image]]:
        for item in items:
            step, image = self.shown(item)
            for spec, found, sums in self._whole(model, item, side):
                scores = listed(TaskScores(spec).image(sums))
                lines = self.lines_of(self.arrays.size(item)[0])
                truth = torch.cat([self.truth(item, spec, own) for own in lines], -2)
                truth, found = truth[..., ::step, ::step], found[..., ::step, ::step]
                drawn, legend = pictures.task_pictures(spec, image, truth, found)
                title = f"{item.image.name}  {spec.name}  {scores or 'no pixel counts'}"
                yield f"{self._name(item)}-{spec.name}", titled(title, drawn, legend)

    def _whole(
        self, model: nn.Module, item: Item, side: int
    ) -> Iterator[tuple[TaskSpec, Tensor, Tensor]]:
        """(task, prediction at the image's size, its sums) of one image."""
        loader = self.validation_loader([item], side, 1)
        sums: dict[str, Tensor] = {}
        kept: list[tuple[TaskSpec, Tensor]] = []
        whole = _Whole(lambda _, spec, found: kept.append((spec, found)), self.arrays.size)
        with scoring(model):
            for strip in self.strips(_cuts_of(loader), self._maps(model, loader)):
                for spec, found in self.predicted(strip):
                    own = TaskScores(spec).update(found, self.truth(item, spec, strip.lines))
                    name = spec.name
                    sums[name] = sums[name] + own if name in sums else own
                    whole.add(strip, spec, found)
        for spec, found in kept:
            yield spec, found, sums[spec.name]


class TiledInstances(TiledTasks, Instances):
    """The objects of tiles; those that a border cuts are objects of each of their tiles."""

    def labels(self, item: Item) -> np.ndarray:
        return numbered(np.asarray(self.arrays.stored(item, self.specs[0])))[0]

    @torch.no_grad()
    def overlays(
        self, model: nn.Module, items: Sequence[Item], side: int
    ) -> Iterator[tuple[str, Image.Image]]:
        for item in items:
            step, image = self.shown(item)
            found = {
                spec.object_map: maps.numpy() for spec, maps, _ in self._whole(model, item, side)
            }
            objects, truth = objects_of(found), self.labels(item)
            scores = listed(object_scores(*matched(objects, truth)))
            parts = (pictures.objects_over(image, o[::step, ::step]) for o in (truth, objects))
            yield (
                self._name(item),
                titled(f"{item.image.name}  {scores or 'no object'}", (image, *parts)),
            )


class _Whole:
    """Whole predictions from their strips, for what cannot be told from strips.

    done: called with item, task and prediction; None where nobody needs them, so none is kept
    """

    def __init__(
        self,
        done: Callable[[Item, TaskSpec, Tensor], object] | None,
        size: Callable[[Item], tuple[int, int]],
    ):
        self.done, self.size = done, size
        self._maps: dict[str, Tensor] = {}

    def add(self, strip: Strip, spec: TaskSpec, found: Tensor) -> None:
        if self.done is None:
            return
        height, width = self.size(strip.item)
        if not strip.lines.start:
            shape = (*found.shape[:-2], height, width)
            self._maps[spec.name] = torch.empty(shape, dtype=found.dtype)
        self._maps[spec.name][..., strip.lines, :] = found
        if strip.lines.stop == height:
            self.done(strip.item, spec, self._maps.pop(spec.name))


def _cuts_of(loader: DataLoader) -> tuple[Cut, ...]:
    """The tiles that a loader of this goal has, in their order."""
    return cast("TiledItems", loader.dataset).items


def _holds_something(spec: TaskSpec, stored: np.ndarray) -> bool:
    if spec.of_objects:
        return bool((stored > 0).any())
    if spec.labels:
        return bool((labels_of(spec, stored) > 0).any())
    truth = truth_of(spec, stored)
    return bool(np.isfinite(truth).any() if spec.kind == "regression" else (truth > 0).any())
