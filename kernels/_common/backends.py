# SPDX-License-Identifier: Apache-2.0
"""Which code runs an operation: reference, torch, cpu (C++), triton or cuda.

Every operation has a ``supports(backend, ...)`` that returns None or a sentence. ``auto`` takes the
first backend of the ladder that returns None. A backend asked for by name raises its sentence.
The environment variable SAMFAST_BACKEND replaces ``auto``.
"""

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

BACKEND = "SAMFAST_BACKEND"  # the variable
NAMES = ("auto", "reference", "torch", "cpu", "triton", "cuda")
LADDER_CUDA = ("triton", "cuda", "torch")  # no GPU has timed the CUDA sources
LADDER_CPU = ("cpu", "torch")
OLDEST_CUDA = (8, 0)


def requested(backend: str) -> str:
    """The backend asked for, with SAMFAST_BACKEND in place of ``auto``; checks the name.

    Every operation calls this. Raises RuntimeError while an exporter records that does not support
    samfast's operators; the reference backend uses none.
    """
    if backend == "auto":
        backend = os.environ.get(BACKEND, "auto")
    if backend not in NAMES:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(NAMES)}")
    if backend != "reference" and _recording():
        raise RuntimeError(
            "torch.jit.trace and torch.onnx.export do not support samfast's operators; give them "
            "samfast.export_form(model), which has none, or use torch.export.export"
        )
    return backend


def _recording() -> bool:
    """Whether an exporter records that knows only torch's own operators.

    torch.compile and torch.export support samfast's; torch.onnx may call torch.export.
    """
    if torch.jit.is_tracing():  # a constant to torch.compile, as is_exporting
        return True
    return torch.compiler.is_exporting() and _in_onnx_export()


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result sets, without its import of torch.compile. By itself
# torch.compile takes is_in_onnx_export for False.
_in_onnx_export._dynamo_marked_constant = True


def resolve(operation: str, backend: str, device: torch.device, supports: Callable) -> str:
    """The backend that runs: ``backend`` itself or, for auto, the first that can.

    Raises RuntimeError with the sentence of ``supports`` when a named backend cannot run.
    """
    if backend != "auto":
        sentence = supports(backend)
        if sentence is not None:
            raise RuntimeError(f"backend {backend!r} cannot run {operation}: {sentence}")
        return backend
    ladder = LADDER_CUDA if device.type == "cuda" else LADDER_CPU
    sentences = []
    for name in ladder:
        sentence = supports(name)
        if sentence is None:
            if device.type == "cuda" and name == "torch":
                _warn_once(f"{operation} runs on the torch backend: {'; '.join(sentences)}")
            return name
        sentences.append(f"{name}: {sentence}")
    raise RuntimeError(f"no backend can run {operation}: {'; '.join(sentences)}")


@functools.cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=3)


def _package() -> Path:
    """The folder of samfast, where setup.py puts what it builds."""
    return Path(sys.modules[__name__.partition(".")[0]].__file__).parent


def build_record() -> dict:
    """What setup.py built and why: {"build": "cuda" | "cpu" | "none", "reason": sentence}."""
    path = _package() / "_build.json"
    if not path.is_file():
        return {"build": "none", "reason": "samfast runs from a source tree that was not installed"}
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def native_missing() -> str | None:
    """Load the native extension once; None, or the sentence that says why it is missing.

    Raises ValueError when SAMFAST_CPU_CAPABILITY asks for code that does not run here.
    """
    library = next(iter(sorted(_package().glob("_C*.so"))), None)
    if library is None:
        return f"the native extension was not built ({build_record()['reason']})"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the native extension does not load: {error.__cause__ or error}"
    _loaded_capability()
    return None


def cpu_capability() -> str | None:
    """The instruction set of the C++ code that runs: default, avx2 or avx512.

    None without the extension. SAMFAST_CPU_CAPABILITY chooses, else the processor's best runs.
    """
    return _loaded_capability() if native_missing() is None else None


def _loaded_capability() -> str | None:
    if not hasattr(torch.ops.samfast_native, "cpu_capability"):
        return None  # an extension built earlier
    try:
        return torch.ops.samfast_native.cpu_capability()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


@functools.cache
def _triton_absent() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= (3, 6) else f"triton {triton.__version__} is older than 3.6"


def triton_missing(device: torch.device) -> str | None:
    """None when Triton kernels run on this device, or the sentence that says why they do not."""
    if (absent := _triton_absent()) is not None:
        return absent
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "x is on the CPU, where Triton runs only under TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"x is on {device.type}, but Triton needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CUDA:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def cuda_missing(device: torch.device, operator: str) -> str | None:
    """None when this GPU and the extension run a native operator, or the sentence why not."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CUDA:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if (absent := native_missing()) is not None:
        return absent
    if not hasattr(torch.ops.samfast_native, operator):
        return f"the native extension is older than {operator}; install samfast again"
    name = f"samfast_native::{operator}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        return f"the extension has no CUDA kernels ({build_record()['reason']})"
    return None


def cpu_missing(device: torch.device, dtype: torch.dtype, operator: str) -> str | None:
    """None when the C++ backend takes such a tensor, or the sentence that says why not.

    operator: the operator of samfast_native that is needed; an older extension may lack it
    """
    if device.type != "cpu":
        return f"x is on {device.type}, but the cpu backend takes CPU tensors"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {dtype}, but the C++ code takes float32, float16 and bfloat16"
    if (missing := native_missing()) is not None:
        return missing
    if not hasattr(torch.ops.samfast_native, operator):
        return f"the native extension is older than {operator}; install samfast again"
    return None
