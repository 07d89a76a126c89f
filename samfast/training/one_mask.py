# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for one binary mask per image: its data, loss, scores and pictures.

A goal, see ``samfast.training.goal``.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from samfast.training import pictures
from samfast.training.data import Batch, Collate, PairDataset, counting
from samfast.training.evaluate import (
    counted,
    judged_masks,
    judged_of,
    logits_of,
    scoring,
    validation_loader,
)
from samfast.training.fingerprints import of_pairs
from samfast.training.folders import Pair, Split, check_pairs, find_scored, find_split
from samfast.training.foreground import (
    chosen_foreground,
    chosen_ignore,
    counted_mask,
    foreground_config,
)
from samfast.training.image_options import image_options
from samfast.training.images import read_image, read_mask
from samfast.training.label_files import read_labels
from samfast.training.losses import LOSSES
from samfast.training.metrics import ForegroundScores, MeanLoss, all_foreground_scores
from samfast.training.object_numbers import numbered
from samfast.training.panels import titled
from samfast.training.scored import DataFacts, Scored, Tick, foreground_scores, foreground_sums
from samfast.training.segmenters import Segmenter
from samfast.training.settings import FinetuneSettings
from samfast.training.split_checks import (
    check_foreground,
    few_levels_sentence,
    missing_sentence,
    missing_values,
)
from samfast.training.task_scores import listed


class OneMask:
    """The foreground of each image's mask, with or without a box around it.

    score: the column that says which epoch is the best   columns: of the table, with scores
    """

    score = "val_dice"
    joins_steps = False
    decoding_threads: int | None = None  # as many as the processor has
    columns = ("val_loss", "val_dice", "val_iou")
    curves = (("val_dice", "Dice"), ("val_iou", "IoU"))

    def __init__(self, settings: FinetuneSettings, only_score: bool = False):
        """Find the files without decoding them. only_score: nothing is trained."""
        self.settings = settings
        self.foreground = chosen_foreground(settings.foreground, settings.threshold)
        self.ignore = chosen_ignore(settings.ignore, self.foreground)
        self.options = image_options(settings.bands, settings.range)
        if only_score:
            self.split = Split(
                (), find_scored(settings.data, settings.mask_suffix, settings.stacks)
            )
        else:
            self.split = find_split(
                settings.data,
                val_fraction=settings.val_fraction,
                seed=settings.seed,
                mask_suffix=settings.mask_suffix,
                stacks=settings.stacks,
            )
        self.loss_name = settings.loss
        self.tasks = None
        if settings.loss is None:  # that of an adapter that does not know its loss
            self.columns = ("val_dice", "val_iou")

    def fingerprints(self) -> dict[str, str]:
        return of_pairs({"train": self.split.train, "val": self.split.val})

    def check(self) -> None:
        """Decode every file and check it, or raise the first broken rule."""
        split, rule = self.split, self.foreground
        pairs = (*split.train, *split.val)
        found = check_pairs(pairs, rule, self.options, self.ignore, self.decoding_threads)
        count = len(split.train)
        train, val = found[:count], found[count:]
        for what, part in (("training", train), ("validation", val)):
            check_foreground(part, rule, what)
        named = rule if isinstance(rule, tuple) else ()
        missing = missing_values([p.values for p in train], [p.values for p in val], named)
        self.remarks = [
            *missing_sentence(missing, "foreground value"),
            *few_levels_sentence(pairs, found),
        ]
        stored = self.stored_masks()
        self.baseline = baseline_of(counted_mask(values, rule, self.ignore) for values in stored)

    def stored_masks(self) -> Iterator[np.ndarray]:
        """The values of the validation masks, (H, W), whole or in strips."""
        for pair in self.split.val:
            yield read_mask(pair.mask, self.foreground, self.ignore)

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

    def segmenter(self, sam: nn.Module, dtype: torch.dtype) -> nn.Module:
        return Segmenter(sam, dtype, self.settings.decoder_chunk)

    def views(self, part: str) -> Sequence[Pair]:
        return getattr(self.split, part)

    def training_data(self, side: int) -> tuple[Dataset, Collate]:
        settings = self.settings
        data = PairDataset(
            self.split.train,
            side,
            foreground=self.foreground,
            ignore=self.ignore,
            options=self.options,
            flips=settings.flips,
            augment=settings.augment,
            prompt=settings.prompt,
            box_jitter=settings.box_jitter,
            random_points=True,
            seed=settings.seed,
        )
        return data, Collate(side, truths=False)

    def steady(self) -> int:
        return 0 if self.settings.changes_images else len(self.split.train)

    def validation_loader(
        self, pairs: tuple[Pair, ...], side: int, batch_size: int, workers: int = 0
    ) -> DataLoader:
        settings = self.settings
        return validation_loader(
            pairs,
            side,
            batch_size,
            self.foreground,
            workers,
            settings.prompt,
            self.options,
            self.ignore,
        )

    def counts(self, indices: Sequence[int]) -> list[int]:
        return [len(indices)]

    def loss(
        self, model: nn.Module, batch: Batch, weights: Sequence[float] | None = None
    ) -> Tensor:
        logits, valid = model(batch.images, batch.sizes, batch.boxes, batch.names)
        loss = LOSSES[self.settings.loss](logits, batch.masks, counting(batch, valid))
        return loss if weights is None else weights[0] * loss

    def scores(self, model: nn.Module, loader: DataLoader, tick: Tick | None = None) -> Scored:
        device = next(model.parameters()).device
        scores, losses, sums = ForegroundScores(device), MeanLoss(device), []
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
        images = [
            {"image": pair.stem, **foreground_scores(own.tolist())}
            for pair, own in zip(loader.dataset.pairs, sums, strict=True)
        ]
        return Scored({**loss, "val_dice": dice, "val_iou": iou}, images)

    def _add_losses(self, losses: MeanLoss, logits: Tensor, masks: Tensor, valid: Tensor) -> None:
        """The loss of each image by itself, which has the same bits in every batch."""
        if self.settings.loss is not None:
            for parts in zip(logits.split(1), masks.split(1), valid.split(1), strict=True):
                losses.update(LOSSES[self.settings.loss](*parts))

    def epoch_text(self, row: dict) -> str:
        return (
            f"val loss {row['val_loss']:.4f}  Dice {row['val_dice']:.4f} (all foreground "
            f"{self.baseline['dice']:.4f})  IoU {row['val_iou']:.4f}"
        )

    def closing(self, best: dict) -> str:
        return (
            f"best validation Dice {best['val_dice']:.4f} in epoch {best['epoch']} (all "
            f"foreground {self.baseline['dice']:.4f})"
        )

    def table(self, row: dict) -> str:
        return (
            f"Dice {row['val_dice']:.4f}  IoU {row['val_iou']:.4f}  (all foreground Dice "
            f"{self.baseline['dice']:.4f} IoU {self.baseline['iou']:.4f})"
        )

    def summary(self, best: dict) -> dict:
        return {
            **{name: best[name] for name in self.columns},
            "all_foreground_dice": self.baseline["dice"],
            "all_foreground_iou": self.baseline["iou"],
        }

    def facts(self) -> DataFacts:
        named = {f"val_{name}": value for name, value in self.baseline.items()}
        return DataFacts(baseline="all foreground", baselines=named)

    def remembered(self) -> dict:
        """What the adapter's folder keeps for prediction."""
        return {
            **foreground_config(self.foreground),
            "ignore": list(self.ignore) or None,
            **self.options.config(),
            "prompt": self.settings.prompt,
            "loss": self.settings.loss,
            "box_jitter": self.settings.box_jitter,
        }

    def baseline_line(self) -> tuple[float, str]:
        """A line in the curves: its height and its name."""
        return self.baseline["dice"], "Dice of all foreground"

    def labels(self, pair: Pair) -> np.ndarray:
        """int32 (H, W): the objects of a mask whose foreground is any number, from 1 on."""
        return numbered(read_labels(pair.mask))[0]

    def image_of(self, pair: Pair) -> np.ndarray:
        """uint8 (H, W, 3)"""
        return read_image(pair.image, self.options)

    def overlays(
        self, model: nn.Module, pairs: list[Pair], side: int
    ) -> Iterator[tuple[str, Image.Image]]:
        """(name, titled image | truth | prediction at the image's size) for each pair."""
        loader = self.validation_loader(pairs, side, 1)
        for pair, judged in zip(pairs, judged_masks(model, loader), strict=True):
            image, (predicted, truth, _) = self.image_of(pair), judged
            scores = foreground_scores(foreground_sums(*counted(*judged)).tolist())
            drawn = pictures.overlay_pictures(image, truth.cpu().numpy(), predicted.cpu().numpy())
            yield pair.stem, titled(f"{pair.image.name}  {listed(scores)}", drawn)


def baseline_of(
    masks: Iterable[tuple[np.ndarray, np.ndarray | None]],
) -> dict[str, float]:
    """Dice and IoU of calling all foreground; masks: as ``counted_mask`` gives them."""
    truths = (truth if ignored is None else truth[~ignored] for truth, ignored in masks)
    dice, iou = all_foreground_scores(torch.from_numpy(truth) for truth in truths)
    return {"dice": dice, "iou": iou}
