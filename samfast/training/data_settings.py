# SPDX-License-Identifier: Apache-2.0
"""The settings of what is learned, a group of fine-tuning's options. Importing loads no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from samfast.adapters.options import option


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data: what to learn, and from which files."""

    data: Path | None = option(
        None,
        "Folder with images/ and masks/, or with train/ and val/ that each hold both",
        hint="required, except with --dry-run",
    )
    tasks: Path | None = option(
        None,
        "YAML file of tasks that share the encoder; each gets its own mask decoder. Keys of each "
        "entry under tasks: are name, kind (binary, semantic, regression), channels, folder, "
        "weight, loss, ignore, foreground, threshold, scale, offset, classes, derive and from. "
        "Not with --prompt, --loss, --foreground, --threshold or --ignore",
        hint="default: one binary mask per image",
    )
    masks: str | None = option(
        None,
        "Content of mask files: foreground and background (binary), the class of each pixel "
        "(classes), or the object number of each pixel, 0 for background (instances)",
        choices=("binary", "classes", "instances"),
        hint="default: binary, or classes with --classes",
    )
    classes: int | None = option(
        None,
        "Number of classes: mask values 0 to N - 1; 255 is ignored. Short for --tasks with one "
        "semantic task",
        least=2,
        most=65535,
        hint="default: none",
    )
    mask_suffix: str | None = option(
        None,
        "Suffix of mask names after the image's stem: with _mask, photo_mask.png belongs to "
        "photo.jpg. Masks are in masks/, or next to the images if there is no masks/. Write "
        "--mask-suffix=-mask if it starts with a dash",
        metavar="TEXT",
        hint="default: same names as images",
    )
    stacks: bool = option(
        False,
        "Treat each page of a TIFF and each slice of a .npy array (slices, height, width) as an "
        "image, named NAME.tif[0] and so on. Masks need as many slices. --val-fraction then "
        "splits whole stacks",
    )
    foreground: tuple[int | Literal["any"], ...] | None = option(
        None,
        "Mask values that are foreground; any: all values above 0, such as instance numbers",
        metavar="any | INT ...",
        hint="default: the only value above 0",
    )
    threshold: float | None = option(
        None,
        "Treat mask values above this as foreground; not with --foreground",
        hint="default: none",
    )
    ignore: tuple[float, ...] | None = option(
        None,
        "Mask values to ignore in loss, scores, boxes and points",
        metavar="VALUE ...",
        hint="default: none",
    )
    bands: str | None = option(
        None,
        "Bands of the image files to use, counted from 1: one as grey, or three as red, green, "
        "blue",
        metavar="N | R,G,B",
        hint="default: from the files' tags",
    )
    range: str = option(
        "auto",
        "Values that become black and white in images with more than 8 bits: each image's 1st and "
        "99th percentiles (auto), the number type's limits (full), or LOW,HIGH. Write "
        "--range=LOW,HIGH if LOW is negative",
        metavar="{auto,full} | LOW,HIGH",
    )
    tile: int | None = option(
        None,
        "Cut images into tiles of this side, in image pixels, instead of resizing whole images; "
        "each tile counts as an image. 0 uses whole images",
        least=0,
        most=65535,
        hint="default: whole images",
    )
    overlap: int | None = option(
        None,
        "Minimum overlap of tiles in pixels",
        least=0,
        hint="default: tile / 4",
    )
    empty_tiles: bool = option(
        True, "Also train on tiles without foreground or objects; only with --tile"
    )
    val_fraction: float = option(
        0.2, "Share of the images used for validation; ignored with train/ and val/"
    )
    workers: int | None = option(
        None,
        "Number of processes that load images",
        least=0,
        most=1024,
        hint="default: 0 on a CPU, up to 8 on a GPU",
    )

    @property
    def folder(self) -> Path:
        """``data``, for what reads files; raises ValueError if it is not set."""
        if self.data is None:
            raise ValueError("expected a folder of images and masks, got none; set data")
        return self.data
