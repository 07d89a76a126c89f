# SPDX-License-Identifier: Apache-2.0
"""Triton's cache on disk: which kernels a call launches, and how to compile them in parallel.

A form of a kernel is what Triton compiles once: types, constants, and which numbers and addresses
are multiples of sixteen. ``recording`` finds the forms, ``compile_forms`` fills the cache.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samfast.training.stopping import ignore_signals

MOST_PROCESSES = 16  # each imports torch, which takes about half a GB
_ZEROED: tuple[tuple[Any, str, Callable[..., Tensor]], ...] = (
    (torch, "empty", torch.zeros),
    (torch, "empty_like", torch.zeros_like),
    (Tensor, "new_empty", Tensor.new_zeros),
)


@dataclass(frozen=True)
class Form:
    """One form of a kernel, as plain data for another process.

    module, kernel: where it is defined   types: of each parameter, by name
    constants, attributes: Triton's, by the place of the parameter   options: such as num_warps
    """

    module: str
    kernel: str
    types: dict[str, Any]
    constants: dict[tuple, Any]
    attributes: dict[tuple, Any]
    options: dict[str, Any]


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Form]]:
    """Note the forms that calls inside would launch, and launch none; yields them, each once.

    New memory is zero inside, so that no index which a kernel would write is out of range. A form
    that this process has launched before is in the cache already: it runs, and is not noted.

    Example:
        with recording() as forms:
            loss(model).backward()
        compile_forms(list(forms.values()), target, print)
    """
    import triton

    forms: dict[str, Form] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        form = Form(
            fn.module,
            fn.name,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()},
        )
        forms.setdefault(repr(form), form)
        return True  # Triton neither compiles nor launches it

    with triton.knobs.runtime.scope(), _zeroed():
        triton.knobs.runtime.jit_cache_hook = note
        yield forms


@contextlib.contextmanager
def noting_compiles() -> Iterator[list[bool]]:
    """Yields a list: for each form that Triton asks its cache for, whether it was there."""
    import triton

    there: list[bool] = []
    before = triton.knobs.compilation.listener

    def listen(*, cache_hit: bool, **more: Any) -> None:
        there.append(cache_hit)
        if before is not None:
            before(cache_hit=cache_hit, **more)

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        yield there


def compile_forms(forms: Sequence[Form], target: Any, done: Callable[[Form, bool], None]) -> None:
    """Compile all forms into Triton's cache, in as many processes as there are cores, at most 16.

    target: triton's GPUTarget   done: called after each form, with whether the cache had it
    Raises what Triton raises, and OSError where a process was killed.
    """
    if not forms:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ProcessPoolExecutor(
        min(cores or 1, MOST_PROCESSES, len(forms)),
        mp_context=multiprocessing.get_context("spawn"),  # a forked LLVM or CUDA may hang
        initializer=ignore_signals,
    )
    try:
        waiting = {pool.submit(compile_form, form, target): form for form in forms}
        for ended in as_completed(waiting):
            done(waiting[ended], ended.result())
    except BrokenExecutor:
        raise OSError(
            "a process that compiles kernels was killed; free main memory and run it again; what "
            "was compiled is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def compile_form(form: Form, target: Any) -> bool:
    """Compile one form, and what launches it, into Triton's cache; whether it was there."""
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(form.module), form.kernel)
    source = ASTSource(kernel, form.types, form.constants, form.attributes)
    with noting_compiles() as there:
        compiled = triton.compile(source, target=target, options=form.options)
    _build_launcher(compiled)
    return all(there)


def _build_launcher(compiled: Any) -> None:
    """Triton 3.6 compiles a launcher for each signature, in C; 3.7 has one for all."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher") and torch.cuda.is_available():  # it links to the driver
        driver.CudaLauncher(compiled.src, compiled.metadata)


@contextlib.contextmanager
def _zeroed() -> Iterator[None]:
    """New memory is zero inside."""
    before = [getattr(owner, name) for owner, name, _ in _ZEROED]
    for owner, name, zeroed in _ZEROED:
        setattr(owner, name, zeroed)
    try:
        yield
    finally:
        for (owner, name, _), function in zip(_ZEROED, before, strict=True):
            setattr(owner, name, function)
