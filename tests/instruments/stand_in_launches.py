# SPDX-License-Identifier: Apache-2.0
"""Every operation under the stand-in driver: its launches as recorded, counted and designed.

A program of its own, because tests import kernels for the interpreter. Prints JSON. With a folder
it fills Triton's cache first, for the little that ``registered`` yields.
"""

import importlib
import json
import sys
from collections import Counter
from functools import partial

import torch
import triton
import triton.language as tl
from triton.runtime import driver as drivers

from benchmarks import launches, offline, stand_in
from samfast import backends
from samfast.counters import counting
from samfast.info import OPERATIONS
from samfast.kernels._common.windows import Windows
from samfast.kernels.lora_linear import triton_kernels
from samfast.kernels.sam_block import costs as sam_block
from samfast.kernels.sam_block.op import sam_block as fused_block
from samfast.kernels.sam_block.plan import LayerPlan, Plan

CPU, HALF = torch.device("cpu"), torch.bfloat16


def registered(quick):
    """As benchmarks.launches has it, of one operation."""
    for name, made in launches.of("hypercomplex")(quick):
        if "factors" in name:
            yield name, made


def example(operation):
    return importlib.import_module(f"samfast.kernels.{operation}.example")


def designed() -> dict[str, int]:
    """Of each operation's example, forward and backward."""
    found = {name: example(name).LAUNCHES for name in OPERATIONS if name != "sam_block"}
    stages = sam_block.stages(Windows(1, 9, 11, 7, 7), 32, 2, 4, 2)
    return found | {"whole block": sum(stage.launches for stage in stages)}


def whole_block():
    """Forward and backward of a fused block with adapters on its four layers, to be called."""
    draw = partial(torch.zeros, dtype=HALF)
    plan = Plan(2, 7, 0.25, (1e-6, 1e-6), "", "fast", "", (LayerPlan(adapted=True),) * 4)
    norms, tables = [draw(32) for _ in range(4)], [draw(13, 16) for _ in range(2)]
    parts, trained = [], []
    for out, features in ((96, 32), (32, 32), (64, 32), (32, 64)):
        factors = draw(4, features).requires_grad_(), draw(out, 4).requires_grad_()
        parts += [draw(out, features), draw(out), *factors, None]
        trained += factors
    x = draw(1, 9, 11, 32).requires_grad_()
    dy, tensors = draw(1, 9, 11, 32), [*norms, *tables, *parts]

    def call():
        y, _ = fused_block(x, tensors, plan, "triton")
        torch.autograd.grad(y, [x, *trained], dy)

    return call


def record(call) -> dict:
    """What one call launches, as the stand-in has it and as the counters have it."""
    before = len(stand_in.current.launches)
    with counting() as counts:
        call()
    made = stand_in.current.launches[before:]
    counted = {name: n for name, n in counts.launches.items() if name.endswith("_kernel")}
    return {
        "recorded": Counter(launch.kernel for launch in made),
        "counted": counted,
        "total": counts.total_launches,
        "streams": sorted({launch.stream for launch in made}),
        "found": sorted({launch.found for launch in made}),
    }


@triton.jit
def planted_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, 0.0, mask=offs < n)


def broken() -> dict[str, str]:
    """What is said of launches that CUDA would refuse, or for which other code would be right."""
    x, sentences = torch.zeros(64), {}
    kernel = planted_kernel[(1,)](x, 64, 32)

    def again(*arguments):
        return partial(kernel.run, 1, 1, 1, 0, None, None, None, None, None, *arguments)

    for name, call in {
        "empty": lambda: planted_kernel[(0,)](x, 64, 32),
        "high": lambda: planted_kernel[(1, 65_536)](x, 64, 32),
        "crowded": lambda: planted_kernel[(1,)](x, 64, 32, num_warps=64),
        "dtype": again(x.half(), 64, 32),
        "odd": again(x[1:], 64, 32),
        "odd number": again(x, 63, 32),
        "constant": again(x, 64, 16),
        "right": again(x, 128, 32),
    }.items():
        try:
            call()
        except stand_in.BrokenRule as error:
            sentences[name] = str(error)
    return sentences


def left() -> list[str]:
    """Launches outside the stand-in, which must not find what it left."""
    devices = [len(k.device_caches) for k in (planted_kernel, triton_kernels.down_kernel)]
    return [str(drivers._active), *map(str, devices), str(backends.triton_missing(CPU))]


def main(folder=None):
    torch.set_num_threads(1)
    found, before = {}, left()
    if folder is not None:
        arguments = [
            "--fill",
            folder,
            "--launches",
            "tests.instruments.stand_in_launches",
            "--jobs",
            "1",
        ]
        assert offline.main(arguments) == 0
    with stand_in.standing_in(90, compiles=False) as standing:
        for name in OPERATIONS:
            found[name] = record(partial(example(name).run, "triton", CPU, HALF))
        block = whole_block()
        standing.stream = 7
        found["whole block"] = record(block)
        sentences = broken()
    told = {"operations": found, "designed": designed(), "broken": sentences}
    print(json.dumps(told | {"before": before, "after": left()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
