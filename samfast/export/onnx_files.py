# SPDX-License-Identifier: Apache-2.0
"""Write ONNX files of a SAM's halves, which pass onnx's checker."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samfast.export.parts import ImageEncoder, PromptDecoder, TaskDecoder
from samfast.integrations.torchvision import installed

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ENCODER_INPUTS, ENCODER_OUTPUTS = ("images",), ("image_embeddings",)
PROMPT_INPUTS = (
    "image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input",
    "orig_im_size",
)  # fmt: skip
PROMPT_OUTPUTS = ("masks", "iou_predictions", "low_res_masks")


def missing_packages() -> str | None:
    """Say which packages for ONNX are missing and how to get them; None if none is."""
    absent = [name for name in PACKAGES if not installed(name)]
    if not absent:
        return None
    return (
        f"ONNX export needs {', '.join(PACKAGES)}, but {' and '.join(absent)} "
        f'{"is" if len(absent) == 1 else "are"} not installed: pip install "samfast[export]"'
    )


def write_encoder(form: Any, path: Path, opset: int) -> None:
    """form: an export form of a Sam or MultiTaskSam"""
    part = ImageEncoder(form)
    side = form.image_encoder.img_size
    batch = torch.export.Dim("batch")
    images = torch.zeros(2, 3, side, side)
    _write(part, (images,), ({0: batch},), ENCODER_INPUTS, ENCODER_OUTPUTS, path, opset)


def write_prompt_decoder(form: Any, path: Path, opset: int) -> None:
    part = PromptDecoder(form)
    batch, points = torch.export.Dim("batch"), torch.export.Dim("num_points")
    prompted = {0: batch, 1: points}
    shapes = ({0: batch}, prompted, prompted, {0: batch}, None, None)
    embeddings = torch.zeros(2, part.positions.shape[1], part.cells, part.cells)
    given = prompt_inputs(part.side, embeddings, torch.zeros(2, 3, 2), torch.ones(2, 3))
    example = tuple(given[name] for name in PROMPT_INPUTS)
    _write(part, example, shapes, PROMPT_INPUTS, PROMPT_OUTPUTS, path, opset)


def write_task_decoder(form: Any, task: str, path: Path, opset: int) -> None:
    part = TaskDecoder(form, task)
    embeddings = torch.zeros(2, part.dense.shape[1], part.cells, part.cells)
    shapes = ({0: torch.export.Dim("batch")},)
    _write(part, (embeddings,), shapes, ENCODER_OUTPUTS, ("logits",), path, opset)


def prompt_inputs(
    side: int,
    embeddings: Tensor,
    coords: Tensor,
    labels: Tensor,
    size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Return inputs of a decoder with prompts, without a mask. size: of the photo (default: S x S)

    embeddings: [batch, 256, n, n]   coords: [batch, points, 2]   labels: [batch, points]
    """
    cells = embeddings.shape[-1]
    size = (side, side) if size is None else size
    values = (
        embeddings, coords, labels, embeddings.new_zeros(len(embeddings), 1, 4 * cells, 4 * cells),
        torch.zeros(1), torch.tensor(size, dtype=torch.float32),
    )  # fmt: skip
    return dict(zip(PROMPT_INPUTS, values, strict=True))


def _write(
    part: nn.Module,
    example: tuple[Tensor, ...],
    shapes: tuple,
    inputs: Sequence[str],
    outputs: Sequence[str],
    path: Path,
    opset: int,
) -> None:
    import onnx

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own code and of axes that share a name
        program: Any = torch.onnx.export(
            part.eval(), example, dynamo=True, opset_version=opset, input_names=list(inputs),
            output_names=list(outputs), dynamic_shapes=shapes, verbose=False,
        )  # fmt: skip
    program.save(path)
    onnx.checker.check_model(str(path), full_check=True)
    found = {
        own.domain: own.version for own in onnx.load(path, load_external_data=False).opset_import
    }
    if found != {"": opset}:
        raise ValueError(
            f"expected opset {opset} in {path.name}, got {found}: torch {torch.__version__} does "
            "not convert this model to it; take --opset 18"
        )
