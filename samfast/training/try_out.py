# SPDX-License-Identifier: Apache-2.0
"""The backend that was asked for, tried on tiny layers before any data is read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import samfast
from samfast import backends
from samfast.adapters.method import Method
from samfast.integrations import segment_anything

HEAD_DIM = 64  # of a try-out; SAM's are 64 and 80


@contextmanager
def backend_asked_for(
    backend: str, method: Method, fuse: bool, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """Every operation inside runs on ``backend``; ValueError at once when one of them cannot.

    They are tried on tiny layers, so that it fails before the data is read.
    """
    backend = backends.requested(backend)  # SAMFAST_BACKEND in place of auto
    if backend == "auto":
        yield
        return
    before = os.environ.get("SAMFAST_BACKEND")
    os.environ["SAMFAST_BACKEND"] = backend
    try:
        try:
            _try_out(method, fuse, device, dtype)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        yield
    finally:
        if before is None:
            del os.environ["SAMFAST_BACKEND"]
        else:
            os.environ["SAMFAST_BACKEND"] = before


def _try_out(method: Method, fuse: bool, device: torch.device, dtype: torch.dtype) -> None:
    """One forward and backward of the smallest layers that the method's options fit; their random
    numbers are none of the run's."""
    with torch.random.fork_rng():
        _run_smallest_layers(method, fuse, device, dtype)


def _run_smallest_layers(
    method: Method, fuse: bool, device: torch.device, dtype: torch.dtype
) -> None:
    layers = []
    if (smallest := method.smallest_layer()) is not None:
        layer, width = smallest
        layers.append((method.build({"layer": layer.to(device)})["layer"], width))
    if fuse:
        modules = segment_anything.load().modeling.image_encoder
        block = modules.Block(HEAD_DIM, 1, use_rel_pos=True, input_size=(2, 2))
        layers.append((samfast.fuse(block).to(device), HEAD_DIM))
    for layer, width in layers:
        x = torch.zeros(1, 2, 2, width, device=device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            layer(x).sum().backward()
