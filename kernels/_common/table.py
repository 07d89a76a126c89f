# SPDX-License-Identifier: Apache-2.0
"""One table per operation: which file runs it on a backend, and what stands in if none does."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping

import torch

from samfast.kernels._common import backends

_STAND_INS = {"cpu": "torch", "cuda": "triton"}
_PATHS = {"torch": "torch_path", "cpu": "cpu_path", "triton": "triton_kernels", "cuda": "cuda_path"}


@dataclasses.dataclass(frozen=True)
class Table:
    """Which file runs an operation on which backend.

    operation: its name in sentences   package: where the paths are
    absent: by a backend without code, the sentence that says so
    native: the operator of samfast_native without which an extension is too old
    function: the public function, the only one with a reference; the operation's name if empty
    paths: by backend, the file that runs it if that is not the usual one
    """

    operation: str
    package: str
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    native: str = ""
    function: str = ""
    paths: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def missing(self, backend: str, device: torch.device, **dtypes: torch.dtype) -> str | None:
        """None if the backend takes tensors of these dtypes, or why it does not.

        dtypes: by name in the sentence; the first is what the C++ code would see. A table does not
        know the limits of CUDA sources and of sizes; an operation's ``supports`` adds them.
        """
        if backend in ("reference", "torch"):
            return None
        if backend in self.absent:
            return self.absent[backend]
        if backend == "cpu":
            return backends.cpu_missing(device, next(iter(dtypes.values())), self.native)
        if backend == "triton" and (missing := backends.triton_missing(device)) is not None:
            return missing
        return None if backend == "cuda" else double(**dtypes)

    def part(self, backend: str) -> str:
        """The backend of this operation as a part of another one that runs on ``backend``.

        Without C++ code torch stands in; without CUDA code Triton does.
        """
        return _STAND_INS[backend] if backend in self.absent else backend

    def choose(self, backend: str, device: torch.device, supports: Callable) -> str:
        """The backend that runs; see ``backends.resolve``."""
        return backends.resolve(self.operation, backend, device, supports)

    def path(self, backend: str, device: torch.device, supports: Callable):
        """The module that runs."""
        name = self.choose(backend, device, supports)
        if name == "reference":
            function = self.function or self.operation
            raise RuntimeError(f"backend 'reference' is plain autograd; call {function} for it")
        return _imported(f"{self.package}.{self.paths.get(name, _PATHS[name])}")


_imported = functools.cache(importlib.import_module)


def double(**dtypes: torch.dtype) -> str | None:
    """Why kernels do not take what is float64; None where nothing is."""
    for name, dtype in dtypes.items():
        if dtype == torch.float64:
            verb = "are" if name.startswith("the ") else "is"
            return f"{name} {verb} {dtype}, but the kernels take float32, float16 and bfloat16"
    return None
