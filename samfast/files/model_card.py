# SPDX-License-Identifier: Apache-2.0
"""Model cards for the Hugging Face Hub: a README.md whose first lines the Hub reads.

Only facts go in: unknown ones are left out or called unknown. Importing this does not import
torch.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

CARD = "README.md"
UNKNOWN = "unknown"
NO_LICENSE = "No license was named, so its terms are unknown."
_LICENSE = re.compile(r"[a-z0-9]+([.+-][a-z0-9]+)*")
_OF_FILES = {  # the repositories on the Hub that hold the weights of SAM's own files
    "sam_vit_b_01ec64.pth": "facebook/sam-vit-base",
    "sam_vit_l_0b3195.pth": "facebook/sam-vit-large",
    "sam_vit_h_4b8939.pth": "facebook/sam-vit-huge",
}
_REPOSITORIES = (*_OF_FILES.values(), "facebook/sam3")
_PLAIN = re.compile(r"[a-z][a-z0-9]*([./-][a-z0-9]+)*")
_NO_TEXT = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # not text in YAML
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


def check_license(name: str | None) -> None:
    """Raise ValueError unless this can be a license's identifier on the Hub."""
    if name is not None and not _LICENSE.fullmatch(name):
        raise ValueError(
            f"expected license to be an identifier of the Hugging Face Hub such as apache-2.0, "
            f"cc-by-4.0 or other, got {name!r}; write it in small letters, without spaces"
        )


def base_model(checkpoint: str | PurePath | None) -> str | None:
    """Guess the Hub's name for the weights from their path; None if the path does not tell.

    It knows SAM's own files by name, and a folder by its place: in the Hub's cache, or under the
    repository's own name.

    Example:
        >>> base_model("weights/sam_vit_b_01ec64.pth")
        'facebook/sam-vit-base'
    """
    if checkpoint is None:
        return None
    path = PurePath(checkpoint)
    if (cached := _CACHED.search(path.as_posix() + "/")) is not None:
        return f"{cached[1]}/{cached[2]}"
    named = "/".join(path.parts[-2:])
    return _OF_FILES.get(path.name) or (named if named in _REPOSITORIES else None)


def card(front: Mapping[str, Any], title: str, sections: Iterable[str]) -> bytes:
    """Make the file: front matter without its None values, title and sections."""
    lines = ["---"]
    for key, value in front.items():
        if isinstance(value, (list, tuple)):
            lines += [f"{key}:", *(f"- {_scalar(item)}" for item in value)]
        elif value is not None:
            lines.append(f"{key}: {_scalar(value)}")
    text = "\n".join([*lines, "---", "", f"# {text_of(title)}", ""])
    text += "".join(f"\n{section}\n" for section in sections)
    return text.encode("utf-8", "replace")  # file names may not be valid UTF-8


def section(title: str, *parts: str) -> str:
    """Make a heading and its paragraphs; skip empty ones."""
    return "\n\n".join([f"## {title}", *filter(None, parts)])


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Make a table of rows under column titles; None is an empty cell."""
    lines = [list(map(_cell, columns)), ["---"] * len(columns)]
    lines += [list(map(_cell, row)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_of(value: Any) -> str:
    """Escape a value into one line of Markdown that shows it unchanged."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*<>|\[\]#]|\b_|_\b)", r"\\\1", line)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else text_of(value)


def _scalar(text: str) -> str:
    """Write a text as YAML; quote it, as in JSON, if YAML might read something else."""
    plain = _PLAIN.fullmatch(text) and text not in _NO_TEXT
    return text if plain else json.dumps(text)
