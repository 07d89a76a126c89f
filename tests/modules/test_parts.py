# SPDX-License-Identifier: Apache-2.0
"""Only one file of the fused layers knows what segment_anything calls its parts."""

import ast
from pathlib import Path

from samfast.fused import parts
from samfast.fused.parts import Layout

FOLDER = Path(parts.__file__).parent
_, ATTENTION, _, MLP = Layout.IN_BLOCK
_, SCALE, _ = Layout.OPTIONS
NAMES = {*Layout.IN_BLOCK, *Layout.IN_ATTENTION, *Layout.IN_MLP, *Layout.TABLES, *Layout.OPTIONS}
COMMON = {ATTENTION, MLP, Layout.IN_MLP[2], SCALE}  # attributes and words of others too


def spoken(path: Path) -> set[str]:
    """The parts' names that a source has as attributes or as whole strings."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
    return ((NAMES | {Layout.WINDOW}) & (attributes | strings)) - COMMON


def test_the_names_stand_in_one_file():
    found = {path.name: spoken(path) for path in sorted(FOLDER.glob("*.py"))}
    assert found.pop("parts.py") >= NAMES - COMMON
    assert found and not any(found.values()), found
