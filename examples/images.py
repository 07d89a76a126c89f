# SPDX-License-Identifier: Apache-2.0
"""What the examples share: options, images with masks, and the score.

Without --data they write a few pictures of one bright ellipse each, and learn to find it.
Where torchvision was built for another torch, import this before peft, Lightning or transformers.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models import build_sam, pixel_mean
from samfast.training.data import Collate, PairDataset, padded_images, valid_region
from samfast.training.folders import load_split
from samfast.training.metrics import ForegroundScores

declare_missing_schemas()


def read_options(description: str, *more: tuple[str, dict]) -> argparse.Namespace:
    """The command line. Real weights and images replace the generated ones."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, help="folder with images/ and masks/ (generated)")
    parser.add_argument("--checkpoint", help="SAM's weights (random)")
    parser.add_argument("--model", help="vit_tiny, vit_b, … (vit_b with --checkpoint, or vit_tiny)")
    parser.add_argument("--image-size", type=int, help="side of the model's images (1024, or 64)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the images (4)")
    parser.add_argument("--lr", type=float, help="learning rate (2e-4 with --checkpoint, or 2e-3)")
    for name, settings in more:
        parser.add_argument(name, **settings)
    options = parser.parse_args()
    real = options.checkpoint is not None
    options.model = options.model or ("vit_b" if real else "vit_tiny")
    options.image_size = options.image_size or (1024 if real else 64)
    options.lr = options.lr or (2e-4 if real else 2e-3)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    return options


def build(options: argparse.Namespace) -> nn.Module:
    """segment_anything's Sam: with the weights of --checkpoint, or a tiny random one."""
    size, seed = options.image_size, None if options.checkpoint else 0
    return build_sam(options.model, options.checkpoint, size, seed=seed)


def write_pictures(folder: Path, count: int = 16, side: int = 64) -> Path:
    """Write images/ and masks/ of bright ellipses on a dark, noisy ground; returns the folder."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (y, x), (height, width) = rng.uniform(0.3, 0.7, 2) * side, rng.uniform(0.12, 0.3, 2) * side
        mask = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 < 1
        colour = np.where(mask[..., None], rng.uniform(120, 255, 3), rng.uniform(0, 90, 3))
        image = (colour + rng.normal(0, 15, colour.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number:02d}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{number:02d}.png")
    return folder


class Pictures(Dataset):
    """Pairs of files as tensors at the model's size S.

    images: [3, S, S] float, 0 to 255   masks: [S, S] bool   valid: [S, S] bool, False on padding
    """

    def __init__(self, pairs, side: int, mean: Tensor):
        self.pairs, self.side, self.mean = PairDataset(pairs, side), side, mean
        self.collate = Collate(side, truths=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.collate([self.pairs[index]])
        valid = valid_region(batch.sizes, self.side)
        images = padded_images(batch.images, valid, self.mean)
        return {"images": images[0], "masks": batch.masks[0], "valid": valid[0]}


def find_pictures(options: argparse.Namespace, sam: nn.Module) -> tuple[Pictures, Pictures]:
    """Those to train on and those to validate on; every file is checked first."""
    folder = options.data or write_pictures(Path(tempfile.mkdtemp(prefix="samfast-examples-")))
    split, mean = load_split(folder), pixel_mean(sam).cpu()
    side = options.image_size
    return Pictures(split.train, side, mean), Pictures(split.val, side, mean)


@torch.no_grad()
def dice(logits_of: Callable[[Tensor], Tensor], pictures: Dataset, device: str = "cpu") -> float:
    """Dice over all pixels of the pictures; logits_of: images [B, 3, S, S] -> [B, 1, S, S]."""
    scores = ForegroundScores(device)
    for batch in DataLoader(pictures, batch_size=2):
        batch = {name: values.to(device) for name, values in batch.items()}
        found = logits_of(batch["images"])[:, 0] > 0
        scores.update(found[batch["valid"]], batch["masks"][batch["valid"]])
    return scores.compute()[0]
