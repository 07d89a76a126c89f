# SPDX-License-Identifier: Apache-2.0
"""``samfast export``: a fine-tuned model as ONNX files, which are compared with it."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import samfast
from samfast.adapters.adapter import adapters
from samfast.export import onnx_check, onnx_files
from samfast.export.form import export_form
from samfast.files.format import read_adapter
from samfast.files.placing import refuse_existing
from samfast.files.temporary import temporary_folder
from samfast.models import MultiTaskSam, encode, image_size
from samfast.models.sam3_folder import NAME as SAM3
from samfast.training.adapted import adapter_folder, base_of
from samfast.training.export_settings import NEWEST, OLDEST, ExportSettings
from samfast.training.remembered import remembered


@torch.no_grad()
def export(settings: ExportSettings) -> dict[str, Any]:
    """Write an adapter's model as ONNX files; returns what was written.

    Everything that can be is checked before anything is computed. The folder appears once all of
    its files agree with torch, and nothing is replaced.
    """
    if (missing := onnx_files.missing_packages()) is not None:
        raise ImportError(missing)
    if not OLDEST <= settings.opset <= NEWEST:
        raise ValueError(f"expected --opset {OLDEST} to {NEWEST}, got {settings.opset}")
    output = settings.output
    if output.suffix:
        raise ValueError(f"expected --output to be a folder without a suffix, got {output}")
    refuse_existing(output, folder=True)
    folder = adapter_folder(settings.adapter)
    adapter = read_adapter(folder)
    name = adapter.record["base"].get("name")
    if name == SAM3:
        raise ValueError(
            f"adapter {folder} was trained on SAM 3, which samfast does not write as ONNX; samfast "
            "merge writes it for transformers, which other exporters take"
        )
    tasks = [spec.name for spec in remembered(adapter, settings.task).specs]
    model = samfast.load_adapter(base_of(folder, settings.checkpoint), folder).eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(output) as place:
        difference = _write(model, tasks, place, settings.opset)
        files = sorted(path.name for path in place.iterdir())
        os.replace(place, output)
    return {
        "output": str(output),
        "model": name,
        "image_size": image_size(model),
        "opset": settings.opset,
        "tasks": tasks,
        "files": files,
        "difference": difference,
    }


def _write(model: nn.Module, tasks: list[str], place: Path, opset: int) -> float:
    """Write the files and compare them with the model; the largest difference."""
    generator = torch.Generator().manual_seed(0)
    side = image_size(model)
    images = 255 * torch.rand(2, 3, side, side, generator=generator)
    if not tasks:
        return _write_prompted(model, images, place, opset)
    apart = any(getattr(layer, "depends_on_task", False) for layer in adapters(model).values())
    form = None if apart else export_form(model)
    difference = 0.0
    for number, task in enumerate(tasks):
        if apart:
            form = export_form(model, task=task)
        embeddings = _embeddings_of(model, images, task)
        if apart or number == 0:
            path = place / (f"encoder_{task}.onnx" if apart else "encoder.onnx")
            onnx_files.write_encoder(form, path, opset)
            difference = max(difference, onnx_check.check_encoder(path, images, embeddings))
        path = place / f"decoder_{task}.onnx"
        onnx_files.write_task_decoder(form, task, path, opset)
        difference = max(difference, onnx_check.check_task_decoder(path, model, task, embeddings))
    return difference


def _write_prompted(model: nn.Module, images: torch.Tensor, place: Path, opset: int) -> float:
    form = export_form(model)
    embeddings = _embeddings_of(model, images, None)
    path = place / "encoder.onnx"
    onnx_files.write_encoder(form, path, opset)
    difference = onnx_check.check_encoder(path, images, embeddings)
    path = place / "decoder.onnx"
    onnx_files.write_prompt_decoder(form, path, opset)
    return max(difference, onnx_check.check_prompt_decoder(path, model, embeddings))


def _embeddings_of(model: nn.Module, images: torch.Tensor, task: str | None) -> torch.Tensor:
    """As samfast computes them, for a task where there are several."""
    if task is None:
        return encode(model, images)
    sam = cast("MultiTaskSam", model)
    index = sam.index_of(task)
    return sam.encode_for(images, {index: None})[index]
