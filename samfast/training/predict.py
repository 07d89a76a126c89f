# SPDX-License-Identifier: Apache-2.0
"""Masks for new photographs from a saved adapter."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import samfast
from samfast.models import build_sam, image_size
from samfast.modules.adapter_files import read_adapter
from samfast.training import start
from samfast.training.data import Collate, Sample, resize_image
from samfast.training.evaluate import predicted_masks
from samfast.training.images import SUFFIXES, read_image
from samfast.training.pictures import PREDICTION_COLOUR, png_bytes, tinted
from samfast.training.records import write_whole
from samfast.training.settings import PredictSettings


def predict(settings: PredictSettings) -> dict:
    """Write one mask and one overlay for each image; returns what was written.

    Every image is decoded before anything is written: a bad one is a ValueError with one sentence.
    """
    start.check_prediction(settings)
    if not settings.images:
        raise ValueError("no image is named; give files or folders of them")
    paths = find_images(settings.images)
    names = _output_names(paths)
    for path in paths:
        read_image(path)
    if settings.output.exists() and not settings.output.is_dir():
        raise ValueError(f"output {settings.output} is a file, not a folder")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = start.autocast_dtype(settings.precision, device)
    method = read_adapter(_adapter_folder(settings.adapter)).method
    with start.backend_asked_for(settings.backend, method, settings.fuse, device, dtype):
        sam = load_adapted(
            settings.adapter,
            settings.checkpoint,
            start.base_dtype("auto", dtype, device),
            fuse=settings.fuse,
        )
        model = start.PromptFree(sam, dtype, settings.decoder_chunk).to(device)
        loader = DataLoader(
            _Photographs(paths, image_size(sam)),
            batch_size=settings.batch_size,
            collate_fn=Collate(image_size(sam), truths=True),
        )
        settings.output.mkdir(parents=True, exist_ok=True)
        written = []
        masks = (mask.cpu().numpy() for mask, _ in predicted_masks(model, loader))
        for path, name, mask in zip(paths, names, masks, strict=True):
            written.append(_write(settings.output, name, path, mask))
            if not settings.json:
                print(
                    f"{path}: {written[-1]['foreground']:.1%} foreground, {written[-1]['mask']}",
                    flush=True,
                )
    return {"output": str(settings.output), "images": written}


def find_images(given: Sequence[Path]) -> list[Path]:
    """Files as named, folders as the images in them (not below), sorted."""
    paths = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            inside = [p for p in inside if not p.name.startswith(".")]
            if not inside:
                raise ValueError(f"folder {path} holds no image ({', '.join(SUFFIXES)})")
            paths += inside
        elif path.exists():
            paths.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    return paths


def load_adapted(
    adapter: Path,
    checkpoint: Path | None = None,
    base_dtype: torch.dtype | None = None,
    fuse: bool = True,
) -> nn.Module:
    """The SAM that an adapter folder was trained on, with the adapter, in eval mode, on the CPU.

    fuse: whether attention runs fused, as ``finetune`` trains it unless told otherwise
    adapter may also be a folder with ``best/`` in it. Random bases are drawn again from the
    recorded seed; others need ``checkpoint``, and a wrong one is noticed by its digest.
    """
    adapter = _adapter_folder(adapter)
    base = read_adapter(adapter).record["base"]
    if base.get("name") is None:
        raise ValueError(f"adapter {adapter} does not say which model it was trained on")
    if base.get("checkpoint") is not None and checkpoint is None:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']} from {base['checkpoint']}; say where "
            "that file is with --checkpoint"
        )
    if base.get("checkpoint") is None and checkpoint is not None:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']} with random weights, so checkpoint "
            f"{checkpoint} is not its base"
        )
    if checkpoint is None and base.get("seed") is None:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']} with random weights of no known "
            "seed, which cannot be drawn again"
        )
    sam = build_sam(
        base["name"],
        checkpoint=checkpoint,
        image_size=base["image_size"],
        random_init=checkpoint is None,
        seed=base.get("seed"),
    )
    samfast.load_adapter(sam, adapter, base_dtype=base_dtype).eval()
    return samfast.fuse(sam) if fuse else sam


def _adapter_folder(given: Path) -> Path:
    inside = given / "best"
    return inside if not (given / "adapter_config.json").exists() and inside.is_dir() else given


class _Photographs(Dataset):
    def __init__(self, paths: Sequence[Path], side: int):
        self.paths = paths
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.paths[index])
        resized = resize_image(image, self.side)
        # No truth: only the sizes of these two count.
        return Sample(resized, np.zeros(resized.shape[:2], bool), np.zeros(image.shape[:2], bool))


def _output_names(paths: Sequence[Path]) -> list[str]:
    """Stems; where two images share one, their whole names."""
    stems = [path.stem for path in paths]
    names = [p.name if stems.count(p.stem) > 1 else p.stem for p in paths]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two of the images are called {name}; predict them separately")
    return names


def _write(folder: Path, name: str, path: Path, mask: np.ndarray) -> dict:
    mask_path, overlay_path = folder / f"{name}_mask.png", folder / f"{name}_overlay.png"
    overlay = tinted(read_image(path), mask, PREDICTION_COLOUR)
    write_whole(mask_path, png_bytes(mask.astype(np.uint8) * 255))
    write_whole(overlay_path, png_bytes(overlay))
    return {
        "image": str(path),
        "mask": str(mask_path),
        "overlay": str(overlay_path),
        "foreground": float(mask.mean()),
    }
