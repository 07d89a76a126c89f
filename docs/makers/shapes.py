# SPDX-License-Identifier: Apache-2.0
"""Docstrings as Markdown: lines of shapes stay lines, names stay code, the rest is text."""

import re

SHAPES = re.compile(r"[a-z_]\w*(?:, \w+)*(?: \([^)]*\))?: ")  # how a line of shapes begins


def markdown(text: str) -> str:
    """A docstring as Markdown.

    Lines such as ``x: (B, N)   out: (B, N)`` and those indented below them are one code block.
    """
    made = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(">>> "):
            made.append(f"```pycon\n{paragraph}\n```")
        else:
            made.extend(_blocks(paragraph.splitlines()))
    return "\n\n".join(made)


def _blocks(lines: list[str]) -> list[str]:
    """The pieces of a paragraph, shapes and text, in order."""
    pieces: list[tuple[bool, list[str]]] = []
    for line in lines:
        shapes = bool(SHAPES.match(line)) or (
            line.startswith(" ") and bool(pieces) and pieces[-1][0]
        )
        if not pieces or pieces[-1][0] != shapes:
            pieces.append((shapes, []))
        pieces[-1][1].append(line)
    return [
        "```text\n" + "\n".join(piece) + "\n```" if shapes else _text(piece)
        for shapes, piece in pieces
    ]


def _text(lines: list[str]) -> str:
    return "\n".join(lines).replace("``", "`")
