# SPDX-License-Identifier: Apache-2.0
"""The settings of ``samfast merge``. Importing this does not load torch."""

from dataclasses import dataclass
from pathlib import Path

from samfast.adapters.options import option
from samfast.training.shared_options import ADAPTER, CHECKPOINT, NOT_RANDOM


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Write a fine-tuned model as a plain SAM that other tools can open.

    This adds the updates to the weights. It works for LoRA, SAM-COBOT on LoRA, TA-LoRA, Kronecker
    and decoders. Conv-LoRA and AdaptFormer depend on their input, so they cannot be merged.
    """

    adapter: Path = option(..., ADAPTER)
    output: Path = option(
        ...,
        "Write a new file for segment_anything (.pth, .safetensors) or, without a suffix, a new "
        "folder for Hugging Face's SamModel",
    )
    checkpoint: Path | None = option(None, CHECKPOINT, hint=NOT_RANDOM)
    task: str | None = option(
        None,
        "Write this task's decoder",
        metavar="NAME",
        hint="required with several tasks",
    )
    class_index: int | None = option(
        None,
        "Write this class, counted from 0: its mask is where its score is above 0",
        least=0,
        hint="required for classes",
    )
    license: str | None = option(
        None,
        "License in the folder's model card (README.md), as the Hugging Face Hub calls it",
        hint="default: that of the adapter's card",
    )
    json: bool = option(False, "Print what was written as JSON to stdout")
