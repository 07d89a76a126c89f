# SPDX-License-Identifier: Apache-2.0
"""The settings of what is learned, a group of fine-tuning's options. Importing loads no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from samfast.adapters.options import option


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is learned, and from which files."""

    data: Path | None = option(
        None,
        "Folder with images/ and masks/, or with train/ and val/ that hold them",
        hint="required, except with --dry-run",
    )
    tasks: Path | None = option(
        None,
        "YAML file with several tasks that share the encoder, each with a mask decoder of its own. "
        "Under tasks: a list of name, kind (binary, semantic, regression), channels, folder, "
        "weight, loss, ignore, foreground, threshold, scale, offset, classes, derive and from. Not "
        "with --prompt, --loss, --foreground, --threshold and --ignore",
        hint="default: one binary mask for each image",
    )
    masks: str | None = option(
        None,
        "What mask files hold: foreground or not (binary), the class of each pixel (classes), or "
        "the number of an object in each of its pixels, 0 for none (instances)",
        choices=("binary", "classes", "instances"),
        hint="default: binary, with --classes classes",
    )
    classes: int | None = option(
        None,
        "Number of classes, the values 0 to N - 1; 255 counts nowhere. Short for --tasks with one "
        "semantic task",
        least=2,
        most=65535,
        hint="default: none",
    )
    mask_suffix: str | None = option(
        None,
        "Masks have their images' names with this after the stem: photo_mask.png for photo.jpg "
        "with _mask. They lie in masks/, or beside the images where there is no masks/. Write "
        "--mask-suffix=-mask for a text that begins with a dash",
        metavar="TEXT",
        hint="default: names are equal",
    )
    stacks: bool = option(
        False,
        "Take each page of a TIFF, and each slice of a .npy array (slices, height, width), as an "
        "image of its own, called NAME.tif[0] and so on. Masks have as many slices. Whole stacks "
        "are split, so that --val-fraction is their share",
    )
    foreground: tuple[int | Literal["any"], ...] | None = option(
        None,
        "Mask values that are foreground, or any: all above 0, such as the numbers of instances",
        metavar="any | INT ...",
        hint="default: the only value above 0",
    )
    threshold: float | None = option(
        None,
        "Count each mask value above this as foreground; not with --foreground",
        hint="default: none",
    )
    ignore: tuple[float, ...] | None = option(
        None,
        "Mask values that count nowhere: in no loss, score, box or point",
        metavar="VALUE ...",
        hint="default: none",
    )
    bands: str | None = option(
        None,
        "Bands of the files to show, counted from 1: one as grey, or three as red, green, blue",
        metavar="N | R,G,B",
        hint="default: as the files' tags say",
    )
    range: str = option(
        "auto",
        "Values that become black and white in images of more than 8 bits: the 1st and 99th "
        "percentile of each image (auto), the number type's limits (full), or these; write "
        "--range=LOW,HIGH for a negative LOW",
        metavar="{auto,full} | LOW,HIGH",
    )
    tile: int | None = option(
        None,
        "Cut images into tiles of this side, in their pixels, in place of shrinking whole images "
        "to the model's size; each tile counts as an image; 0 for whole images",
        least=0,
        most=65535,
        hint="default: whole images",
    )
    overlap: int | None = option(
        None,
        "Pixels that tiles have in common at least",
        least=0,
        hint="default: tile / 4",
    )
    empty_tiles: bool = option(
        True, "Train on tiles without foreground or objects, too; only with --tile"
    )
    val_fraction: float = option(
        0.2, "Share of the images that validates; ignored with train/ and val/"
    )
    workers: int | None = option(
        None,
        "Processes that load images",
        least=0,
        most=1024,
        hint="default: 0 on a CPU, else up to 8",
    )
