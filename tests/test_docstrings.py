# SPDX-License-Identifier: Apache-2.0
"""Public names say what they are, and the examples in their docstrings give what they show."""

import doctest
import importlib
import inspect

import pytest

from docs.makers import api
from samfast import functional

NAMES = sorted({target: name for page in api.PAGES for target, name in api.names(page)}.items())


def found(target):
    """What a dotted path leads to."""
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
            break
        except ModuleNotFoundError:
            continue
    for name in parts[length:]:
        value = getattr(value, name)
    return value


WITH_EXAMPLES = [(t, n) for t, n in NAMES if ">>> " in (inspect.getdoc(found(t)) or "")]


def test_every_public_name_has_a_docstring():
    assert [name for target, name in NAMES if not found(target).__doc__] == []


def test_every_operation_has_an_example():
    shown = {name.rpartition(".")[2] for _, name in WITH_EXAMPLES}
    assert sorted(set(functional.__all__) - shown) == []


@pytest.mark.parametrize("target, name", WITH_EXAMPLES, ids=[name for _, name in WITH_EXAMPLES])
def test_example(target, name):
    """In an empty namespace: it imports what it needs."""
    value = found(target)
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(value), {}, name, None, None)
    said = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert said == []
