# SPDX-License-Identifier: Apache-2.0
"""constraints.txt pins all that `samfast[dev]` needs, on every Python."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from project_file import project

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
HASHED = Path(__file__).parents[1] / "requirements-dev.txt"
OF_PYTORCH = {"torch", "torchvision", "triton"}  # whose builds the user chooses
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
BUILD = ("setuptools", "wheel")  # the extension's, which torch.utils.cpp_extension reads as well
CUDA = re.compile(r"(nvidia|cuda)-")  # torch's own choice, of a torch that is built for CUDA


def all_pins() -> list[Requirement]:
    lines = CONSTRAINTS.read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(python: str | None = None) -> dict[str, Requirement]:
    """The pins that hold on a Python, by name; on this one if none is given."""
    environment = {"python_version": python} if python else {}
    chosen = [pin for pin in all_pins() if pin.marker is None or pin.marker.evaluate(environment)]
    names = [canonicalize_name(pin.name) for pin in chosen]
    assert len(names) == len(set(names)), "two pins for one package"
    return dict(zip(names, chosen, strict=True))


def direct() -> list[Requirement]:
    """What pyproject.toml itself asks for, extras of its own left out."""
    asked = project()
    groups = (asked["dependencies"], *asked["optional-dependencies"].values())
    every = [Requirement(line) for group in groups for line in group]
    return [own for own in every if own.name != "samfast"]


def closure() -> dict[str, importlib.metadata.Distribution]:
    """What is installed of all that samfast needs with every extra, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    open_ends = [(canonicalize_name(own.name), frozenset(own.extras)) for own in direct()]
    open_ends += [(name, frozenset()) for name in BUILD]
    seen = set()
    while open_ends:
        name, extras = entry = open_ends.pop()
        if entry in seen or CUDA.match(name):
            continue
        seen.add(entry)
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # another system's, or not installed here
        for line in found[name].requires or ():
            needed = Requirement(line)
            environments = [default_environment() | {"extra": extra} for extra in ("", *extras)]
            if needed.marker is None or any(map(needed.marker.evaluate, environments)):
                open_ends.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return found


def test_each_line_is_one_version():
    for pin in all_pins():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_asked_for_is_pinned(python):
    held = pins(python)
    for own in direct():
        assert canonicalize_name(own.name) in held, f"{own} has no pin on Python {python}"
        version = str(held[canonicalize_name(own.name)].specifier).removeprefix("==")
        assert own.specifier.contains(version), f"{own} excludes {version}"


def test_a_pin_for_newer_pythons_has_one_for_older_ones():
    """A backport is needed on old ones only; what new ones need, old ones need too."""
    held = [pins(python) for python in PYTHONS]
    for newer in held[1:]:
        assert set(newer) <= set(held[0])


def test_all_that_is_installed_of_the_closure_is_pinned():
    assert sorted(set(closure()) - set(pins())) == []


def test_the_installed_versions_are_the_pinned_ones():
    held, found = pins(), closure()
    if not held["torch"].specifier.contains(found["torch"].version):
        pytest.skip(f"torch {found['torch'].version} was not installed from constraints.txt")
    other = {
        name: (distribution.version, str(held[name]))
        for name, distribution in found.items()
        if name in held and not held[name].specifier.contains(distribution.version)
    }
    assert other == {}


def test_no_pin_is_left_over():
    found = closure()
    absent = sorted({canonicalize_name(own.name) for own in direct()} - set(found))
    if absent:
        pytest.skip(f"not installed here: {', '.join(absent)}")
    assert sorted(set(pins()) - set(found)) == []


@pytest.mark.parametrize("python", PYTHONS)
def test_the_file_with_hashes_has_the_same_pins(python):
    text = re.sub(r"^#.*\n", "", HASHED.read_text(), flags=re.MULTILINE).replace("\\\n", "")
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    found = {}
    for line in text.splitlines():
        asked, *hashes = line.split(" --hash=")
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", h.strip()) for h in hashes), line
        pin = Requirement(asked.strip())
        if pin.marker is None or pin.marker.evaluate(environment):
            found[canonicalize_name(pin.name)] = str(pin.specifier)
    expected = {name: str(p.specifier) for name, p in pins(python).items()}
    assert found == {name: pin for name, pin in expected.items() if name not in OF_PYTORCH}
