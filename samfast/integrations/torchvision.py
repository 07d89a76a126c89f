# SPDX-License-Identifier: Apache-2.0
"""Make ``import torchvision`` work with a torch that its C++ operators were not built for.

The default torchvision wheel is built for CUDA. With a CPU-only torch, its operator library does
not load, and ``import torchvision`` fails with ``operator torchvision::nms does not exist``. Its
Python files describe the shapes of ``nms`` and ``qnms`` even if these are missing.
segment_anything, transformers and peft import torchvision and fail with it. Declaring the two
schemas first is enough: everything in Python then works. Calling ``nms`` itself still raises
torchvision's own error about missing operators.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_LIBRARIES = ("_C_stable", "_C")  # since torchvision 0.29, and before
_library = None  # the registration lasts as long as this object


def installed(name: str) -> bool:
    """True if the top-level package `name` can be found; it is not imported."""
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def declare_missing_schemas() -> bool:
    """Declare torchvision's ``nms`` and ``qnms`` if its import would fail without them.

    Call it before the first import of torchvision. It does nothing if torchvision is absent or
    already imported, if its operators load, or on a second call. Returns True if it declared
    anything.
    """
    global _library
    if "torchvision" in sys.modules or not installed("torchvision"):
        return False
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if not missing or _load_operators():
        return False
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        _library.define(_SCHEMAS[name])
    return True


def operators_problem() -> str | None:
    """Say why torchvision's C++ operators do not load and what to install; None if they do.

    Returns None too if torchvision is not installed, since samfast does not need it.
    """
    if not installed("torchvision") or _load_operators():
        return None
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return (
        f"torchvision {version} was not built for torch {torch.__version__}, so its operators are "
        'missing; install the torchvision built for this torch (pytorch.org, "Get started"); '
        "samfast works without them"
    )


def _load_operators() -> bool:
    """Load torchvision's operator library, as its own import does; return False if it fails."""
    suffixes = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    found = importlib.util.find_spec("torchvision")
    for folder in (found and found.submodule_search_locations) or ():
        finder = importlib.machinery.FileFinder(folder, suffixes)
        for spec in filter(None, map(finder.find_spec, _LIBRARIES)):
            try:
                torch.ops.load_library(spec.origin)
            except OSError:  # built for another torch: symbols or libraries are missing
                return False
            return True
    return False
