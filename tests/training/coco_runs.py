# SPDX-License-Identifier: Apache-2.0
"""Reads data sets in a process of its own, with limits, and prints a line before and after each.

Each line after is JSON: the folder, the type of the error, its sentence, and what was opened that
lies outside of the folder of images. The program ends, with what it printed last, at the first
data set that crashes it, takes more than the limit of time, or another kind of error.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np

from samfast.training.coco_in import read_coco

SECONDS = 30
MEMORY = 1 << 30  # bytes beyond what the libraries take
_EVENTS = {"open", "os.listdir", "os.scandir", "os.open"}
opened: list[str] = []


def note(event: str, args: tuple) -> None:
    if event in _EVENTS and args and isinstance(args[0], (str, bytes, os.PathLike)):
        opened.append(os.fsdecode(args[0]))


def limit() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def check(data: Path) -> None:
    """Read, and make everything that may be made lazily."""
    for image in read_coco(data / "all.json", data / "images"):
        objects = image.objects()
        assert objects.size == image.size
        assert len(objects) + objects.empty == len(image.categories) == len(image.ids)
        labels, crowd = objects.labels(), image.crowd()
        assert labels.shape == image.size
        assert crowd is None or crowd.shape == image.size
        height, width = image.size
        assert (objects.boxes >= 0).all()
        assert (objects.boxes <= np.array([width, height, width, height]) - 1).all()
        assert all(objects.mask(i).sum() == objects.areas[i] for i in range(len(objects)))


def outside(data: Path) -> list[str]:
    """What was opened but neither the JSON file, nor inside the images, nor Python's own code."""
    code = [sys.prefix, sys.base_prefix, str(Path(__file__).parents[2] / "samfast")]
    allowed = [Path(os.path.realpath(one)) for one in (*code, data / "images", data / "all.json")]
    found = []
    for path in opened:
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(one) for one in allowed):
            found.append(path)
    return found


def main(good: str, *folders: str) -> None:
    check(Path(good))
    sys.addaudithook(note)
    limit()
    for folder in folders:
        print(json.dumps({"begins": folder}), flush=True)
        opened.clear()
        kind, sentence = None, None
        signal.alarm(SECONDS)
        try:
            check(Path(folder))
        except (ValueError, FileNotFoundError) as error:
            kind, sentence = type(error).__name__, str(error)
        signal.alarm(0)
        line = {
            "ends": folder,
            "kind": kind,
            "sentence": sentence,
            "outside": outside(Path(folder)),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
