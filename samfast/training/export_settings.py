# SPDX-License-Identifier: Apache-2.0
"""The settings of ``samfast export``. Importing this does not load torch."""

from dataclasses import dataclass
from pathlib import Path

from samfast.adapters.options import option
from samfast.training.shared_options import ADAPTER, CHECKPOINT, NOT_RANDOM

OLDEST, NEWEST = 18, 23  # of the opsets that torch.onnx writes


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write a fine-tuned model as ONNX files for other runtimes.

    Writes encoder.onnx and decoder.onnx, of several tasks a decoder for each, and compares them in
    onnxruntime with torch. Takes every method. Needs pip install "samfast[export]".
    """

    adapter: Path = option(..., ADAPTER)
    output: Path = option(..., "New folder for the files")
    checkpoint: Path | None = option(None, CHECKPOINT, hint=NOT_RANDOM)
    task: str | None = option(
        None, "Task whose decoder is written", metavar="NAME", hint="every task"
    )
    opset: int = option(18, f"Version of ONNX's operators in the files, {OLDEST} to {NEWEST}")
    json: bool = option(False, "Print what was written as JSON on stdout")
