# SPDX-License-Identifier: Apache-2.0
"""scores.csv and classes.csv: the scores of each image and of each class as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SCORES, CLASSES = "scores.csv", "classes.csv"
_LARGER_IS_BETTER = ("ap50", "dice", "miou")
_SMALLER_IS_BETTER = ("abs", "angle")


def scores_csv(images: Iterable[Mapping[str, Any]]) -> bytes:
    """One line for each image and task, the worst first; the IoU of a class under iou_NAME.

    Tasks keep their order. An image without a score comes last, and what has no value is empty.
    images: ``Scored.images``, of any number of processes in any order
    """
    flat = [_flat(image) for image in images]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    columns.sort(key=lambda name: name.startswith("iou_"))  # classes last
    tasks = list(dict.fromkeys(row.get("task") for row in flat))
    flat.sort(key=lambda row: (tasks.index(row.get("task")), *_worst_first(row), row["image"]))
    return _table(columns, flat)


def classes_csv(classes: Sequence[Mapping[str, Any]]) -> bytes:
    """One line for each class of each task; the IoU is empty for a class that is nowhere."""
    return _table(list(classes[0]), classes)


def score_files(
    images: Iterable[Mapping[str, Any]], classes: Sequence[Mapping[str, Any]]
) -> dict[str, bytes]:
    """The tables by their file names; classes.csv only where there are classes."""
    files = {SCORES: scores_csv(images)}
    return {**files, CLASSES: classes_csv(classes)} if classes else files


def _flat(image: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: value for name, value in image.items() if name != "classes"}
    return row | {f"iou_{name}": iou for name, iou in image.get("classes", {}).items()}


def _worst_first(row: Mapping[str, Any]) -> tuple[bool, float]:
    for names, sign in ((_LARGER_IS_BETTER, 1.0), (_SMALLER_IS_BETTER, -1.0)):
        for name in names:
            if row.get(name) is not None:
                return False, sign * row[name]
    return True, 0.0


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    lines = [columns, *([row.get(name) for name in columns] for row in rows)]
    text = "".join(",".join(map(_cell, line)) + "\n" for line in lines)
    return text.encode("utf-8", "surrogateescape")  # file names may be no UTF-8


def _cell(value: Any) -> str:
    """A value as RFC 4180 has it. Before Python 3.13, csv's writer leaves a bare \\r unquoted."""
    text = "" if value is None else str(value)
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text
