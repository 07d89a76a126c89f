# SPDX-License-Identifier: Apache-2.0
"""Kernels whose results are right and whose machine code is not, as a module of launches.

Each is one of samfast's with a line of its source or a tile changed.
"""

import dataclasses
import importlib
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks import launches
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import launches as of_attention
from samfast.kernels.relpos_attention import tiling
from samfast.kernels.sam_block import launches as of_block

FOLDER = tempfile.TemporaryDirectory()
sys.path.insert(0, FOLDER.name)
BF16 = torch.bfloat16


def changed(launch, *changes):
    """The launch with its kernel's source changed; each change (old, new), old there once."""
    kernel = launch.kernel
    text = Path(sys.modules[kernel.fn.__module__].__file__).read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    name = f"planted_{len(list(Path(FOLDER.name).glob('*.py')))}"
    Path(FOLDER.name, f"{name}.py").write_text(text, encoding="utf-8")
    module = importlib.import_module(name)
    return dataclasses.replace(launch, kernel=getattr(module, kernel.fn.__name__))


def only(found, stage):
    (launch,) = (launch for launch in found if launch.kernel.fn.__name__ == f"{stage}_kernel")
    return launch


def attention(stage, windows, head_dim, tile=None):
    """A stage of attention on sm_90, with its tile or another."""
    sizes = tiling._sizes
    if tile:
        tiling._sizes = lambda name, asked, *rest: (
            tile if asked == stage else sizes(name, asked, *rest)
        )
    try:
        with of_attention.tiles_of("sm_90"):
            call = partial(of_attention.run, windows, 16, head_dim, BF16)
            found = launches.recorded({"sm_90": call})
    finally:
        tiling._sizes = sizes
    return only(found, stage)


def registered(quick):
    """quick: the cheapest one"""
    gelu = next(
        launch
        for launch in launches.recorded(partial(of_block.run, 1280, 4, BF16, BF16))
        if launch.kernel.fn.__name__ == "gelu_kernel"
    )
    value = "wide * share, 0.0).to(u.dtype)"
    product = "tl.dot(g, a.to(g.dtype), input_precision=PRECISION)"
    at = "offs_n[None, :], g, inside)\n        if DOWN"
    yield "needless erf", [changed(gelu, (value, f"tl.math.erf(wide + 1.0) * {value}"))]
    if quick:
        return
    exact = 'tl.dot(g.to(tl.float32), a.to(tl.float32), input_precision="ieee")'
    yield "a product of rows by FMA", [changed(gelu, (product, exact))]
    divided = "(offs_n[None, :] + rows[:, None].to(tl.int32)) // ranks + " + at
    yield "needless division", [changed(gelu, (at, divided))]

    windows, whole = Windows(4, 64, 64, 14, 14), Windows.whole(4, 64, 64)
    yield "dq by columns", [attention("dq", windows, 80, [64, 32, 8, 2])]
    yield "dkv by columns", [attention("dkv", windows, 80, [64, 64, 8, 2])]
    yield "dkv by HMMA", [attention("dkv", whole, 64, [16, 32, 4, 2])]
    forward = attention("forward", windows, 64)
    product = "acc = tl.dot(p, v, acc, input_precision=PRECISION)"
    exact = product.replace("dot(p, v", "dot(p.to(tl.float32), v.to(tl.float32)")
    yield "a product of attention by FMA", [changed(forward, (product, exact))]
    both = "column, delta = two_rows(rel_h_ptr + before, delta_ptr + before, token, live)"
    each = (
        "column = tl.load(rel_h_ptr + before + token, live, other=0.0)\n"
        "            delta = tl.load(delta_ptr + before + token, live, other=0.0)"
    )
    yield "two loads of few elements", [changed(attention("dkv", whole, 80), (both, each))]
