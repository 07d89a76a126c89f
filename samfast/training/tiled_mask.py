# SPDX-License-Identifier: Apache-2.0
"""``OneMask`` whose images are cut into tiles."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samfast.training import pictures
from samfast.training.data import Collate, counting
from samfast.training.evaluate import logits_of, scoring
from samfast.training.folders import Pair
from samfast.training.foreground import counted_mask
from samfast.training.metrics import ForegroundScores, MeanLoss
from samfast.training.one_mask import OneMask
from samfast.training.panels import titled
from samfast.training.scored import Scored, Tick, foreground_scores, foreground_sums
from samfast.training.task_scores import listed
from samfast.training.tiled_data import Cut, TiledPairs
from samfast.training.tiled_goal import Strip, Tiled, at_size


class TiledMask(Tiled, OneMask):
    """The foreground of tiles' masks."""

    def stored_masks(self) -> Iterator[np.ndarray]:
        for pair in self.split.val:
            values = self.arrays.mask(pair, self.foreground, self.ignore)
            for lines in self.lines_of(len(values)):
                yield np.array(values[lines])

    def holds_something(self, cut: Cut) -> bool:
        values = cut.tile.of(self.arrays.mask(cut.item, self.foreground, self.ignore))
        return bool(counted_mask(values, self.foreground, self.ignore)[0].any())

    def _data(self, cuts: Sequence[Cut], side: int, **more: Any) -> TiledPairs:
        rule, ignore = self.foreground, self.ignore
        return TiledPairs(cuts, side, self.arrays, foreground=rule, ignore=ignore, **more)

    def training_data(self, side: int) -> tuple[TiledPairs, Collate]:
        settings = self.settings
        more = {"flips": settings.flips, "augment": settings.augment, "seed": settings.seed}
        return self._data(self.views("train"), side, **more), Collate(side, truths=False)

    def validation_loader(
        self, items: Sequence[Pair], side: int, batch_size: int, workers: int = 0
    ) -> DataLoader:
        data = self._data(self._cuts(items), side)
        return self._loader(data, batch_size, Collate(side, truths=False), workers)

    def _maps(
        self, model: nn.Module, loader: DataLoader, losses: MeanLoss, tick: Tick | None = None
    ) -> Iterator[np.ndarray]:
        """Logits of each tile at its own size, (1, h, w)."""
        device = next(model.parameters()).device
        tiles = (cut.tile for cut in _cuts_of(loader))
        for batch in loader:
            logits, valid = logits_of(model, batch, device)
            self._add_losses(losses, logits, batch.masks.to(device), counting(batch, valid))
            if tick is not None:
                tick(len(batch.images))
            for one, size, tile in zip(logits, batch.sizes.tolist(), tiles, strict=False):
                yield at_size(one[None], size, tile)

    def _judged(self, strip: Strip, device: torch.device) -> tuple[Tensor, Tensor]:
        """Prediction and truth where the truth counts, bool (pixels,)."""
        values = self.arrays.mask(strip.item, self.foreground, self.ignore)[strip.lines]
        truth, ignored = counted_mask(np.array(values), self.foreground, self.ignore)
        found, expected = strip.maps[0].to(device) > 0, torch.from_numpy(truth).to(device)
        if ignored is None:
            return found.flatten(), expected.flatten()
        counts = torch.from_numpy(~ignored).to(device)
        return found[counts], expected[counts]

    def scores(self, model: nn.Module, loader: DataLoader, tick: Tick | None = None) -> Scored:
        device = next(model.parameters()).device
        scores, losses = ForegroundScores(device), MeanLoss(device)
        sums: dict[str, Tensor] = {}
        with scoring(model):
            maps = self._maps(model, loader, losses, tick)
            for strip in self.strips(_cuts_of(loader), maps):
                judged = self._judged(strip, device)
                scores.update(*judged)
                stem = strip.item.stem
                own = foreground_sums(*judged)
                sums[stem] = sums[stem] + own if stem in sums else own
        dice, iou = scores.compute()
        loss = {} if self.settings.loss is None else {"val_loss": losses.compute()}
        images = [{"image": stem, **foreground_scores(own.tolist())} for stem, own in sums.items()]
        return Scored({**loss, "val_dice": dice, "val_iou": iou}, images)

    @torch.no_grad()
    def overlays(
        self, model: nn.Module, items: Sequence[Pair], side: int
    ) -> Iterator[tuple[str, Image.Image]]:
        device = next(model.parameters()).device
        for pair in items:
            loader = self.validation_loader([pair], side, 1)
            step, image = self.shown(pair)
            sums: list[Tensor] = []
            found: list[np.ndarray] = []
            with scoring(model):
                maps = self._maps(model, loader, MeanLoss(device))
                for strip in self.strips(_cuts_of(loader), maps):
                    sums.append(foreground_sums(*self._judged(strip, device)))
                    found.append((strip.maps[0] > 0).numpy())
            values = self.arrays.mask(pair, self.foreground, self.ignore)[::step, ::step]
            truth = counted_mask(np.array(values), self.foreground, self.ignore)[0]
            predicted = np.concatenate(found)[::step, ::step]
            drawn = pictures.overlay_pictures(image, truth, predicted)
            scored = listed(foreground_scores(torch.stack(sums).sum(0).tolist()))
            yield pair.stem, titled(f"{pair.image.name}  {scored}", drawn)


def _cuts_of(loader: DataLoader) -> tuple[Cut, ...]:
    """The tiles that a loader of this goal has, in their order."""
    return cast("TiledPairs", loader.dataset).pairs
