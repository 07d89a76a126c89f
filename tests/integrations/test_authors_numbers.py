# SPDX-License-Identifier: Apache-2.0
"""Twins of the authors' layers, and these fused, next to numbers of the authors' own modules.

``tests/golden`` has them: inputs, parameters, results and gradients.
"""

from functools import partial
from pathlib import Path

import cobot_twins as cobot
import literal_mtsam as mtsam
import pytest
import safetensors
import torch
from budgets import keep
from literal_wrappers import linear
from torch import nn

import samfast
from samfast.kernels._common.budget import Budget

LORA = {f"linear_{x}_{s}": f"linear_{x}_{s}.weight" for x in "ab" for s in "qv"}
LORA |= {f"head_{s}.{c}": f"FacT_d{d}.{c}_weight" for d, s in ((1, "q"), (2, "v")) for c in "rijk"}
LORA |= {"gamma": "gamma", "qkv.weight": "qkv.weight", "qkv.bias": "qkv.bias"}
ADAPTER = {f"head.{c}": f"FacT_d1.{c}_weight" for c in "rijk"} | {"gamma": "gamma"}
for part, name in (("norm", "adapter_layer_norm_before"), ("down", "down_proj"), ("up", "up_proj")):
    ADAPTER |= {f"{part}.{leaf}": f"{name}.{leaf}" for leaf in ("weight", "bias")}
ADAPTER |= {f"mlp.{leaf}": f"mlp.lin1.{leaf}" for leaf in ("weight", "bias")}
TUCKER = {"core": "td_G", "factor_in": "td_U1", "factor_out": "td_U2", "factor_task": "td_U3"}


def read(name):
    path = Path(__file__).parents[1] / "golden" / f"{name}.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class OneLinear(nn.Module):
    """The MLP that the numbers were made with."""

    def __init__(self, width):
        super().__init__()
        self.lin1, self.lin2, self.act = nn.Linear(width, width), nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.lin1(x)


def lora(tensors, c, p, i):
    outputs, width = tensors[f"block{i}.qkv.weight"].shape
    rank = c.shape[1]
    factors = [linear(*shape) for shape in 2 * ((width, rank), (rank, width))]
    heads = [cobot.QuaternionLinear(rank, rank) for _ in range(2)]
    qkv = nn.Linear(width, outputs)
    return cobot._LoRA_qkv_relation_add(qkv, *factors, c, *heads, p, 2 * i)


def adapter(tensors, c, p, i):
    width, rank = tensors[f"block{i}.up.weight"].shape
    head = cobot.QuaternionLinear(rank, rank)
    return cobot.Adapter_relation(OneLinear(width), c, head, p, i, width, rank).eval()


def of_blocks(tensors, names, make, fuse, dtype):
    """What the file has of three layers that share the relation."""
    c, p = (nn.Parameter(tensors[f"relation_{n}"].clone()) for n in ("coefficients", "matrix"))
    layers = nn.ModuleList([make(tensors, c, p, i) for i in range(3)])
    for i, layer in enumerate(layers):
        state = {name: tensors[f"block{i}.{key}"] for key, name in names.items()}
        layer.load_state_dict(state | {"FacT_c": c, "FacT_p": p})
    layers.to(dtype)
    if fuse:
        samfast.fuse(layers)
        assert all(s.startswith("fused") for s in samfast.report(layers).others.values())
    loss, found = 0.0, {}
    for i, layer in enumerate(layers):
        x = tensors[f"block{i}.x"].to(dtype, copy=True).requires_grad_()
        y = layer(x)
        found |= {f"block{i}.y": y.detach(), f"grad.block{i}.x": x}
        loss = loss + (y * tensors[f"block{i}.grad_y"].to(dtype)).sum()
        found |= {f"grad.block{i}.{key}": layer.get_parameter(n) for key, n in names.items()}
    loss.backward()
    found |= {"grad.relation_coefficients": layers[0].FacT_c}
    found |= {"grad.relation_matrix": layers[0].FacT_p}
    made = {key: t.grad if key.startswith("grad.") else t for key, t in found.items()}
    return {key: t for key, t in made.items() if key in tensors}


def of_tasks(tensors, enabled, fuse, dtype):
    """What the file has of one layer: each task alone, and all in a batch."""
    ranks = dict(zip(("R1", "R2", "R3"), tensors["core"].shape, strict=True))
    config = {**ranks, "task_num": len(tensors["factor_task"]), "scaling": 0.5, "dropout_rate": 0.0}
    outputs, width = tensors["weight"].shape
    layer = mtsam.QKVLinear(width, outputs, list(enabled), config)
    state = {name: tensors[key] for key, name in TUCKER.items()}
    layer.load_state_dict(state | {name: tensors[name] for name in ("weight", "bias")})
    layer.to(dtype)
    if fuse:
        samfast.fuse(layer)
        assert samfast.report(layer).others[""].startswith("fused")
    loss, found = 0.0, {}
    for task in (-1, *range(config["task_num"])):
        key = "all" if task == -1 else f"task{task}"
        x = tensors[f"{key}.x"].to(dtype, copy=True).requires_grad_()
        y = layer(x, task)
        found |= {f"{key}.y": y.detach(), f"grad.{key}.x": x}
        loss = loss + (y * tensors[f"{key}.grad_y"].to(dtype)).sum()
    loss.backward()
    found |= {f"grad.{key}": layer.get_parameter(name) for key, name in TUCKER.items()}
    return {key: t.grad if key.startswith("grad.") else t for key, t in found.items()}


CASES = {
    "cobot_lora": (of_blocks, LORA, lora),
    "cobot_adaptformer": (of_blocks, ADAPTER, adapter),
    "ta_lora_qkv": (of_tasks, (True, True, True)),
    "ta_lora_qv": (of_tasks, (True, False, True)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_authors_numbers(name):
    tensors, (run, *args) = read(name), CASES[name]
    stock = partial(run, tensors, *args, False, torch.float32)
    exact = partial(run, tensors, *args, False, torch.float64)
    budget = Budget(stock, exact, torch.float32)
    given = {key for key in tensors if key.endswith(".y") or key.startswith("grad.")}
    ours = run(tensors, *args, True, torch.float32)
    assert set(ours) == given
    keep(budget, {key: tensors[key] for key in given})
    keep(budget, ours)
