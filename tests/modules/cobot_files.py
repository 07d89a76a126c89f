# SPDX-License-Identifier: Apache-2.0
"""The files with numbers of SAM-COBOT's authors: three layers that share a relation."""

import copy
from pathlib import Path

import pytest
import safetensors
import torch
from budgets import keep
from draws import DEVICE
from stock_runs import by_reference

from samfast.kernels._common.budget import Budget
from samfast.modules.cobot import CobotForward, relation

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
    """Outputs and gradients of Σ y · grad_y by the file's names."""
    found, loss = {}, 0.0
    xs = [tensors[f"block{i}.x"].to(dtype, copy=True).requires_grad_() for i in range(LAYERS)]
    for i, (layer, x) in enumerate(zip(layers, xs, strict=True)):
        y = layer(x)
        found[f"block{i}.y"] = y.detach()
        loss = loss + (y * tensors[f"block{i}.grad_y"].to(dtype)).sum()
    loss.backward()
    CobotForward(layers).close(layers[0], (), None)
    for i, (layer, x) in enumerate(zip(layers, xs, strict=True)):
        found[f"grad.block{i}.x"] = x.grad
        grads = copy.deepcopy(layer)
        for name, parameter in layer.adapter_parameters():
            grads.get_parameter(name).data = parameter.grad
        state = grads.state_dict()
        found |= {f"grad.block{i}.{key}": state[name] for key, name in published.items()}
    found["grad.relation_coefficients"] = layers[0].FacT_c.grad
    found["grad.relation_matrix"] = layers[0].FacT_p.grad
    return found


def check(name, layers_of, published, backend, together, monkeypatch):
    """The file's numbers, and those of a backend, in the error budget of float32.

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
        ours = results(torch.float32)
    except RuntimeError as error:
        assert backend in ("triton", "cuda") and "cannot run" in str(error)
        pytest.skip(str(error))
    stock, exact = (by_reference(results, dtype) for dtype in (torch.float32, torch.float64))
    budget = Budget(stock, exact, torch.float32)
    given = {n: t for n, t in tensors.items() if n.endswith(".y") or n.startswith("grad.")}
    assert len(given) > 20
    keep(budget, given)
    keep(budget, ours)
