# SPDX-License-Identifier: Apache-2.0
"""The files with numbers of SAM-COBOT's authors: three layers that share a relation."""

import copy
from pathlib import Path

import pytest
import safetensors
import torch
from budgets import all_within_budget

from samfast.modules.cobot import CobotForward, relation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AGREE = 5e-6  # float32 files and a float64 evaluation
LAYERS = 3


def read(name):
    path = Path(__file__).parents[1] / "golden" / f"{name}.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to(DEVICE) for name in file.keys()}  # noqa: SIM118


def relation_of(tensors, dtype):
    _, width, slices = tensors["relation_coefficients"].shape
    return relation(width, slices, torch.empty(0, device=DEVICE, dtype=dtype))


def state_of(tensors, block, published):
    """A layer's state dict; published: the authors' names, by the file's inside a block."""
    state = {name: tensors[f"{block}.{key}"] for key, name in published.items()}
    state["FacT_c"] = tensors["relation_coefficients"]
    state["FacT_p"] = tensors["relation_matrix"]
    return state


def run(layers, tensors, published, dtype):
    """Outputs and gradients of Σ y · grad_y by the file's names; the same by parameter."""
    found, own, loss = {}, [], 0.0
    xs = [tensors[f"block{i}.x"].to(dtype, copy=True).requires_grad_() for i in range(LAYERS)]
    for i, (layer, x) in enumerate(zip(layers, xs, strict=True)):
        y = layer(x)
        found[f"block{i}.y"] = y.detach()
        loss = loss + (y * tensors[f"block{i}.grad_y"].to(dtype)).sum()
    loss.backward()
    CobotForward(layers).close(layers[0], (), None)
    for i, (layer, x) in enumerate(zip(layers, xs, strict=True)):
        own += [found[f"block{i}.y"], x.grad, *(p.grad for _, p in layer.adapter_parameters())]
        found[f"grad.block{i}.x"] = x.grad
        grads = copy.deepcopy(layer)
        for name, parameter in layer.adapter_parameters():
            grads.get_parameter(name).data = parameter.grad
        state = grads.state_dict()
        found |= {f"grad.block{i}.{key}": state[name] for key, name in published.items()}
    found["grad.relation_coefficients"] = layers[0].FacT_c.grad
    found["grad.relation_matrix"] = layers[0].FacT_p.grad
    return found, own


def check(name, layers_of, published, backend, together, monkeypatch):
    """The file's numbers in float64, and the error budget of a backend in float32.

    layers_of(tensors, dtype): the file's layers   together: folded for all of them at once
    """
    tensors = read(name)
    monkeypatch.setenv("SAMFAST_BACKEND", backend)

    def results(dtype):
        layers = layers_of(tensors, dtype)
        if together:
            CobotForward(layers).open(layers[0], ())
        return run(layers, tensors, published, dtype)

    try:
        _, ours = results(torch.float32)
    except RuntimeError as error:
        assert backend in ("triton", "cuda") and "cannot run" in str(error)
        pytest.skip(str(error))
    monkeypatch.setenv("SAMFAST_BACKEND", "reference")
    (named, exact), (_, stock) = results(torch.float64), results(torch.float32)
    given = {name for name in tensors if name.endswith(".y") or name.startswith("grad.")}
    assert len(given) > 20 and given <= set(named)
    for name in given:
        assert (named[name] - tensors[name]).abs().max() <= AGREE * tensors[name].abs().max()
    # Not by the file's names, where a head may be four numbers: of one the error is luck.
    all_within_budget(ours, stock, exact, torch.float32, map(str, range(len(exact))))
