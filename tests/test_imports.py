# SPDX-License-Identifier: Apache-2.0
"""Who imports whom, read from the sources: no circles, and kernels on the ground."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FACES = ("samfast.modules", "samfast.integrations.peft")  # import paths of 0.1.0, for users
KERNELS = "samfast.kernels."
ALLOWED: dict[tuple[str, str], str] = {}  # (importer, imported): why


def find_sources() -> dict[str, Path]:
    """Every module of samfast by its name; a package is its ``__init__``."""
    found = {}
    for folder, prefix in ((ROOT / "samfast", "samfast"), (ROOT / "kernels", "samfast.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((prefix, *parts))] = path
    return found


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """What a source imports anywhere in it, in functions and under TYPE_CHECKING too.

    ``from package import name`` is an import of the module of that name where there is one, and of
    the package otherwise. Packages on the way to a module do not count: they are loaded before it.
    Nor do tables of names, such as samfast's own, from which nothing is loaded by ``import``.
    """
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found.update(full if full in known else node.module for full in names.values())
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.update(a.value for a in node.args[:1] if isinstance(a, ast.Constant))
    return found & known


@functools.cache
def graph() -> dict[str, set[str]]:
    sources = find_sources()
    return {
        name: imported(ast.parse(path.read_text(encoding="utf-8")), set(sources)) - {name}
        for name, path in sources.items()
    }


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """The modules of one circle in order, the first again at the end; None where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(edges[name]):
            if (found := walk(other, [*path, name])) is not None:
                return found
        done.add(name)
        return None

    circles = (walk(name, []) for name in sorted(edges))
    return next((found for found in circles if found is not None), None)


def test_no_circle():
    edges = {
        name: {other for other in others if (name, other) not in ALLOWED}
        for name, others in graph().items()
    }
    found = circle(edges)
    assert found is None, " -> ".join(found)


def test_every_allowed_edge_is_there():
    assert [edge for edge in ALLOWED if edge[1] not in graph().get(edge[0], ())] == []


def test_kernels_stand_on_the_ground():
    above = {
        (name, other)
        for name, others in graph().items()
        for other in others
        if name.startswith(KERNELS) and not other.startswith("samfast.kernels")
    }
    assert above == set()


def test_the_faces_are_for_users():
    """samfast's own code imports what it needs from where it is."""
    used = {
        (name, other)
        for name, others in graph().items()
        for other in others
        if _is_face(other) and not _is_face(name)
    }
    assert used == set()


def _is_face(name: str) -> bool:
    return any(name == face or name.startswith(f"{face}.") for face in FACES)


def test_a_circle_is_found():
    """In a function, under TYPE_CHECKING, by import_module; a package's name is not its module."""
    known = {"p", "p.a", "p.b", "p.c"}
    sources = {
        "p": "",
        "p.a": "def f():\n    from p import b",
        "p.b": "if TYPE_CHECKING:\n    from p.c import name",
        "p.c": "importlib.import_module('p.a')",
    }
    edges = {name: imported(ast.parse(text), known) for name, text in sources.items()}
    assert circle(edges) == ["p.a", "p.b", "p.c", "p.a"]
    assert circle({**edges, "p.c": {"p"}}) is None


def test_methods_are_read_without_torch():
    """The command line prints their help from the classes."""
    code = "import sys, samfast.methods.registry; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
