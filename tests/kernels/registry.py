# SPDX-License-Identifier: Apache-2.0
"""The operators that the folders' cases.py name, as parameters of tests."""

import importlib
from pathlib import Path

import pytest

CASES = [
    importlib.import_module(f".{path.parent.name}.cases", __package__)
    for path in sorted(Path(__file__).parent.glob("*/cases.py"))
]
OPERATIONS = [operation for cases in CASES for operation in cases.OPERATIONS]
FINITE = [operation for cases in CASES for operation in getattr(cases, "FINITE", ())]
# Ways of an operator that has another: one of them is enough for a quick look.
FIRST = {o.name: o for o in reversed(OPERATIONS)} | {o.name: o for o in OPERATIONS if not o.way}
OTHERS = [operation.id for operation in OPERATIONS if FIRST[operation.name] is not operation]


def cases(backends=None, of=OPERATIONS):
    """Operations and backends, all that an operation has or those of ``backends``."""
    pairs = [
        pytest.param(
            operation,
            backend,
            marks=[pytest.mark.gpu] * (backend == "cuda")
            + [pytest.mark.slow_on_cpu] * (of is not FINITE and operation.id in OTHERS),
        )
        for operation in of
        for backend in (operation.backends if backends is None else backends)
    ]
    ids = [f"{pair.values[0].id}-{pair.values[1]}" for pair in pairs]
    return pytest.mark.parametrize(
        ("operation", "backend"),
        [pytest.param(*p.values, marks=p.marks, id=i) for p, i in zip(pairs, ids, strict=True)],
    )
