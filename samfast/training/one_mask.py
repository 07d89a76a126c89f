# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for one binary mask per image, of files: its data, and what ``MaskGoal`` has.

A goal, see ``samfast.training.goal``.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from samfast.training.data import Collate, MaskDataset, PairDataset
from samfast.training.evaluate import validation_loader
from samfast.training.fingerprints import of_pairs
from samfast.training.folders import Pair, Split, check_pairs, find_scored, find_split
from samfast.training.foreground import counted_mask
from samfast.training.images import read_image, read_mask
from samfast.training.label_files import read_labels
from samfast.training.mask_goal import MaskGoal, baseline_of
from samfast.training.object_numbers import numbered
from samfast.training.settings import FinetuneSettings
from samfast.training.split_checks import (
    check_foreground,
    few_levels_sentence,
    missing_sentence,
    missing_values,
)


class OneMask(MaskGoal[Pair]):
    """The foreground of each image's mask file, with or without a box around it."""

    def __init__(self, settings: FinetuneSettings, only_score: bool = False):
        """Find the files without decoding them. only_score: nothing is trained."""
        super().__init__(settings)
        if only_score:
            self.split = Split(
                (), find_scored(settings.folder, settings.mask_suffix, settings.stacks)
            )
        else:
            self.split = find_split(
                settings.folder,
                val_fraction=settings.val_fraction,
                seed=settings.seed,
                mask_suffix=settings.mask_suffix,
                stacks=settings.stacks,
            )

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

    def training_data(self, side: int) -> tuple[MaskDataset[Any], Collate]:
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
            box_jitter=settings.box_jitter or 0.0,
            random_points=True,
            seed=settings.seed,
        )
        return data, Collate(side, truths=False)

    def validation_loader(
        self, items: Sequence[Pair], side: int, batch_size: int, workers: int = 0
    ) -> DataLoader:
        settings = self.settings
        return validation_loader(
            items,
            side,
            batch_size,
            self.foreground,
            workers,
            settings.prompt,
            self.options,
            self.ignore,
        )

    def labels(self, pair: Pair) -> np.ndarray:
        """int32 (H, W): the objects of a mask whose foreground is any number, from 1 on."""
        return numbered(read_labels(pair.mask))[0]

    def image_of(self, pair: Pair) -> np.ndarray:
        """uint8 (H, W, 3)"""
        return read_image(pair.image, self.options)
