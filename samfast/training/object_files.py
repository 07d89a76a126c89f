# SPDX-License-Identifier: Apache-2.0
"""The files of predicted objects: a label image, and a picture of it."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from samfast.files.placing import write_whole
from samfast.training.object_numbers import kept_objects
from samfast.training.pictures import objects_over, png_bytes

LARGEST = 4096  # longest side of a picture


def parts(mask: np.ndarray, min_size: int = 0) -> np.ndarray:
    """The connected parts of a mask, bool (H, W), numbered from 1 on: int32 (H, W)."""
    from scipy import ndimage

    return kept_objects(ndimage.label(mask)[0], min_size)


def label_tiff(labels: np.ndarray) -> bytes:
    """A TIFF of one page with the numbers, of 16 bits, of 32 from 65,536 objects on."""
    wide = labels.max(initial=0) > 65535
    buffer = io.BytesIO()
    image = Image.fromarray(labels.astype(np.int32 if wide else np.uint16))
    image.save(buffer, format="TIFF", compression="tiff_adobe_deflate")
    return buffer.getvalue()


def write_objects(
    folder: Path, name: str, path: Path, image: np.ndarray, labels: np.ndarray
) -> dict:
    """NAME_labels.tif and NAME_overlay.png; the picture is at most LARGEST pixels wide and high.

    image: uint8 (H, W, 3)   labels: int32 (H, W), from 1 on, 0 for no object
    """
    labels_path, overlay_path = folder / f"{name}_labels.tif", folder / f"{name}_overlay.png"
    write_whole(labels_path, label_tiff(labels), durable=False)
    step = -(-max(labels.shape) // LARGEST)
    overlay = objects_over(image[::step, ::step], labels[::step, ::step])
    write_whole(overlay_path, png_bytes(overlay), durable=False)
    return {
        "image": str(path),
        "labels": str(labels_path),
        "overlay": str(overlay_path),
        "objects": int(labels.max(initial=0)),
    }
