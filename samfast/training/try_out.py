# SPDX-License-Identifier: Apache-2.0
"""The backend that was asked for, tried on tiny layers before any data is read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

import samfast
from samfast import backends
from samfast.integrations import segment_anything
from samfast.modules.methods import Method

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
    modules = segment_anything.load().modeling.image_encoder
    if not isinstance(method, samfast.DecoderOnly):
        layer, width = _smallest_layer(method, modules.MLPBlock)
        layers.append((method.build({"layer": layer.to(device)})["layer"], width))
    if fuse:
        block = modules.Block(HEAD_DIM, 1, use_rel_pos=True, input_size=(2, 2))
        layers.append((samfast.fuse(block).to(device), HEAD_DIM))
    for layer, width in layers:
        x = torch.zeros(1, 2, 2, width, device=device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            layer(x).sum().backward()


def _smallest_layer(method: Method, mlp: type[nn.Module]) -> tuple[nn.Module, int]:
    """A layer that the method can adapt, and its number of inputs."""
    if isinstance(method, samfast.AdaptFormer):
        width = max(16, method.bottleneck)
        return mlp(width, width), width
    rank = max(method.ranks) if hasattr(method, "ranks") else method.rank
    width = max(16, rank) * getattr(method, "n", 1)
    return nn.Linear(width, 3 * width), width
