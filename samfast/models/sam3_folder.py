# SPDX-License-Identifier: Apache-2.0
"""Read what a Hugging Face folder says about its SAM 3, without torch."""

import json
import os
from pathlib import Path
from typing import Any

NAME = "sam3"
IMAGE_SIZE = 1008  # if the configuration names none
_OTHERS = {
    "sam3": "the part of SAM 3 that takes words, without the one that takes boxes and points; "
    "train it in a loop of your own, with samfast.attach and samfast.fuse",
    "sam3_tracker_video": "the part of SAM 3 that follows objects through videos",
}


def tracker_config(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """Return the tracker's configuration; raise ValueError or FileNotFoundError otherwise."""
    folder = Path(checkpoint)
    if not folder.exists():
        raise FileNotFoundError(f"checkpoint {folder} does not exist")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"checkpoint {folder} is not a Hugging Face folder: it has no config.json")
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a configuration: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{file} is not a configuration: it holds a {type(given).__name__}")
    kind = given.get("model_type")
    if kind == "sam3_video" and isinstance(given.get("tracker_config"), dict):
        return given["tracker_config"]  # all of SAM 3, tracker included
    if kind != "sam3_tracker":
        what = _OTHERS.get(str(kind), f"a model of the kind {kind!r}")
        raise ValueError(f"checkpoint {folder} holds {what}; sam3 needs a Sam3TrackerModel")
    return given


def folder_image_size(checkpoint: str | os.PathLike | None) -> int:
    """Return the image size of a folder's model; without a folder, the published size."""
    if checkpoint is None:
        return IMAGE_SIZE
    found: Any = tracker_config(checkpoint)
    for key in ("vision_config", "backbone_config", "image_size"):
        found = found.get(key) if isinstance(found, dict) else None
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, int) else IMAGE_SIZE
