# SPDX-License-Identifier: Apache-2.0
"""The sentences in which samfast says that something is not fused, or not run, read off the code.

A sentence is a string with a space in it, in a function that gives a string or None. Its values are
an ellipsis.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "samfast/fused",
    "samfast/integrations",
    "samfast/adapters",
    "samfast/methods",
    "kernels",
)
OTHERS = {  # files whose sentences are errors of their own, or of no report
    "samfast/integrations": ("check.py", "peft_config.py", "peft_names.py", "torchvision.py"),
    "samfast/adapters": ("base_digest.py", "checks.py", "finite.py", "method.py", "wrappers.py"),
    "samfast/methods": ("attach.py", "checks.py", "method.py", "registry.py"),
    "kernels": ("cpu_path.py", "launches.py", "costs.py", "example.py", "arguments.py",
                "budget.py", "launch_plan.py", "operator.py", "philox.py"),
}  # fmt: skip
SILENT = {"extra_repr", "__str__", "_state_rows", "_unread", "_dtypes", "described", "signature"}


@functools.cache
def sentences() -> dict[str, str]:
    """Where each sentence stands, by the sentence; later places of the same one are left out."""
    found: dict[str, str] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name not in OTHERS.get(folder, ()):
                for line, text in of_file(path):
                    found.setdefault(text, f"{path.relative_to(ROOT)}:{line}")
    return found


def of_file(path: Path) -> Iterator[tuple[int, str]]:
    """(line, sentence) of every function that gives one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:  # a table's own, such as why a backend is absent
        if isinstance(node, ast.Assign) and "absent" in ast.unparse(node).lower():
            yield from _strings(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name not in SILENT:
            if _gives_text(node.returns):
                yield from _strings(node, ast.get_docstring(node, clean=False))


def _gives_text(hint: ast.expr | None) -> bool:
    """Whether a function gives a string or None, alone or last of several values."""
    written = "" if hint is None else ast.unparse(hint)
    return "str" in written.split(" | ") or "str | None]" in written


def _strings(tree: ast.AST, docstring: str | None = None) -> Iterator[tuple[int, str]]:
    """Strings with a space, but for the docstring and the pieces of a longer one."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in ast.walk(node) if part is not node}
            text = "".join(_piece(part) for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if id(node) not in inside and text != docstring and " " in text.strip():
            yield node.lineno, text.strip()


def _piece(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "…"
