# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml says of the project."""

from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def project() -> dict:
    """Its table of that name."""
    return tomllib.loads(PYPROJECT.read_text())["project"]
