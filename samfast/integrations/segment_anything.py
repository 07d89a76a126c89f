# SPDX-License-Identifier: Apache-2.0
"""Import segment_anything, whether torchvision is complete, lacks its operators, or is absent.

segment_anything imports four functions of torchvision without declaring the dependency. Only its
predictor and its automatic mask generator call them; building and training a Sam does not.
"""

import contextlib
import importlib
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NoReturn

from samfast.integrations.torchvision import declare_missing_schemas, installed

_BORROWED = {
    "torchvision": (),
    "torchvision.ops": (),
    "torchvision.ops.boxes": ("batched_nms", "box_area"),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": ("resize", "to_pil_image"),
}
_importing = threading.Lock()


def load() -> ModuleType:
    """Import the package segment_anything.

    It imports without torchvision too. Functions that need torchvision then raise an ImportError
    when called. Raises ImportError if segment_anything itself is not installed.
    """
    with _importing:
        if not installed("segment_anything"):
            raise ImportError('segment_anything is not installed: pip install "samfast[sam]"')
        declare_missing_schemas()
        absent = "segment_anything" not in sys.modules and not installed("torchvision")
        with _placeholders() if absent else contextlib.nullcontext():
            return importlib.import_module("segment_anything")


@contextlib.contextmanager
def _placeholders() -> Iterator[None]:
    """Put modules in torchvision's place, only while segment_anything is imported."""
    before = {name: sys.modules[name] for name in _BORROWED if name in sys.modules}
    for name, functions in _BORROWED.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=not functions)
        module.__path__ = []
        for function in functions:
            setattr(module, function, _refusal(function))
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in _BORROWED:
            del sys.modules[name]
        sys.modules.update(before)


def _refusal(function: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(
            f"segment_anything's call of {function} needs torchvision, which is not installed: "
            "pip install torchvision"
        )

    return refuse
