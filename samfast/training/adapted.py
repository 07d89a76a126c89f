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
    """Load the SAM that an adapter was trained on, with the adapter, in eval mode.

    adapter: the folder of a run, or of an adapter such as runs/NAME/adapter/best
    checkpoint: the SAM weights that it was trained on (checked by their digest); None if they were
        random: they are drawn again from the recorded seed
    base_dtype: dtype of the frozen weights; None keeps float32
    fuse: run the fused encoder, as ``finetune`` does by default
    device: device of the model

    The model works with segment_anything's SamPredictor and SamAutomaticMaskGenerator, and with
    ``samfast.models.segment``. finetune trains mask token 0, so pass ``multimask_output=False``. An
    adapter with several tasks returns a ``MultiTaskSam``; one on SAM 3 returns Hugging Face's
    Sam3TrackerModel.

        predictor = SamPredictor(samfast.load_adapted("runs/cells", "sam_vit_b_01ec64.pth"))

    Raises ValueError or FileNotFoundError if the folder has no adapter or does not record its base,
    or if the checkpoint is missing or is not the right one.
    """
    folder = adapter_folder(Path(adapter))
    sam = samfast.load_adapter(base_of(folder, checkpoint), folder, base_dtype=base_dtype).eval()
    return (samfast.fuse(sam) if fuse else sam).to(device)


def base_of(adapter: Path, checkpoint: str | os.PathLike | None = None) -> nn.Module:
    """Load the SAM that an adapter was trained on, without the adapter; see ``load_adapted``."""
    base = read_adapter(adapter).record["base"]
    if base.get("name") is None:
        raise ValueError(f"adapter {adapter} does not say which model it was trained on")
    if base.get("checkpoint") is not None and checkpoint is None:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']} from {base['checkpoint']}; pass "
            "that file with --checkpoint"
        )
    if base.get("checkpoint") is None and checkpoint is not None:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']} with random weights, so checkpoint "
            f"{checkpoint} is not its base"
        )
    if checkpoint is None and base.get("seed") is None:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']} with random weights of an unknown "
            "seed, so they cannot be drawn again"
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
    """Return the folder of the adapter; for a run's folder, that of its best adapter."""
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
