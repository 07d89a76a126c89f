# SPDX-License-Identifier: Apache-2.0
"""Settings that are made of tables are declared for readers of types as they are made."""

import ast
import inspect
from dataclasses import fields

import pytest

from samfast.training import settings

DECLARED = ("MethodSettings", "WarmupSettings")


def declared(name: str) -> type:
    """The class under ``if TYPE_CHECKING``, as if it had been run."""
    blocks = [
        node for node in ast.parse(inspect.getsource(settings)).body if isinstance(node, ast.If)
    ]
    found = [
        node
        for block in blocks
        if ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ClassDef)
    ]
    space = dict(vars(settings))
    for node in found:
        exec(ast.unparse(node), space)
        if node.name == name:
            return space[name]
    raise LookupError(name)


@pytest.mark.parametrize("name", DECLARED)
def test_the_declared_fields_are_those_that_are_made(name):
    made, wanted = (
        {field.name: (field.type, field.default) for field in fields(kind)}
        for kind in (getattr(settings, name), declared(name))
    )
    assert made == wanted
