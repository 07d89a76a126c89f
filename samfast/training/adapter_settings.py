# SPDX-License-Identifier: Apache-2.0
"""The settings of prediction and evaluation by a trained adapter, which are the command line's.

Importing this does not load torch, so ``--help`` is quick.
"""

from dataclasses import dataclass
from pathlib import Path

from samfast.adapters.options import option
from samfast.training.shared_options import (
    ADAPTER,
    BACKEND,
    BACKENDS,
    CHECKPOINT,
    CHUNK,
    FUSE,
    NOT_RANDOM,
    PRECISION,
    PRECISIONS,
    THREADS,
)


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Segment images with a fine-tuned adapter; write a mask and an overlay for each.

    Masks hold 0 and 255. An adapter with several tasks writes a file for each task: 0 and 255
    (binary), the class of each pixel (semantic), or values (regression) as a float32 TIFF, with
    several channels as a .npy file. An adapter of prompted objects writes NAME_labels.tif, which
    numbers objects from 1 in the order of their prompts.
    """

    images: tuple[Path, ...] = option(
        ...,
        "Image files, or folders of them",
        positional=True,
        metavar="IMAGE ...",
        hint="required",
    )
    adapter: Path = option(..., ADAPTER)
    output: Path = option(
        Path("predictions"),
        "Write NAME_mask.png and NAME_overlay.png to this folder, replacing existing files. With "
        "several tasks: NAME_TASK.png and NAME_TASK_overlay.png",
    )
    stacks: bool = option(
        False,
        "Treat each page of a TIFF and each slice of a .npy array as an image. Write masks and "
        "labels of a stack to one TIFF with a page per slice. Tables and pictures get one file "
        "per slice, such as NAME.tif[0]_overlay.png. Objects are not linked across slices",
    )
    task: str | None = option(None, "Predict only this task", metavar="NAME", hint="default: all")
    checkpoint: Path | None = option(None, CHECKPOINT, hint=NOT_RANDOM)
    bands: str | None = option(
        None,
        "Bands of the image files to use, such as 4,3,2 or 1",
        metavar="N | R,G,B",
        hint="default: as in training",
    )
    range: str | None = option(
        None,
        "Values that become black and white in images with more than 8 bits",
        metavar="{auto,full} | LOW,HIGH",
        hint="default: as in training",
    )
    box: tuple[str, ...] = option(
        (),
        "Prompt with this box, in image pixels; for adapters trained with boxes. Give one for all "
        "images, or one per image in their order. An adapter of prompted objects takes one per "
        "object of a single image",
        metavar="X0,Y0,X1,Y1",
        repeatable=True,
        hint="repeatable",
    )
    point: tuple[str, ...] = option(
        (),
        "Prompt with this point on the object, in image pixels; for adapters trained with points. "
        "Repeat it as --box",
        metavar="X,Y",
        repeatable=True,
        hint="repeatable",
    )
    boxes: Path | None = option(
        None,
        "Read boxes from a CSV or JSON file, one per object; for adapters of prompted objects. "
        "CSV lines: image,x0,y0,x1,y1. JSON: {image: [[x0, y0, x1, y1], ...]}",
        hint="default: none",
    )
    points: Path | None = option(
        None,
        "Read points from a CSV or JSON file: image,x,y[,label[,object]]. Label 1 is on the "
        "object, 0 is off it. Points with the same object number prompt one object",
        hint="default: none",
    )
    tile: int | None = option(
        None,
        "Predict larger images in tiles of this side, in image pixels; each tile is resized to "
        "the model's size. 0 predicts whole images",
        least=0,
        most=65535,
        hint="default: as in training",
    )
    overlap: int | None = option(
        None,
        "Minimum overlap of tiles in pixels; predictions are blended there",
        least=0,
        hint="default: as in training, or tile / 4",
    )
    instances: bool = option(
        False,
        "Number the objects: the connected parts of a mask. An adapter trained with --masks "
        "instances always numbers its objects",
    )
    automatic: bool = option(
        False,
        "Find and number objects with segment_anything's automatic mask generator; for adapters "
        "trained with points",
    )
    points_per_side: int | None = option(
        None,
        "Grid points along each side; only with --automatic",
        least=1,
        most=256,
        hint="default: 32",
    )
    pred_iou_thresh: float | None = option(
        None,
        "Keep masks with at least this predicted IoU; only with --automatic",
        hint="default: 0.88",
    )
    stability_score_thresh: float | None = option(
        None,
        "Keep masks with at least this stability score; only with --automatic",
        hint="default: 0.95",
    )
    formats: tuple[str, ...] = option(
        ("labels",),
        "Files to write for numbered objects: a label image (labels), a table of positions and "
        "areas (csv), outlines for QuPath and GIS (geojson), or one COCO file for all images "
        "(coco)",
        choices=("labels", "csv", "geojson", "coco"),
    )
    probabilities: bool = option(
        False,
        "Also write NAME_probability.tif, the sigmoid of the foreground logits in float32; the "
        "mask is above 0.5. For classes, write NAME_TASK_probability.tif, the softmax with a page "
        "per class. Probabilities are not calibrated",
    )
    min_size: int = option(0, "Leave out objects with fewer pixels", least=0)
    batch_size: int = option(4, "Images per forward pass", least=1)
    precision: str = option("auto", PRECISION, choices=PRECISIONS)
    decoder_chunk: int | None = option(
        None, f"{CHUNK} (without object prompts, one per image)", least=1, hint="default: all"
    )
    fuse: bool = option(True, FUSE)
    backend: str = option("auto", BACKEND, choices=BACKENDS)
    threads: int | None = option(None, THREADS, least=1, most=4096, hint="default: torch's choice")
    json: bool = option(False, "Print a summary as JSON to stdout")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Score a fine-tuned adapter on images with masks."""

    adapter: Path = option(..., ADAPTER)
    data: Path = option(
        ...,
        "Folder to score: images/ with masks/ (or the tasks' folders), or train/ and val/, of "
        "which only val/ is scored",
    )
    mask_suffix: str | None = option(
        None,
        "Suffix of mask names after the image's stem, such as _mask; as in finetune",
        metavar="TEXT",
        hint="default: same names as images",
    )
    stacks: bool = option(
        False,
        "Score each page of a TIFF and each slice of a .npy array as an image; as in finetune",
    )
    task: str | None = option(None, "Score only this task", metavar="NAME", hint="default: all")
    checkpoint: Path | None = option(None, CHECKPOINT, hint=NOT_RANDOM)
    automatic: bool = option(
        False,
        "Also score segment_anything's automatic mask generator, on whole images; for masks that "
        "number objects",
    )
    points_per_side: int | None = option(
        None,
        "Grid points along each side; only with --automatic",
        least=1,
        most=256,
        hint="default: 32",
    )
    pred_iou_thresh: float | None = option(
        None,
        "Keep masks with at least this predicted IoU; only with --automatic",
        hint="default: 0.88",
    )
    stability_score_thresh: float | None = option(
        None,
        "Keep masks with at least this stability score; only with --automatic",
        hint="default: 0.95",
    )
    tile: int | None = option(
        None,
        "Predict larger images in tiles of this side, in image pixels, and score the reassembled "
        "images. 0 predicts whole images",
        least=0,
        most=65535,
        hint="default: as in training",
    )
    overlap: int | None = option(
        None,
        "Minimum overlap of tiles in pixels; predictions are blended there",
        least=0,
        hint="default: as in training, or tile / 4",
    )
    output: Path | None = option(
        None,
        "Write an overlay of each image, scores.csv and (for classes) classes.csv to this folder",
        hint="default: write nothing",
    )
    batch_size: int = option(4, "Images per forward pass", least=1)
    precision: str = option("auto", PRECISION, choices=PRECISIONS)
    decoder_chunk: int | None = option(
        None, f"{CHUNK} (without object prompts, one per image)", least=1, hint="default: all"
    )
    fuse: bool = option(True, FUSE)
    backend: str = option("auto", BACKEND, choices=BACKENDS)
    threads: int | None = option(None, THREADS, least=1, most=4096, hint="default: torch's choice")
    json: bool = option(False, "Print the scores as JSON to stdout")
