# SPDX-License-Identifier: Apache-2.0
"""Makes ``import torchvision`` work beside a torch that its C++ operators were not built for.

The default torchvision wheel is built for CUDA. Beside a CPU-only torch its operator library cannot
be loaded, and ``import torchvision`` then fails with ``operator torchvision::nms does not exist``,
because its Python files describe the shapes of ``nms`` and ``qnms`` whether or not these are there.
segment_anything, transformers and peft import torchvision, so they fail with it. Declaring the two
schemas first is enough: all that is written in Python works, and calling ``nms`` itself still ends
in torchvision's own message that its operators are missing.
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
_library = None  # the registration ends with this object


def installed(name: str) -> bool:
    """Whether the top-level package `name` can be found; it is not imported."""
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def declare_missing_schemas() -> bool:
    """Declares torchvision's ``nms`` and ``qnms`` where its import would fail without them.

    Call it before the first import of torchvision. Does nothing when torchvision is absent or
    already imported, when its operators load, or at a second call. Returns whether it declared
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
    """Why torchvision's C++ operators do not load, and what to install; None where they do.

    None, too, where torchvision is not installed: samfast does not need it.
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
    """Loads torchvision's operator library, as its own import does; False where that fails."""
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
