# SPDX-License-Identifier: Apache-2.0
"""Compare ONNX files in onnxruntime with torch: embeddings and masks, for any batch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from samfast.export.onnx_files import prompt_inputs
from samfast.models import decode
from samfast.models.segment import upscale

# A share of torch's largest value, or of 1 if that is more: thousands of float32 roundings.
ALLOWED = 1e-3


def session_of(path: Path) -> Any:
    """Open the file in onnxruntime, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run_session(session: Any, given: Mapping[str, Tensor]) -> list[Tensor]:
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    return [torch.from_numpy(array) for array in session.run(None, arrays)]


def check_encoder(path: Path, images: Tensor, embeddings: Tensor) -> float:
    """Return the largest difference from torch's embeddings, for a batch and for one image."""
    session = session_of(path)
    return max(
        agreement(path, run_session(session, {"images": some})[0], own)
        for some, own in ((images, embeddings), (images[:1], embeddings[:1]))
    )


def check_task_decoder(path: Path, model: Any, task: str, embeddings: Tensor) -> float:
    session, side = session_of(path), model.image_encoder.img_size
    differences = []
    for some in (embeddings, embeddings[:1]):
        expected = model.decode_task(some, task, (side, side))
        (got,) = run_session(session, {"image_embeddings": some})
        differences.append(agreement(path, got, expected))
    return max(differences)


def check_prompt_decoder(path: Path, model: Any, embeddings: Tensor) -> float:
    """Compare masks without a prompt, with points and boxes, and for a photo that is not square."""
    session, side = session_of(path), model.image_encoder.img_size
    photo = (side // 2 + 5, side + 3)
    kept = round(photo[0] * side / photo[1])
    differences = []
    for some in (embeddings, embeddings[:1]):
        for prompt, points, labels in _prompts(side, len(some)):
            tokens = (some, points, labels)
            expected = decode(model, some, (side, side), **prompt)
            masks, _, low_res = run_session(session, prompt_inputs(side, *tokens))
            smaller = run_session(session, prompt_inputs(side, *tokens, photo))[0]
            resized = F.interpolate(expected[:, :, :kept], photo, mode="bilinear")
            low_res = upscale(low_res[:, 0], (side, side), side)[:, None]
            pairs = (masks, expected), (low_res, expected), (smaller, resized)
            differences += [agreement(path, *pair) for pair in pairs]
    return max(differences)


def _prompts(side: int, batch: int) -> list[tuple[dict, Tensor, Tensor]]:
    """Return prompts for ``decode``, and their coordinates and labels for the file."""
    generator = torch.Generator().manual_seed(batch)
    coords = side * torch.rand(batch, 2, 2, generator=generator)
    boxes = torch.cat([coords.amin(1), coords.amax(1)], 1)
    padded = torch.cat([coords, torch.zeros(batch, 1, 2)], 1)
    points, corners = (
        torch.tensor([labels]).repeat(batch, 1) for labels in ([1.0, 0.0, -1.0], [2.0, 3.0])
    )
    return [
        ({}, coords[:, :0], points[:, :0]),
        ({"points": (coords[:, None], points[:, None, :2])}, padded, points),
        ({"boxes": boxes[:, None]}, boxes.view(batch, 2, 2), corners),
    ]


def agreement(path: Path, got: Tensor, expected: Tensor) -> float:
    """Return the largest difference; raise ValueError if it is above ALLOWED."""
    if got.shape != expected.shape:
        raise ValueError(
            f"{path.name} gives shape {tuple(got.shape)} in onnxruntime, but torch gives "
            f"{tuple(expected.shape)}; nothing was written"
        )
    difference = float((got - expected).abs().max())
    allowed = ALLOWED * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise ValueError(
            f"{path.name} differs from torch by {difference:.3g} in onnxruntime, where at most "
            f"{allowed:.3g} was expected; nothing was written; try another version of onnxruntime"
        )
    return difference
