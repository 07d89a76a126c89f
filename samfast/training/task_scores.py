# SPDX-License-Identifier: Apache-2.0
"""What a model predicts for several tasks, and the scores of each kind of task."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samfast.training.evaluate import full_size
from samfast.training.metrics import ClassScores, ForegroundScores, ValueScores
from samfast.training.probabilities import has_probability, key_of, probabilities
from samfast.training.scored import (
    class_scores,
    class_sums,
    foreground_scores,
    foreground_sums,
    value_scores,
)
from samfast.training.task_data import TaskBatch, TaskCollate
from samfast.training.tasks import TaskSpec

_TITLES = {"dice": "Dice", "iou": "IoU", "miou": "mIoU"}


def predicted(spec: TaskSpec, maps: Tensor) -> Tensor:
    """What maps (C, H, W) say: bool or int64 (H, W), of regression (C, H, W) in stored units."""
    if spec.kind == "binary":
        return maps[0] > 0
    if spec.kind == "semantic":
        return maps.argmax(0)
    if spec.loss == "cosine":  # of any length, but scale and offset are those of unit length
        maps = F.normalize(maps, dim=0)
    return spec.stored_units(maps)


def read_off(spec: TaskSpec | None, maps: Tensor, probable: bool) -> dict[str, np.ndarray]:
    """What logits (C, H, W) of a task predict, by its name; of the one mask, None, under "".

    probable: add the probabilities of a task that has some, under ``key_of`` its name
    """
    name = "" if spec is None else spec.name
    values = maps[0] > 0 if spec is None else predicted(spec, maps)
    found = {name: values.cpu().numpy()}
    if probable and has_probability(spec):
        found[key_of(name)] = probabilities(maps).cpu().numpy()
    return found


@torch.no_grad()
def predictions(
    model: nn.Module, loader: DataLoader
) -> Iterator[tuple[TaskSpec, int, Tensor, Tensor]]:
    """(task, number of the image, prediction, truth) at the files' own sizes, in eval mode."""
    device = next(model.parameters()).device
    specs = cast("TaskCollate", loader.collate_fn).specs
    training, first = model.training, 0
    model.eval()
    try:
        for batch in loader:
            logits = task_logits(model, batch, device)
            for spec, i, prediction, truth in predictions_of(batch, logits, specs):
                yield spec, first + i, prediction, truth
            first += len(batch.images)
    finally:
        model.train(training)


def task_logits(model: nn.Module, batch: TaskBatch, device: torch.device) -> dict[str, Tensor]:
    """Logits (rows, channels, S, S) by task."""
    return model(batch.images.to(device), batch.sizes.to(device), batch.rows)


def predictions_of(
    batch: TaskBatch, logits: dict[str, Tensor], specs: Sequence[TaskSpec]
) -> Iterator[tuple[TaskSpec, int, Tensor, Tensor]]:
    """(task, number in the batch, prediction, truth) at the files' own sizes, task by task."""
    sizes = batch.sizes.tolist()
    for spec in specs:
        own, truths = logits[spec.name], batch.truths[spec.name]
        for i, one, truth in zip(batch.rows[spec.name], own, truths, strict=True):
            height, width = sizes[i]
            maps = full_size(one, height, width, truth.shape[-2:])
            yield spec, i, predicted(spec, maps), truth.to(one.device)


@torch.no_grad()
def predicted_tasks(
    model: nn.Module, loader: DataLoader, specs: Sequence[TaskSpec], probable: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """What each image of a loader of ``data.Batch`` is predicted for these tasks, at its size, as
    ``read_off`` names it."""
    device = next(model.parameters()).device
    for batch in loader:
        rows = {spec.name: list(range(len(batch.images))) for spec in specs}
        logits = model(batch.images.to(device), batch.sizes.to(device), rows)
        for i, ((height, width), truth) in enumerate(
            zip(batch.sizes.tolist(), batch.truths, strict=True)
        ):
            found: dict[str, np.ndarray] = {}
            for spec in specs:
                maps = full_size(logits[spec.name][i], height, width, truth.shape)
                found |= read_off(spec, maps, probable)
            yield found


def score_names(spec: TaskSpec) -> tuple[str, ...]:
    if spec.kind == "regression":
        return ("angle",) if spec.loss == "cosine" else ("abs", "rel")
    return ("dice", "iou") if spec.kind == "binary" else ("miou", "accuracy")


class TaskScores:
    """The scores of one task, whatever its kind."""

    def __init__(self, spec: TaskSpec, device: torch.device | str = "cpu"):
        self.spec = spec
        self._scores: ForegroundScores | ClassScores | ValueScores
        if spec.kind == "binary":
            self._scores = ForegroundScores(device)
        elif spec.kind == "semantic":
            self._scores = ClassScores(spec.channels, device)
        else:
            self._scores = ValueScores(spec.loss == "cosine", device)

    def update(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Add one image: what ``predicted`` gives, and the truth as datasets hold it.

        Returns the image's own sums, for ``image``.
        """
        if self.spec.kind == "binary":
            counts = truth >= 0
            prediction, truth = prediction[counts], truth[counts] == 1
        elif self.spec.loss == "cosine":  # an angle is one between directions, wherever they start
            prediction = self.spec.model_units(prediction)
        elif self.spec.kind == "regression":
            truth = self.spec.stored_units(truth)
        self._scores.update(prediction, truth)
        if isinstance(self._scores, ForegroundScores):
            return foreground_sums(prediction, truth)
        if isinstance(self._scores, ClassScores):
            return class_sums(prediction, truth, self.spec.channels)
        return self._scores.sums(prediction, truth)

    def image(self, sums: Tensor) -> dict[str, Any]:
        """The scores of one image from its sums; None where no pixel counts."""
        values = sums.tolist()
        if self.spec.kind == "binary":
            return foreground_scores(values)
        if self.spec.kind == "semantic":
            return class_scores(values, self.spec.class_names)
        return value_scores(values, score_names(self.spec))

    def classes(self) -> list[dict[str, Any]]:
        """What was counted for each class of a semantic task, in every process; else nothing."""
        if not isinstance(self._scores, ClassScores):
            return []
        names = self.spec.classes or [None] * self.spec.channels
        return [
            {"task": self.spec.name, "class": i, "name": name, **counts._asdict()}
            for i, (name, counts) in enumerate(zip(names, self._scores.classes(), strict=True))
        ]

    def compute(self) -> dict[str, float]:
        return dict(zip(score_names(self.spec), self._scores.compute(), strict=True))


def share(scores: dict[str, float], constant: dict[str, float]) -> float:
    """A task's part of the score of an epoch: 1 is perfect."""
    name, value = next(iter(scores.items()))
    if name == "angle":
        return 1.0 - value / 90.0
    if name == "abs":
        return 1.0 - value / constant[name] if constant[name] > 0 else -value
    return value


def listed(scores: Mapping[str, Any]) -> str:
    """The scores as text, without those that have no value and those of single classes."""
    return " ".join(
        f"{_TITLES.get(name, name)} {value:.4f}"
        for name, value in scores.items()
        if isinstance(value, (int, float))
    )
