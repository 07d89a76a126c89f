# SPDX-License-Identifier: Apache-2.0
"""The operations of samfast, one package each.

An installed samfast holds them as ``samfast.kernels.<operation>``. In a checkout they stand in the
top-level folder ``kernels/``, which has no ``__init__.py`` because a top-level package of that name
would shadow Hugging Face's ``kernels``; there this file adds the folder to its search path.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "setup.py").is_file() and (_root / "csrc").is_dir() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))


def operations(file: str) -> tuple[str, ...]:
    """Names of the operations whose folder has this file, in alphabetical order."""
    found = {path.parent.name for root in __path__ for path in Path(root).glob(f"*/{file}")}
    return tuple(sorted(found))
