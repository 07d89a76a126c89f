# SPDX-License-Identifier: Apache-2.0
"""The model of a run: its base, built again, with the adapter that the run saved."""

import os
from pathlib import Path

import torch
from torch import nn

import samfast
from samfast.files.format import CONFIG, read_adapter
from samfast.models import build_sam
from samfast.models.architectures import ARCHITECTURES
from samfast.training.run_folder import SETTINGS


def load_adapted(
    adapter: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    base_dtype: torch.dtype | None = None,
    fuse: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The SAM that an adapter was trained on, with the adapter, in eval mode.

    adapter: a run's folder, or an adapter's such as runs/NAME/adapter/best
    checkpoint: the SAM weights that it was trained on, of which a digest is compared; None where
        they were random, which are drawn again from the recorded seed
    base_dtype: what the frozen weights are cast to; None keeps float32
    fuse: whether the encoder runs fused, as ``finetune`` trains it unless told otherwise
    device: where the model is put

    segment_anything's SamPredictor and SamAutomaticMaskGenerator take the model as it is, as
    ``samfast.models.segment`` does. finetune trains mask token 0: ask for it with
    ``multimask_output=False``. An adapter of several tasks gives a ``MultiTaskSam``, one on SAM 3
    Hugging Face's Sam3TrackerModel.

        predictor = SamPredictor(samfast.load_adapted("runs/cells", "sam_vit_b_01ec64.pth"))

    Raises ValueError or FileNotFoundError with one sentence for a folder without an adapter, one
    that does not record its base, and a checkpoint that is missing or another.
    """
    folder = adapter_folder(Path(adapter))
    sam = samfast.load_adapter(base_of(folder, checkpoint), folder, base_dtype=base_dtype).eval()
    return (samfast.fuse(sam) if fuse else sam).to(device)


def base_of(adapter: Path, checkpoint: str | os.PathLike | None = None) -> nn.Module:
    """The SAM that an adapter was trained on, without the adapter; see ``load_adapted``."""
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
    if base["name"] not in ARCHITECTURES:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']}; known are {', '.join(ARCHITECTURES)}"
        )
    return build_sam(
        base["name"],
        checkpoint=checkpoint,
        image_size=base.get("image_size"),
        random_init=checkpoint is None,
        seed=base.get("seed"),
    )


def adapter_folder(given: Path) -> Path:
    """The adapter's folder itself, or the best adapter's of a run's folder."""
    if (given / CONFIG).exists():
        return given
    for inside in (given / "best", given / "adapter" / "best"):
        if inside.is_dir():
            return inside
    if (given / "adapter" / "last").is_dir():
        raise FileNotFoundError(
            f"run folder {given} has no adapter/best; name {given}/adapter/last"
        )
    if (given / SETTINGS).is_file():
        raise FileNotFoundError(f"run folder {given} has no adapter yet: nothing was saved")
    return given
