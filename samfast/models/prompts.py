# SPDX-License-Identifier: Apache-2.0
"""Check boxes and points for ``segment``, and pad boxes to equally many per image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

Points = tuple[Tensor, Tensor]
Boxes = Tensor | Sequence[Tensor]


def check_prompts(images: Tensor, boxes: Boxes | None, points: Points | None) -> int:
    """Check the prompts of [B, ...] images; return N, the number of objects per image.

    For a list of boxes, N is the largest. Raises ValueError, or TypeError for a dtype or type.
    """
    batch, counts = len(images), {}
    if isinstance(boxes, (list, tuple)):
        if points is not None:
            raise ValueError(
                "expected no points, because boxes are a list of tensors; with points, pass boxes "
                f"as one tensor ({batch}, N, 4)"
            )
        if len(boxes) != batch:
            raise ValueError(f"boxes are a list of {len(boxes)} tensors for {batch} images")
        for i, own in enumerate(boxes):
            if not isinstance(own, Tensor):
                raise TypeError(f"boxes of image {i} are a {type(own).__name__}, not a tensor")
            if own.dim() != 2 or own.shape[1] != 4:
                raise ValueError(f"boxes of image {i} have shape {tuple(own.shape)}, not (N, 4)")
            _check_boxes(own, images.device, f"boxes of image {i}")
        counts["boxes"] = max((len(own) for own in boxes), default=1)
    elif boxes is not None:
        if not isinstance(boxes, Tensor):
            raise TypeError(f"boxes are a {type(boxes).__name__}, not a tensor or a list of them")
        shape = tuple(boxes.shape)
        if len(shape) not in (2, 3) or shape[0] != batch or shape[-1] != 4:
            raise ValueError(f"boxes have shape {shape}, not ({batch}, 4) or ({batch}, N, 4)")
        _check_boxes(boxes, images.device, "boxes")
        counts["boxes"] = shape[1] if len(shape) == 3 else 1
    if points is not None:
        counts["points"] = _check_points(points, batch, images.device)
    if len(set(counts.values())) == 2:
        raise ValueError(
            f"boxes are of {counts['boxes']} objects per image, points of {counts['points']}"
        )
    return next(iter(counts.values()), 1)


def padded_boxes(boxes: Boxes | None, count: int) -> tuple[Tensor | None, list[int] | None]:
    """Stack boxes to [B, count, 4], padded with zeros; also return each image's number.

    The second value is None if the boxes were one tensor already.
    """
    if boxes is None or isinstance(boxes, Tensor):
        return boxes, None
    if not boxes:
        return None, []
    dtype = boxes[0].dtype
    for own in boxes[1:]:
        dtype = torch.promote_types(dtype, own.dtype)
    padded = boxes[0].new_zeros((len(boxes), count, 4), dtype=dtype)
    for row, own in zip(padded, boxes, strict=True):
        row[: len(own)] = own
    return padded, [len(own) for own in boxes]


def _check_points(points: Points, batch: int, device: torch.device) -> int:
    """Check the points; return the number of objects per image."""
    if not isinstance(points, (tuple, list)) or len(points) != 2:
        raise TypeError("points are not a pair (coordinates, labels)")
    for name, values in zip(("coordinates", "labels"), points, strict=True):
        if not isinstance(values, Tensor):
            raise TypeError(
                f"point {name} are a {type(values).__name__}, not a tensor; stack them, and pad "
                "with the label -1"
            )
    coords, labels = points
    shape = tuple(coords.shape)
    if len(shape) not in (3, 4) or shape[0] != batch or shape[-1] != 2:
        raise ValueError(
            f"point coordinates have shape {shape}, not ({batch}, P, 2) or ({batch}, N, P, 2)"
        )
    if tuple(labels.shape) != shape[:-1]:
        raise ValueError(
            f"point labels have shape {tuple(labels.shape)}, but the coordinates {shape}"
        )
    _check_prompt("point coordinates", coords, device)
    _check_prompt("point labels", labels, device)
    if _readable(labels):
        odd = labels[(labels != 0) & (labels.abs() != 1)]
        if len(odd):
            raise ValueError(f"point label {odd[0].item()} is not 1, 0 or -1")
        if _readable(coords):  # coordinates of padding are not checked
            wrong = ~coords.isfinite().all(-1) & (labels != -1)
            if wrong.any():
                place = tuple(wrong.nonzero()[0].tolist())
                raise ValueError(
                    f"point {place} has coordinates {_numbers(coords[place])}; they must be finite"
                )
    return shape[1] if len(shape) == 4 else 1


def _check_boxes(boxes: Tensor, device: torch.device, name: str) -> None:
    """boxes [..., 4]"""
    _check_prompt(name, boxes, device)
    if not _readable(boxes):
        return
    ordered = (boxes[..., :2] <= boxes[..., 2:]).all(-1) & boxes.isfinite().all(-1)
    if not ordered.all():
        place = tuple((~ordered).nonzero()[0].tolist())
        raise ValueError(
            f"{name} have {_numbers(boxes[place])} in row {place}; a box must be finite numbers "
            "x0, y0, x1, y1 with x0 <= x1 and y0 <= y1"
        )


def _check_prompt(name: str, values: Tensor, device: torch.device) -> None:
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} are {values.dtype}, not real numbers")
    if values.device != device:
        raise ValueError(f"{name} are on {values.device}, the images on {device}")


def _readable(values: Tensor) -> bool:
    """True if reading its numbers neither waits for a device nor breaks a graph."""
    if torch.compiler.is_compiling() or values.device.type != "cpu":
        return False
    return not (is_fake(values) or torch._C._functorch.is_functorch_wrapped_tensor(values))


def _numbers(values: Tensor) -> str:
    return "(" + ", ".join(f"{number:g}" for number in values.tolist()) + ")"
