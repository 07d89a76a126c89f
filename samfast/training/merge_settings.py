# SPDX-License-Identifier: Apache-2.0
"""The settings of ``samfast merge``. Importing this does not load torch."""

from dataclasses import dataclass
from pathlib import Path

from samfast.adapters.options import option
from samfast.training.settings import ADAPTER, CHECKPOINT, NOT_RANDOM


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Write a fine-tuned model as a plain SAM that other tools open.

    Adds the update to the weights, so that no adapter is left: LoRA, SAM-COBOT on LoRA, TA-LoRA,
    Kronecker and decoders. Conv-LoRA and AdaptFormer depend on their input and cannot be merged.
    """

    adapter: Path = option(..., ADAPTER)
    output: Path = option(
        ...,
        "New file for segment_anything (.pth, .safetensors), or, without a suffix, new folder for "
        "Hugging Face's SamModel",
    )
    checkpoint: Path | None = option(None, CHECKPOINT, hint=NOT_RANDOM)
    task: str | None = option(
        None,
        "Task whose decoder is written",
        metavar="NAME",
        hint="required with several tasks",
    )
    class_index: int | None = option(
        None,
        "Class whose mask is written, counted from 0",
        least=0,
        hint="required for classes",
    )
    license: str | None = option(
        None,
        "License in the folder's model card (README.md), as the Hugging Face Hub calls it",
        hint="default: that of the adapter's card",
    )
    json: bool = option(False, "Print what was written as JSON on stdout")
