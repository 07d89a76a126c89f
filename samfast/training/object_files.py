# SPDX-License-Identifier: Apache-2.0
"""The files of predicted objects: label image, table, outlines, COCO's JSON, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from samfast.files.placing import write_whole
from samfast.training.georeference import Georeference
from samfast.training.object_numbers import kept_objects
from samfast.training.objects import Objects
from samfast.training.objects_out import (
    ImageObjects,
    coco_json,
    csv_text,
    geojson,
    label_values,
    write_labels,
)
from samfast.training.pictures import objects_over, png_bytes
from samfast.training.rle import compressed, counts_of_runs
from samfast.training.stack_files import Name, StackFiles
from samfast.training.stacks import Slice, Source

COCO = "coco.json"
_LARGEST = 4096  # longest side of a picture


def parts(mask: np.ndarray, min_size: int = 0) -> np.ndarray:
    """The connected parts of a mask, bool (H, W), numbered from 1 on: int32 (H, W)."""
    from scipy import ndimage

    return kept_objects(ndimage.label(mask)[0], min_size)


def _small(objects: Objects) -> Objects:
    """The same objects as run lengths, which take little memory."""
    pixels = objects.size[0] * objects.size[1]
    counts = [counts_of_runs(*objects.runs(i), pixels) for i in range(len(objects))]
    rles = [{"size": list(objects.size), "counts": compressed(own.tolist())} for own in counts]
    return Objects.from_rles(objects.size, rles)


class ObjectFiles:
    """Writes the objects of images into a folder, in the formats that are asked for.

    formats: of "labels", "csv", "geojson", "coco"   Raises ValueError, before anything is written,
    for an image whose georeference, one of ``places``, has no affine map for "geojson".

    stacks: holds the label images of stacks until they are whole
    """

    def __init__(
        self,
        folder: Path,
        formats: Sequence[str],
        places: Mapping[Source, Georeference | None],
        stacks: StackFiles,
    ):
        self.folder, self.formats = folder, formats
        self._found: list[ImageObjects] = []
        self._places, self._stacks = places, stacks
        for path, place in places.items():
            if "geojson" in formats and place is not None and place.affine is None:
                raise ValueError(
                    f"the georeference of {path} has no affine map from pixels to coordinates; "
                    "leave geojson out of --formats, or warp the image first"
                )

    def write(self, name: Name, path: Source, image: np.ndarray, labels: np.ndarray) -> dict:
        """NAME_labels.tif, NAME_objects.csv and .geojson, as asked for, and NAME_overlay.png.
        Of a stack, the label image has a page of each slice.

        image: uint8 (H, W, 3)   labels: int32 (H, W), from 1 on, 0 for no object. The picture is at
        most 4096 pixels wide and high. Returns the files by what they are.
        """
        objects, place = Objects.from_labels(labels), self._places[path]
        made = {"image": str(path)}
        if "labels" in self.formats:
            made["labels"] = str(self.folder / f"{name.file}_labels.tif")
            if isinstance(path, Slice):
                pages = label_values(made["labels"], labels)
                self._stacks.add(Path(made["labels"]), path, pages, place)
            else:
                write_labels(made["labels"], labels, place)
        if "csv" in self.formats:
            made["csv"] = str(self.folder / f"{name.image}_objects.csv")
            table = csv_text(objects, ids=objects.ids.tolist())
            write_whole(Path(made["csv"]), table.encode(), durable=False)
        if "geojson" in self.formats:
            made["geojson"] = str(self.folder / f"{name.image}_objects.geojson")
            text = geojson(objects, georeference=place, ids=objects.ids.tolist())
            write_whole(Path(made["geojson"]), text.encode(), durable=False)
        if "coco" in self.formats:
            self._found.append(ImageObjects(path.name, _small(objects)))
        made["overlay"] = str(self.folder / f"{name.image}_overlay.png")
        step = -(-max(labels.shape) // _LARGEST)
        overlay = objects_over(image[::step, ::step], labels[::step, ::step])
        write_whole(Path(made["overlay"]), png_bytes(overlay), durable=False)
        return {**made, "objects": len(objects)}

    def finish(self) -> dict:
        """coco.json of all images, where it is asked for."""
        if "coco" not in self.formats:
            return {}
        path = self.folder / COCO
        write_whole(path, coco_json(self._found).encode(), durable=False)
        return {"coco": str(path)}
