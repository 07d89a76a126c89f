# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for one binary mask per image: its loss, scores and pictures.

The part of a goal, see ``samfast.training.goal``, that does not depend on where masks come from.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samfast.training import pictures
from samfast.training.data import Batch, MaskDataset, counting
from samfast.training.evaluate import counted, judged_masks, judged_of, logits_of, scoring
from samfast.training.folders import Split, V
from samfast.training.foreground import chosen_foreground, chosen_ignore, foreground_config
from samfast.training.goal import Stemmed
from samfast.training.image_options import image_options
from samfast.training.losses import chosen_loss
from samfast.training.metrics import ForegroundScores, MeanLoss, all_foreground_scores
from samfast.training.panels import titled
from samfast.training.scored import DataFacts, Scored, Tick, foreground_scores, foreground_sums
from samfast.training.segmenters import SamSegmenter, Segmenter
from samfast.training.settings import FinetuneSettings
from samfast.training.task_scores import listed


class MaskGoal(Generic[V]):
    """The foreground of each image's mask, wherever images and masks come from.

    score: the column that says which epoch is the best   columns: of the table, with scores
    split: the images; a subclass finds, checks and reads them
    """

    score = "val_dice"
    joins_steps = False
    decoding_threads: int | None = None  # as many as the processor has
    columns: tuple[str, ...] = ("val_loss", "val_dice", "val_iou")
    curves: Sequence[tuple[str, str]] = (("val_dice", "Dice"), ("val_iou", "IoU"))
    tasks = None
    split: Split[V]
    remarks: list[str]  # these two after ``check``
    baseline: dict[str, float]

    def __init__(self, settings: FinetuneSettings):
        self.settings = settings
        self.foreground = chosen_foreground(settings.foreground, settings.threshold)
        self.ignore = chosen_ignore(settings.ignore, self.foreground)
        self.options = image_options(settings.bands, settings.range)
        self.loss_name = settings.loss
        if settings.loss is None:  # that of an adapter that does not know its loss
            self.columns = ("val_dice", "val_iou")

    def sentences(self) -> Iterator[str]:
        """Sentences that a run prints before it begins."""
        yield from self.remarks
        if self.settings.prompt == "box":
            yield (
                "the prompt is the box around each image's foreground; in training its sides "
                f"move by up to {self.settings.box_jitter:g} pixels"
            )
        if self.settings.prompt == "point":
            yield (
                "the prompt is a point on each image's foreground: a random one in training, "
                "otherwise the innermost"
            )
        yield (
            f"{len(self.split.train)} training and {len(self.split.val)} validation images; "
            f"predicting only foreground scores Dice {self.baseline['dice']:.4f}, IoU "
            f"{self.baseline['iou']:.4f}"
        )

    def segmenter(self, sam: nn.Module, dtype: torch.dtype) -> SamSegmenter:
        return Segmenter(sam, dtype, self.settings.decoder_chunk)

    def views(self, part: str) -> Sequence[Stemmed]:
        return getattr(self.split, part)

    def steady(self) -> int:
        return 0 if self.settings.changes_images else len(self.split.train)

    def validation_loader(
        self, items: Sequence[V], side: int, batch_size: int, workers: int = 0
    ) -> DataLoader:
        raise NotImplementedError

    def counts(self, indices: Sequence[int]) -> list[int]:
        return [len(indices)]

    def loss(
        self, model: nn.Module, batch: Batch, weights: Sequence[float] | None = None
    ) -> Tensor:
        logits, valid = model(batch.images, batch.sizes, batch.boxes, batch.names)
        loss = chosen_loss(self.settings.loss)(logits, batch.masks, counting(batch, valid))
        return loss if weights is None else weights[0] * loss

    def scores(self, model: nn.Module, loader: DataLoader, tick: Tick | None = None) -> Scored:
        device = next(model.parameters()).device
        scores, losses = ForegroundScores(device), MeanLoss(device)
        sums: list[Tensor] = []
        with scoring(model):
            for batch in loader:
                logits, valid = logits_of(model, batch, device)
                valid = counting(batch, valid)
                self._add_losses(losses, logits, batch.masks.to(device), valid)
                for judged in judged_of(batch, logits):
                    predicted, truth = counted(*judged)
                    scores.update(predicted, truth)
                    sums.append(foreground_sums(predicted, truth))
                if tick is not None:
                    tick(len(batch.images))
        dice, iou = scores.compute()
        loss = {} if self.settings.loss is None else {"val_loss": losses.compute()}
        views = cast("MaskDataset[V]", loader.dataset)
        images = [
            {"image": pair.stem, **foreground_scores(own.tolist())}
            for pair, own in zip(views.pairs, sums, strict=True)
        ]
        return Scored({**loss, "val_dice": dice, "val_iou": iou}, images)

    def _add_losses(self, losses: MeanLoss, logits: Tensor, masks: Tensor, valid: Tensor) -> None:
        """The loss of each image by itself, which has the same bits in every batch."""
        if self.settings.loss is not None:
            for parts in zip(logits.split(1), masks.split(1), valid.split(1), strict=True):
                losses.update(chosen_loss(self.settings.loss)(*parts))

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        return (
            f"val loss {row['val_loss']:.4f}  Dice {row['val_dice']:.4f} (all foreground "
            f"{self.baseline['dice']:.4f})  IoU {row['val_iou']:.4f}"
        )

    def closing(self, best: Mapping[str, Any]) -> str:
        return (
            f"best validation Dice {best['val_dice']:.4f} in epoch {best['epoch']} (all "
            f"foreground {self.baseline['dice']:.4f})"
        )

    def table(self, row: Mapping[str, Any]) -> str:
        return (
            f"Dice {row['val_dice']:.4f}  IoU {row['val_iou']:.4f}  (all foreground Dice "
            f"{self.baseline['dice']:.4f} IoU {self.baseline['iou']:.4f})"
        )

    def summary(self, best: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **{name: best[name] for name in self.columns},
            "all_foreground_dice": self.baseline["dice"],
            "all_foreground_iou": self.baseline["iou"],
        }

    def facts(self) -> DataFacts:
        named = {f"val_{name}": value for name, value in self.baseline.items()}
        return DataFacts(baseline="all foreground", baselines=named)

    def remembered(self) -> dict[str, Any]:
        """What the adapter's folder keeps for prediction."""
        return {
            **foreground_config(self.foreground),
            "ignore": list(self.ignore) or None,
            **self.options.config(),
            "prompt": self.settings.prompt,
            "loss": self.settings.loss,
            "box_jitter": self.settings.box_jitter,
        }

    def baseline_line(self) -> tuple[float, str] | None:
        """A line in the curves: its height and its name."""
        return self.baseline["dice"], "Dice of all foreground"

    def image_of(self, pair: V) -> np.ndarray:
        """uint8 (H, W, 3)"""
        raise NotImplementedError

    def overlays(
        self, model: nn.Module, items: Sequence[V], side: int
    ) -> Iterator[tuple[str, Image.Image]]:
        """(name, titled image | truth | prediction at the image's size) for each image."""
        loader = self.validation_loader(items, side, 1)
        for pair, judged in zip(items, judged_masks(model, loader), strict=True):
            image, (predicted, truth, _) = self.image_of(pair), judged
            scores = foreground_scores(foreground_sums(*counted(*judged)).tolist())
            drawn = pictures.overlay_pictures(image, truth.cpu().numpy(), predicted.cpu().numpy())
            yield pair.stem, titled(f"{pair.image.name}  {listed(scores)}", drawn)


def baseline_of(masks: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> dict[str, float]:
    """Dice and IoU of calling all foreground; masks: as ``counted_mask`` gives them."""
    truths = (truth if ignored is None else truth[~ignored] for truth, ignored in masks)
    dice, iou = all_foreground_scores(torch.from_numpy(truth) for truth in truths)
    return {"dice": dice, "iou": iou}
