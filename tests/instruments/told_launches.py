# SPDX-License-Identifier: Apache-2.0
"""What launches tell a profiler, asked as Triton asks.

As a program, run without TRITON_INTERPRET: asks every launch of every configuration, listens to the
usual ones as a profiler does, and compares Triton's key of each kernel's code with that of the
kernel without metadata. Prints JSON.
"""

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import triton
from triton.compiler import ASTSource
from triton.compiler.compiler import CompiledKernel, LazyDict
from triton.runtime import jit
from triton.runtime.interpreter import GridExecutor, InterpretedFunction


def handed(kernel, grid: tuple, arguments: dict) -> LazyDict:
    """What Triton hands to the hooks of a launch. A profiler's hook calls its get()."""
    function = kernel
    if isinstance(kernel, InterpretedFunction):
        function = SimpleNamespace(
            launch_metadata=kernel.kwargs["launch_metadata"], arg_names=kernel.arg_names
        )
    source = ASTSource.__new__(ASTSource)
    source.fn = function
    name = kernel.fn.__name__
    compiled = SimpleNamespace(
        name=name, metadata=SimpleNamespace(name=name), function=None, src=source,
        _init_handles=lambda: None,
    )  # fmt: skip
    return CompiledKernel.launch_metadata(compiled, grid, 0, *arguments.values())


@contextlib.contextmanager
def interpreted() -> Iterator[list[tuple]]:
    """Collect launches of the interpreter instead of making them: (kernel, grid, arguments)."""
    launches, running = [], InterpretedFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        arguments = {name: given[name] for name in self.arg_names}
        launches.append((self, grid(arguments) if callable(grid) else grid, arguments))
        return running(self, *args, grid=grid, warmup=warmup, **kwargs)

    nothing = mock.patch.object(GridExecutor, "__call__", lambda self, *args, **kwargs: None)
    with nothing, mock.patch.object(InterpretedFunction, "run", run):
        yield launches


def same_code(kernel) -> bool:
    """Whether Triton's key of the code is that of the kernel without metadata."""
    with mock.patch.dict(jit._triton_jit_function_registry):
        return kernel.cache_key == triton.JITFunction(kernel.fn).cache_key


def heard() -> bool:
    """Whether a hook hears of the usual launches what each of them tells, in order."""
    from benchmarks import stand_in
    from benchmarks.launches import registered

    launches = [each for _, made in registered(quick=True) for each in made]
    hook, got = triton.knobs.runtime.launch_enter_hook, []

    def listen(metadata: LazyDict) -> None:
        got.append({k: v for k, v in metadata.get().items() if k != "stream"})

    hook.add(listen)
    try:
        with stand_in.standing_in(compiles=False):
            stand_in.make(launches)
    finally:
        hook.remove(listen)
    told = [handed(each.kernel, each.grid, each.arguments).get() for each in launches]
    return got == [{k: v for k, v in each.items() if k != "stream"} for each in told]


def main() -> None:
    from benchmarks.launches import registered

    kernels, asked, numbers = {}, 0, True
    for _, launches in registered(quick=False):
        for launch in launches:
            found = handed(launch.kernel, launch.grid, launch.arguments).get()
            values = [value for key, value in found.items() if key[:5] in ("bytes", "flops")]
            numbers &= len(values) in (1, 2) and all(type(v) is int and v >= 0 for v in values)
            kernels[found["name"]] = launch.kernel
            asked += 1
    same = {name: same_code(kernel) for name, kernel in kernels.items()}
    print(json.dumps({"asked": asked, "numbers": numbers, "heard": heard(), "same": same}))


if __name__ == "__main__":
    main()
