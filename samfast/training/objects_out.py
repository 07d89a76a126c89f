# SPDX-License-Identifier: Apache-2.0
"""Write objects for other programs: label TIFF, COCO JSON, GeoJSON, CSV.

Every function checks its arguments before it writes, and raises ValueError.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samfast.files.placing import write_whole
from samfast.training.georeference import Affine, Georeference
from samfast.training.label_tiff import tiff_bytes
from samfast.training.objects import Objects
from samfast.training.outlines import polygons
from samfast.training.rle import compressed, counts_of_runs

KINDS = ("annotation", "detection")
CLASS = "object"  # of objects without a class
_COLUMNS = "id area x0 y0 x1 y1 centroid_x centroid_y score name".split()


class ImageObjects(NamedTuple):
    """What was found in an image.

    name: its file name   scores: one of each object   classes: the name of each one's class
    """

    name: str
    objects: Objects
    scores: Sequence[float] | None = None
    classes: Sequence[str] | None = None


def write_labels(
    path: Path | str, labels: np.ndarray, georeference: Georeference | None = None
) -> None:
    """Write labels (H, W) as a TIFF file of uint16, or uint32 if a label is above 65,535.

    georeference: of the image, to be kept. Raises ValueError unless labels are integers from 0 to
    2**32 - 1.
    """
    values = label_values(path, labels)
    try:
        data = tiff_bytes(values, georeference)
    except ValueError as error:
        raise ValueError(f"label image {path} {error}; cut the image into parts") from None
    write_whole(Path(path), data, durable=False)


def label_values(path: Path | str, labels: np.ndarray) -> np.ndarray:
    """Labels (H, W) as uint16, or as uint32 where one is above 65,535; errors as ``write_labels``.

    path: of the file that is about to hold them
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(
            f"labels for {path} are {labels.dtype} of shape {labels.shape}; expected integers of "
            "shape (H, W)"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= 2**32:
        wrong = low if low < 0 else high
        raise ValueError(f"labels for {path} hold {wrong}; expected integers from 0 to {2**32 - 1}")
    return np.ascontiguousarray(labels, np.uint16 if high < 2**16 else np.uint32)


def coco_json(entries: Iterable[ImageObjects], categories: Sequence[str] | None = None) -> str:
    """Return images, annotations and categories as the text of a COCO JSON file.

    categories: all class names, with the ids 1, 2, ... in this order (default: those that occur,
    sorted). Each annotation has its mask as compressed RLE, its box x, y, width, height, its area,
    and its score if there are scores.
    """
    entries = list(entries)
    names = set()
    for entry in entries:
        if entry.name in names:
            raise ValueError(f"two images are called {entry.name}; give each a name of its own")
        names.add(entry.name)
        _check(entry.objects, entry.scores, entry.classes, f"image {entry.name}")
    used = {name for entry in entries for name in entry.classes or [CLASS] * len(entry.objects)}
    known = sorted(used) if categories is None else list(categories)
    if len(set(known)) < len(known) or not used <= set(known):
        wrong = sorted(used - set(known))
        raise ValueError(
            f"categories are {known}; "
            + (f"{wrong[0]} is missing" if wrong else "name each only once")
        )
    ids = {name: i for i, name in enumerate(known, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, entry in enumerate(entries, 1):
        height, width = entry.objects.size
        images.append({"id": i, "file_name": entry.name, "height": height, "width": width})
        for own in _annotations(entry, i, ids):
            annotations.append({"id": len(annotations) + 1, **own})
    content = {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
    }
    return json.dumps(content, allow_nan=False)


def _annotations(entry: ImageObjects, image: int, ids: dict[str, int]) -> Iterable[dict[str, Any]]:
    objects = entry.objects
    height, width = objects.size
    for i in range(len(objects)):
        counts = counts_of_runs(*objects.runs(i), height * width)
        x0, y0, x1, y1 = objects.boxes[i].tolist()
        score = {} if entry.scores is None else {"score": float(entry.scores[i])}
        yield {
            "image_id": image,
            "category_id": ids[entry.classes[i] if entry.classes is not None else CLASS],
            "segmentation": {"size": [height, width], "counts": compressed(counts.tolist())},
            "bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1],
            "area": int(objects.areas[i]),
            "iscrowd": 0,
            **score,
        }


def geojson(
    objects: Objects,
    scores: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    *,
    kind: str = KINDS[0],
    georeference: Georeference | None = None,
    ids: Sequence[int] | None = None,
) -> str:
    """Return objects as the text of a GeoJSON file with one feature each, for QuPath.

    Outlines follow pixel corners, so that their area is the number of pixels. An object with
    several parts is a MultiPolygon.
    kind: the type in QuPath, "annotation" or "detection"
    georeference: gives the units of coordinates; without it they are pixels
    ids: numbers used as names
    """
    _check(objects, scores, classes, "the image")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected {' or '.join(KINDS)}")
    affine = None if georeference is None else georeference.affine
    if georeference is not None and affine is None:
        raise ValueError(
            "the georeference has no affine map from pixels to coordinates; warp the image first, "
            "or leave the georeference out"
        )
    features = []
    for i in range(len(objects)):
        properties: dict[str, Any] = {"objectType": kind}
        if ids is not None:
            properties["name"] = str(ids[i])
        if classes is not None:
            properties["classification"] = {"name": classes[i]}
        if scores is not None:
            properties["measurements"] = {"score": float(scores[i])}
        geometry = _geometry(objects, i, affine)
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    content: dict[str, Any] = {"type": "FeatureCollection"}
    if georeference is not None and georeference.epsg is not None:
        name = f"urn:ogc:def:crs:EPSG::{georeference.epsg}"
        content["crs"] = {"type": "name", "properties": {"name": name}}
    return json.dumps({**content, "features": features}, allow_nan=False)


def _geometry(objects: Objects, i: int, affine: Affine | None) -> dict[str, Any]:
    rows, columns = objects.window(i)
    parts = [
        [_placed(ring, columns.start, rows.start, affine) for ring in part]
        for part in polygons(objects.crop(i))
    ]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}


def _placed(
    ring: list[tuple[int, int]], left: int, top: int, affine: Affine | None
) -> list[list[float]]:
    """A ring of a box in the image's pixels, or in the units of its georeference.

    Outer rings run against the clock where y points up, as GeoJSON asks; a map that mirrors would
    turn them round.
    """
    if affine is None:
        return [[x + left, y + top] for x, y in ring]
    a, b, c, d, e, f = affine
    moved = [(x + left, y + top) for x, y in ring]
    placed = [[a * x + b * y + c, d * x + e * y + f] for x, y in moved]
    return placed if a * e - b * d > 0 else placed[::-1]


def csv_text(
    objects: Objects,
    scores: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    ids: Sequence[int] | None = None,
) -> str:
    """Return a CSV table of objects: a header line and one line per object.

    id: that of ``ids``, 1 to N if not given   area: pixels
    x0, y0, x1, y1: its box, and centroid_x, centroid_y its centre of mass, in pixels, where the
    centre of the first is 0, 0
    score, name: its score and its class, empty without
    """
    _check(objects, scores, classes, "the image")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for i in range(len(objects)):
        rows, columns = objects.window(i)
        y, x = np.nonzero(objects.crop(i))
        box = [int(side) for side in objects.boxes[i]]
        centre = [f"{x.mean() + columns.start:.3f}", f"{y.mean() + rows.start:.3f}"]
        score = "" if scores is None else repr(float(scores[i]))
        name = "" if classes is None else classes[i]
        number = i + 1 if ids is None else int(ids[i])
        writer.writerow([number, int(objects.areas[i]), *box, *centre, score, name])
    return table.getvalue()


def _check(
    objects: Objects,
    scores: Sequence[float] | None,
    classes: Sequence[str] | None,
    what: str,
) -> None:
    """Raise ValueError if scores or classes are not one of each object, or are none."""
    for name, given in (("scores", scores), ("classes", classes)):
        if given is not None and len(given) != len(objects):
            raise ValueError(f"{what} has {len(objects)} objects but {len(given)} {name}")
    for i, score in enumerate(scores if scores is not None else ()):
        if not isfinite(score):
            raise ValueError(f"{what}, object {i} has the score {score}; expected a finite number")
    for i, name in enumerate(classes if classes is not None else ()):
        if not isinstance(name, str) or not name:
            raise ValueError(f"{what}, object {i} has the class {name!r}; expected a text")
