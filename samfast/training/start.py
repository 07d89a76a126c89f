# SPDX-License-Identifier: Apache-2.0
"""From settings to a model that can be trained: checks, base model, method, precision."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn

import samfast
from samfast import backends, functional
from samfast.models import build_sam, image_size, segment
from samfast.models.architectures import architecture
from samfast.training.data import padded_images, valid_region
from samfast.training.settings import (
    METHODS,
    PRECISIONS,
    SCHEDULES,
    FinetuneSettings,
    PredictSettings,
)

# The mask decoder without what a single mask never uses: the quality head and the other masks.
TRAINED_DECODER = (
    "mask_decoder.transformer",
    "mask_decoder.iou_token",
    "mask_decoder.mask_tokens",
    "mask_decoder.output_upscaling",
    "mask_decoder.output_hypernetworks_mlps.0",
)


class PromptFree(nn.Module):
    """Binary segmentation without prompts: padded images in, one map of logits out.

    images (B, 3, S, S) uint8, sizes int64 (B, 2) -> logits float32 (B, S, S), valid bool
    (B, S, S). Runs under autocast of ``dtype`` unless that is float32.
    """

    def __init__(self, sam: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.sam = sam
        self.dtype = dtype

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        valid = valid_region(sizes, image_size(self.sam))
        images = padded_images(images, valid, self.sam.pixel_mean)
        lower = self.dtype != torch.float32
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=lower):
            logits = segment(self.sam, images)
        return logits[:, 0].float(), valid


def _check_known(settings: FinetuneSettings | PredictSettings, **known: tuple[str, ...]) -> None:
    for name, names in known.items():
        value = getattr(settings, name)
        if value not in names:
            raise ValueError(f"unknown {name} {value!r}; known are {', '.join(names)}")


def _check_smallest(settings: FinetuneSettings | PredictSettings, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (value >= least and isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_prediction(settings: PredictSettings) -> None:
    """``check_settings`` for prediction."""
    _check_known(settings, precision=PRECISIONS, backend=backends.NAMES)
    _check_smallest(settings, 1, "batch_size", "threads")


def check_settings(settings: FinetuneSettings) -> None:
    """Raise ValueError for an option that no data or model can make right."""
    architecture(settings.model)
    _check_known(
        settings,
        method=METHODS,
        precision=PRECISIONS,
        schedule=SCHEDULES,
        backend=backends.NAMES,
    )
    _check_smallest(settings, 1, "epochs", "repeats", "batch_size", "accumulate", "threads")
    _check_smallest(settings, 0, "workers", "overlays", "weight_decay", "clip", "seed")
    if settings.lr is not None and not (settings.lr > 0 and isfinite(settings.lr)):
        raise ValueError(f"lr is {settings.lr}; it must be above 0")
    if not 0.0 < settings.val_fraction < 1.0:
        raise ValueError(f"val_fraction is {settings.val_fraction}; it must lie between 0 and 1")


def build_base(settings: FinetuneSettings) -> nn.Module:
    """The SAM the settings name, on the CPU."""
    return build_sam(
        settings.model,
        checkpoint=settings.checkpoint,
        image_size=settings.image_size,
        random_init=settings.random_init,
        seed=settings.seed,
    )


def attach_method(
    sam: nn.Module, settings: FinetuneSettings, base_dtype: torch.dtype | None = None
) -> nn.Module:
    """Freeze the model, add the settings' adapters, leave the mask decoder to be trained."""
    if settings.method == "decoder":
        method = samfast.DecoderOnly()
    else:
        method = samfast.Lora(
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            target=settings.target[0] if len(settings.target) == 1 else settings.target,
            slices=settings.slices,
        )
    return samfast.attach(sam, method, train=TRAINED_DECODER, base_dtype=base_dtype)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What ``auto``, ``bf16``, ``fp16`` or ``fp32`` means on this device."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
    gpu = device.type == "cuda"
    if precision == "auto" and gpu:
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "fp16" and not gpu:
        raise ValueError(f"precision fp16 needs a CUDA device, but this one is {device.type}")
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return names.get(precision, torch.float32)


def base_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The frozen encoder's dtype: bfloat16 where a GPU computes in it, else as it was stored."""
    return torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else None


@contextmanager
def backend_asked_for(backend: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Every operation inside runs on ``backend``; ValueError at once when it cannot.

    It is tried on a tiny adapter, so that it fails before the data is read.
    """
    backend = backends.requested(backend)  # SAMFAST_BACKEND in place of auto
    if backend == "auto":
        yield
        return
    x, a, b = (torch.zeros(shape, device=device) for shape in ((1, 16), (4, 16), (16, 4)))
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            functional.lora_linear(x, b @ a, None, a, b, 1.0, backend=backend)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    before = os.environ.get("SAMFAST_BACKEND")
    os.environ["SAMFAST_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["SAMFAST_BACKEND"]
        else:
            os.environ["SAMFAST_BACKEND"] = before


def output_folder(settings: FinetuneSettings) -> Path:
    """Where the results go; ValueError when something is there already."""
    name = f"{settings.data.resolve().name}-{settings.model}-{settings.method}"
    output = settings.output if settings.output is not None else Path("runs") / name
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file, not a folder")
    if output.is_dir() and any(output.iterdir()) and not settings.overwrite:
        raise ValueError(
            f"output folder {output} is not empty; choose another --output, or --overwrite to "
            "replace an earlier run's results"
        )
    return output
