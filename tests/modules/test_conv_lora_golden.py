# SPDX-License-Identifier: Apache-2.0
"""ConvLoraLinear gives the numbers of the authors' own module, on every backend that runs here."""

import copy
from functools import partial
from pathlib import Path

import pytest
import safetensors
import torch
from budgets import keep
from draws import DEVICE
from literal_conv_lora import LiteralConvLora

from samfast.backends import NAMES
from samfast.kernels._common.budget import Budget
from samfast.modules import ConvLoraLinear

CASES = sorted((Path(__file__).parents[1] / "golden").glob("conv_lora_*.safetensors"))
EXPERT = "expert.{}.{}"
# The authors' full state-dict names of what the files abbreviate.
FULL = {
    "w_gate": "lora_moe_gating.w_gate",
    "w_noise": "lora_moe_gating.w_noise",
    **{
        EXPERT.format(i, kind): f"lora_moe_experts.{i}.0.{kind}"
        for i in range(8)
        for kind in ("weight", "bias")
    },
}


def read(path):
    with safetensors.safe_open(path, framework="pt") as file:
        options = file.metadata()
        tensors = {name: file.get_tensor(name).to(DEVICE) for name in file.keys()}  # noqa: SIM118
    return tensors, options


def build(tensors, options):
    module = ConvLoraLinear(
        int(options["D"]),
        int(options["O"]),
        int(options["r"]),
        float(options["alpha"]),
        int(options["experts"]),
    )
    state = {"lora_moe_gating.mean": torch.zeros(1), "lora_moe_gating.std": torch.ones(1)}
    for name in ("weight", "bias", "lora_A", "lora_B", *FULL):
        if name in tensors:
            state[FULL.get(name, name)] = tensors[name]
    module.load_state_dict(state, strict=True)
    return module.to(DEVICE).train(options["train"] == "True")


def run(module, tensors, call):
    """Results and all gradients of sum(y · grad_y) + moe_loss, by the files' names."""
    x = tensors["x"].to(module.weight.dtype).requires_grad_()
    y, loss = call(x)
    trained = {n: p for n, p in module.named_parameters() if n not in ("weight", "bias")}
    objective = (y * tensors["grad_y"]).sum() + loss
    grads = torch.autograd.grad(objective, [x, *trained.values()], materialize_grads=True)
    found = {"y": y, "moe_loss": loss}
    for name, grad in zip(["x", *trained], grads, strict=True):
        if name.startswith("expert_"):
            kind = name.removeprefix("expert_")
            found |= {f"grad.{EXPERT.format(i, kind)}": part for i, part in enumerate(grad)}
        else:
            found[f"grad.{name}"] = grad
    return found


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.gpu("cuda", "global_eval-triton", "rect_eval-triton")  # minutes in the interpreter
@pytest.mark.slow_on_cpu("triton", "reference")
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "triton", "cuda"])
@pytest.mark.parametrize(
    "path", CASES, ids=[path.stem.removeprefix("conv_lora_") for path in CASES]
)
def test_golden(path, backend, monkeypatch):
    tensors, options = read(path)
    module = build(tensors, options)
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    for choice in module.backends().values():
        if choice not in NAMES:
            pytest.skip(choice)
    index, noise = tensors["expert_index"], tensors.get("noise")
    ours = run(module, tensors, lambda x: module(x, noise=noise, return_aux=True))
    forced = module(tensors["x"], noise=noise, expert_index=index)
    assert torch.equal(ours["y"], forced), "other experts were chosen"

    def literal(dtype):
        twin = LiteralConvLora(copy.deepcopy(module)).to(dtype).train(module.training)
        return run(twin, tensors, lambda x: twin(x, noise, index))

    stock, exact = (partial(literal, dtype) for dtype in (torch.float32, torch.float64))
    budget = Budget(stock, exact, torch.float32)
    given = {name: tensors[name] for name in ours if name in tensors}
    assert {"y", "moe_loss", "grad.x"} <= set(given)
    for name in set(ours) - set(given):  # the authors give no gradient where it is zero
        assert not ours[name].any(), name
    keep(budget, given, some=True)
    keep(budget, ours)


def test_all_golden_cases_are_here():
    assert len(CASES) == 13
