# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for several tasks at once: their data, losses, scores and pictures.

A goal, see ``samfast.training.goal``.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samfast.training import pictures
from samfast.training.chosen_tasks import specs_of
from samfast.training.coco_items import CocoMask
from samfast.training.evaluate import scoring
from samfast.training.fingerprints import of_all, read_from
from samfast.training.goal import Stemmed
from samfast.training.image_options import image_options
from samfast.training.images import read_image
from samfast.training.losses import LOSSES, class_loss, direction_loss, value_loss
from samfast.training.metrics import MeanLoss
from samfast.training.panels import titled
from samfast.training.scored import DataFacts, Scored, Tick
from samfast.training.segmenters import SamSegmenter, TaskSegmenter
from samfast.training.settings import FinetuneSettings
from samfast.training.split_checks import without_foreground
from samfast.training.stacks import file_of
from samfast.training.stopping import ignore_signals
from samfast.training.task_data import (
    HasTargets,
    TargetDataset,
    TaskBatch,
    TaskCollate,
    TaskDataset,
    check_follows,
    truth_of,
)
from samfast.training.task_files import check_items, read_stored, remarks
from samfast.training.task_items import Item, find_items
from samfast.training.task_scores import (
    TaskScores,
    listed,
    predictions,
    predictions_of,
    score_names,
    share,
    task_logits,
)
from samfast.training.tasks import TaskSpec

_SAMPLED = 4096  # values of each image that the best constant is found from


def task_loss(spec: TaskSpec, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of one task, its weight not yet in it; 0 with a gradient of 0 for no image."""
    if len(logits) == 0:
        return logits.sum()
    if spec.kind == "semantic":
        return class_loss(logits, targets)
    if spec.kind == "regression":
        return (direction_loss if spec.loss == "cosine" else value_loss)(logits, targets)
    return LOSSES[spec.loss](logits[:, 0], targets == 1, targets >= 0)


def tasks_loss(
    model: nn.Module,
    batch: TaskBatch,
    specs: Sequence[TaskSpec],
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The weighted sum of the tasks' losses; model: a TaskSegmenter, wrapped or not.

    weights: of each task, by which its own weight is multiplied
    """
    logits = model(batch.images, batch.sizes, batch.rows)
    losses = [task_loss(spec, logits[spec.name], batch.targets[spec.name]) for spec in specs]
    factors = [1.0] * len(specs) if weights is None else weights
    weighted = (
        spec.weight * factor * loss
        for spec, factor, loss in zip(specs, factors, losses, strict=True)
    )
    return cast("Tensor", sum(weighted))  # 0 only without tasks


class TaskView(Stemmed, HasTargets, Protocol):
    """What the model sees as one image, with what its tasks are read from."""


class Together(Protocol):
    """Scores of what the tasks of an image say together."""

    def add(self, item: Item, spec: TaskSpec, prediction: Tensor) -> None:
        """One task's prediction at the file's size; those of an image come in any order."""

    def row(self) -> dict[str, float]:
        """The scores over all images."""

    def images(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of each image and task, with those of each image."""


class ManyTasks:
    """The tasks of a tasks.yaml, or of an adapter that was trained with one.

    val_score: the mean over tasks of Dice, mean IoU, or the share of the best constant's error that
        is gone (of directions, of 90 degrees)
    """

    score = "val_score"
    joins_steps = False
    decoding_threads: int | None = None  # as many as the processor has

    def __init__(
        self,
        settings: FinetuneSettings,
        specs: Sequence[TaskSpec] | None = None,
        only_score: bool = False,
    ):
        """Find the files without decoding them.

        specs: in place of that file   only_score: nothing is for training
        """
        self.settings = settings
        self.options = image_options(settings.bands, settings.range)
        specs = specs_of(settings) if specs is None else specs
        assert specs is not None, settings.masks
        self.specs = tuple(specs)
        self.tasks = tuple(spec.task for spec in self.specs)
        check_follows(self.specs, settings.augment)
        self.split = find_items(
            settings.folder,
            self.specs,
            val_fraction=settings.val_fraction,
            seed=settings.seed,
            only_score=only_score,
            mask_suffix=settings.mask_suffix,
            stacks=settings.stacks,
        )
        self._stems = Counter(item.stem for item in self.split.val)
        self._name_columns()

    def _name_columns(self) -> None:
        self.score_names = {spec.name: score_names(spec) for spec in self.specs}
        own = [f"val_{task}_{name}" for task, names in self.score_names.items() for name in names]
        self.columns = ("val_loss", self.score, *own)
        self.curves = [(self.score, "score")] + [
            (f"val_{task}_{names[0]}", f"{task} {names[0]}")
            for task, names in self.score_names.items()
            if names[0] in ("dice", "miou")
        ]
        self.loss_name = "+".join(dict.fromkeys(spec.loss for spec in self.specs))

    def fingerprints(self) -> dict[str, str]:
        files: dict[str, list[Path | CocoMask]] = {}
        for part, items in (("train", self.split.train), ("val", self.split.val)):
            for item in items:  # a derived task has the file that it is derived from
                targets = (read_from(item.targets[name]) for name in sorted(item.targets))
                image = file_of(item.image)
                files[f"{part}/{image}"] = [image, *dict.fromkeys(targets)]
        return of_all(files)

    def check(self) -> None:
        """Decode every file and check it, or raise the first broken rule."""
        items = (*self.split.train, *self.split.val)
        found = check_items(items, self.specs, self.options, self.decoding_threads)
        self.baseline = {spec.name: self._constant(spec) for spec in self.specs}
        count = len(self.split.train)
        self.remarks = [text for spec in self.specs for text in remarks(spec, items, found, count)]

    def _constant(self, spec: TaskSpec) -> dict[str, float]:
        """The scores of the best prediction that is the same everywhere: all foreground, the most
        frequent class, the median (of directions the mean)."""

        truths = partial(self.truths, spec)

        def counted(truth: Tensor) -> bool:
            return bool((truth.isfinite() if spec.kind == "regression" else truth >= 0).any())

        if not any(map(counted, truths())):
            raise ValueError(
                f"task {spec.name} cannot be scored: every pixel of its validation masks is ignored"
            )

        if spec.kind == "binary":
            if not any(bool((truth == 1).any()) for truth in truths()):
                raise ValueError(without_foreground("validation", f" of task {spec.name}"))
            constant = torch.tensor(True)
        elif spec.kind == "semantic":
            counts = torch.zeros(spec.channels, dtype=torch.int64)
            for t in truths():
                counts += t[t >= 0].long().bincount(minlength=spec.channels)
            constant = counts.argmax()
        else:
            flat = torch.cat([_sample(truth) for truth in truths()], dim=1)
            middle = flat.mean(1) if spec.loss == "cosine" else flat.nanmedian(1).values
            constant = spec.stored_units(middle)
        scores = TaskScores(spec)
        for truth in truths():
            shape = truth.shape[-2:]
            whole = constant[..., None, None].expand(*constant.shape, *shape)
            scores.update(whole, truth)
        return scores.compute()

    def truths(self, spec: TaskSpec) -> Iterator[Tensor]:
        """A task's truths of the validation images, whole or in strips."""
        for item in self.split.val:
            if (path := item.targets.get(spec.name)) is not None:
                yield torch.from_numpy(truth_of(spec, read_stored(spec, path)))

    def sentences(self) -> Iterator[str]:
        """Sentences that a run prints before it begins."""
        yield from self.remarks
        for spec in self.specs:
            counts = [
                sum(spec.name in item.targets for item in items)
                for items in (self.split.train, self.split.val)
            ]
            yield (
                f"task {spec.name}: {spec.kind}, {spec.channels} "
                f"channel{'s' if spec.channels > 1 else ''}, loss {spec.loss} times "
                f"{spec.weight:g}, {counts[0]} training and {counts[1]} validation images; the "
                f"best constant prediction scores {listed(self.baseline[spec.name])}"
            )

    def segmenter(self, sam: nn.Module, dtype: torch.dtype) -> SamSegmenter:
        return TaskSegmenter(sam, dtype, self.settings.decoder_chunk)

    def views(self, part: str) -> Sequence[TaskView]:
        return getattr(self.split, part)

    def training_data(self, side: int) -> tuple[TargetDataset[Any], TaskCollate]:
        settings = self.settings
        data = TaskDataset(
            self.split.train,
            self.specs,
            side,
            flips=settings.flips,
            augment=settings.augment,
            seed=settings.seed,
            options=self.options,
            truths=False,
        )
        return data, TaskCollate(self.specs, side, truths=False)

    def steady(self) -> int:
        return 0 if self.settings.changes_images else len(self.split.train)

    def validation_loader(
        self, items: Sequence[Item], side: int, batch_size: int, workers: int = 0
    ) -> DataLoader:
        return DataLoader(
            TaskDataset(items, self.specs, side, options=self.options),
            batch_size=batch_size,
            collate_fn=TaskCollate(self.specs, side, truths=True),
            num_workers=workers,
            worker_init_fn=ignore_signals,
        )

    def counts(self, indices: Sequence[int]) -> list[int]:
        views = self.views("train")
        targets = [views[i].targets for i in indices]
        return [sum(spec.name in own for own in targets) for spec in self.specs]

    def loss(
        self, model: nn.Module, batch: TaskBatch, weights: Sequence[float] | None = None
    ) -> Tensor:
        return tasks_loss(model, batch, self.specs, weights)

    def scores(self, model: nn.Module, loader: DataLoader, tick: Tick | None = None) -> Scored:
        device = next(model.parameters()).device
        scores = {spec.name: TaskScores(spec, device) for spec in self.specs}
        losses = {spec.name: MeanLoss(device) for spec in self.specs}
        sums: dict[tuple[int, str], Tensor] = {}
        first, together = 0, self.together(device)
        items = cast("TargetDataset[Item]", loader.dataset).items
        with scoring(model):
            for batch in loader:
                logits = task_logits(model, batch, device)
                self.add_losses(losses, logits, batch, device)
                for spec, i, prediction, truth in predictions_of(batch, logits, self.specs):
                    own = scores[spec.name].update(prediction, truth)
                    sums[first + i, spec.name] = own
                    if together is not None:
                        together.add(items[first + i], spec, prediction)
                first += len(batch.images)
                if tick is not None:
                    tick(len(batch.images))
        images = [
            {"image": self._name(item), "task": spec.name}
            | scores[spec.name].image(sums[number, spec.name])
            for number, item in enumerate(items)
            for spec in self.specs
            if spec.name in item.targets
        ]
        classes = [row for own in scores.values() for row in own.classes()]
        row = self._row(scores, losses)
        if together is not None:
            row, images = row | together.row(), together.images(images)
        return Scored(row, images, classes)

    def add_losses(
        self,
        losses: dict[str, MeanLoss],
        logits: dict[str, Tensor],
        batch: TaskBatch,
        device: torch.device,
    ) -> None:
        """The loss of each image by itself, which has the same bits in every batch."""
        for spec in self.specs:
            targets = batch.targets[spec.name].to(device)
            for one, target in zip(logits[spec.name], targets, strict=True):
                losses[spec.name].update(task_loss(spec, one[None], target[None]))

    def together(self, device: torch.device) -> "Together | None":
        """What scores the predictions of all tasks together; None for nothing."""
        return None

    def _row(self, scores: dict[str, TaskScores], losses: dict[str, MeanLoss]) -> dict[str, float]:
        found = {name: own.compute() for name, own in scores.items()}
        shares = [share(found[name], self.baseline[name]) for name in found]
        loss = sum(spec.weight * losses[spec.name].compute() for spec in self.specs)
        row = {"val_loss": loss, self.score: sum(shares) / len(shares)}
        for task, own in found.items():
            row.update({f"val_{task}_{name}": value for name, value in own.items()})
        return row

    def _name(self, item: Item) -> str:
        """The image's stem, after its folder's name where images of several folders share it."""
        if self._stems[item.stem] > 1:
            return f"{item.image.parent.parent.name}-{item.stem}"
        return item.stem

    def _of_row(self, task: str, row: Mapping[str, Any]) -> dict[str, float]:
        return {name: row[f"val_{task}_{name}"] for name in self.score_names[task]}

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        parts = [f"{spec.name} {listed(self._of_row(spec.name, row))}" for spec in self.specs]
        score = f"val loss {row['val_loss']:.4f}  score {row[self.score]:.4f}"
        return "  ".join([score, *parts])

    def closing(self, best: Mapping[str, Any]) -> str:
        score = f"best validation score {best[self.score]:.4f} in epoch {best['epoch']}"
        return f"{self.table(best)}\n{score}"

    def table(self, row: Mapping[str, Any]) -> str:
        """A line for each task, with what the best constant prediction scores."""
        width = max(len(spec.name) for spec in self.specs)
        return "\n".join(
            f"{spec.name:<{width}}  {listed(self._of_row(spec.name, row))}  (best constant "
            f"{listed(self.baseline[spec.name])})"
            for spec in self.specs
        )

    def summary(self, best: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "val_loss": best["val_loss"],
            self.score: best[self.score],
            "tasks": {spec.name: self._of_row(spec.name, best) for spec in self.specs},
            "best_constant": self.baseline,
        }

    def facts(self) -> DataFacts:
        named = {
            f"val_{task}_{name}": value
            for task, own in self.baseline.items()
            for name, value in own.items()
        }
        return DataFacts(baseline="best constant", baselines=named)

    def remembered(self) -> dict[str, Any]:
        """What the adapter's folder keeps for evaluation and prediction."""
        tasks = [spec.config() for spec in self.specs]
        return {"tasks": tasks, "prompt": "none", **self.options.config()}

    def baseline_line(self) -> tuple[float, str] | None:
        return None

    def overlays(
        self, model: nn.Module, items: Sequence[Item], side: int
    ) -> Iterator[tuple[str, Image.Image]]:
        """(name, titled image | truth | prediction at the image's size) by item and task."""
        loader = self.validation_loader(items, side, 1)
        for spec, number, prediction, truth in predictions(model, loader):
            item = items[number]
            scores = TaskScores(spec, prediction.device)
            own = listed(scores.image(scores.update(prediction, truth)))
            image = read_image(item.image, self.options)
            drawn, legend = pictures.task_pictures(spec, image, truth, prediction)
            title = f"{item.image.name}  {spec.name}  {own or 'no pixel counts'}"
            yield f"{self._name(item)}-{spec.name}", titled(title, drawn, legend)


def _sample(truth: Tensor) -> Tensor:
    """At most so many of the pixels that have values, (C, pixels)."""
    flat = truth.flatten(1)
    flat = flat[:, flat.isfinite().all(0)]
    return flat[:, :: max(1, -(-flat.shape[1] // _SAMPLED))]
