# SPDX-License-Identifier: Apache-2.0
"""What a model predicts for one large image, tile by tile."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from samfast.models import image_size
from samfast.training.data import Collate, Sample, resize_image
from samfast.training.evaluate import full_size
from samfast.training.segmenters import SamSegmenter
from samfast.training.task_scores import read_off
from samfast.training.tasks import TaskSpec
from samfast.training.tiles import Tile, blended


@torch.no_grad()
def predicted_by_tiles(
    model: SamSegmenter,
    image: np.ndarray,
    specs: Sequence[TaskSpec],
    tile: int,
    overlap: int,
    batch_size: int = 4,
    tick: Callable[[int], object] | None = None,
    probable: bool = False,
) -> dict[str, np.ndarray]:
    """What ``predicted`` says of each task by name, at the image's size; without specs the mask of
    the one there is, bool (H, W), under "".

    image: uint8 (H, W, 3)   tile, overlap: in pixels of the image   tick: told the tiles of a batch
    probable: add the probabilities of each task that has some, under ``key_of`` its name

    A tile becomes as large as the model's images; its logits are resized back and blended, see
    ``tiles``. Memory beside the result is that of one line of tiles.
    """
    device = next(model.parameters()).device
    side = image_size(model.sam)
    collate = Collate(side, truths=False)
    channels = [spec.channels for spec in specs]

    def maps_of(line: list[Tile]) -> Iterator[np.ndarray]:
        for first in range(0, len(line), batch_size):
            own = line[first : first + batch_size]
            crops = [resize_image(image[t.top : t.bottom, t.left : t.right], side) for t in own]
            masks = [np.zeros(crop.shape[:2], bool) for crop in crops]  # for their sizes only
            pairs = zip(crops, masks, strict=True)
            batch = collate([Sample(crop, mask, mask) for crop, mask in pairs])
            images, sizes = batch.images.to(device), batch.sizes.to(device)
            if specs:
                rows = {spec.name: list(range(len(own))) for spec in specs}
                found = model(images, sizes, rows)
                logits = torch.cat([found[spec.name] for spec in specs], 1)
            else:
                logits = model(images, sizes)[0][:, None]
            for t, one, size in zip(own, logits, batch.sizes.tolist(), strict=True):
                shape = t.bottom - t.top, t.right - t.left
                yield full_size(one, size[0], size[1], shape).cpu().numpy()
            if tick is not None:
                tick(len(own))

    strips: dict[str, list[np.ndarray]] = {}
    tasks: Sequence[TaskSpec | None] = specs or [None]
    for maps in blended(image.shape[:2], tile, overlap, maps_of):
        strip = torch.from_numpy(maps)
        for spec, own in zip(tasks, strip.split(channels or [1]), strict=True):
            for name, values in read_off(spec, own, probable).items():
                strips.setdefault(name, []).append(values)
    return {name: np.concatenate(parts, axis=-2) for name, parts in strips.items()}
