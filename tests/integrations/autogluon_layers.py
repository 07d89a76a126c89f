# SPDX-License-Identifier: Apache-2.0
"""Layers of AutoGluon's classes, or of their twin's, and what Conv-LoRA is in float64."""

import importlib.util
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

MODULE = "autogluon.multimodal.models.adaptation_layers"
TWIN = Path(__file__).with_name("literal_autogluon.py")
REAL = pytest.param("real", marks=pytest.mark.slow)
WIDTH, RANK, EXPERTS = 32, 3, 8


def loaded(file, monkeypatch):
    """The classes of a file as AutoGluon's own; the packages above are empty."""
    name = MODULE
    while "." in name:
        name = name.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    spec = importlib.util.spec_from_file_location(MODULE, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, MODULE, module)
    spec.loader.exec_module(module)
    return module


def downloaded(folder):
    """AutoGluon's file, from its wheel alone."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    command += [str(folder), "autogluon.multimodal"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = [*folder.glob("autogluon*.whl")]
    if done.returncode or not wheels:
        pytest.skip("pip cannot download autogluon.multimodal here")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return wheel.extract(MODULE.replace(".", "/") + ".py", folder)


def layer(classes, **options):
    """A layer as after training; the same at every call."""
    torch.manual_seed(0)
    options = {"r": RANK, "lora_alpha": 6, "conv_lora_expert_num": EXPERTS, **options}
    made = classes.ConvLoRALinear(WIDTH, 3 * WIDTH, **options)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.3)
            if "w_gate" in name:
                parameter.mul_(20)
    return made


def maps(samples=12):
    return torch.randn(samples, 5, 6, WIDTH, generator=torch.Generator().manual_seed(5))


def rows():
    return maps()[:, :, :5].flatten(1, 2)


def run(module, x, seed=3, call=None):
    """{"y", "loss", "dx", every trained parameter's gradient} of sum(y · dy) + 50 · loss."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    y, loss = (call or module)(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    total = (y * dy).sum() + 50 * loss.to(y.dtype)
    grads = torch.autograd.grad(total, [x, *trained.values()], materialize_grads=True)
    names = ["y", "loss", "dx", *trained]
    return dict(zip(names, [y.detach(), loss.detach(), *grads], strict=True))


def exact(module, x):
    """The same as ``run`` gives, by the formulas in float64 on the layer's tensors."""
    double = {n: p.detach().double() for n, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        double[name].requires_grad_(parameter.requires_grad)
    holder = _Named(double)
    training = module.training
    return run(holder, x.double(), call=lambda x: _formula(double, x, module.scaling, training))


class _Named:
    def __init__(self, parameters):
        self.parameters = parameters

    def named_parameters(self):
        return self.parameters.items()


def _formula(given, x, scaling, training):
    gate = {name: given[f"lora_moe_gating.{name}"] for name in ("w_gate", "w_noise")}
    experts, shape = gate["w_gate"].shape[1], x.shape
    y = F.linear(x, given["weight"], given["bias"])
    h = F.linear(x, given["lora_A"])
    if x.dim() == 3:
        h = h.unflatten(1, (round(shape[1] ** 0.5), -1))
    pooled = h.mean((1, 2))
    clean = logits = pooled @ gate["w_gate"]
    if training:
        spread = F.softplus(pooled @ gate["w_noise"]) + 0.01
        logits = clean + torch.randn(clean.shape).double() * spread  # drawn in float32
    top, index = logits.topk(2, dim=1)  # of equals as torch has them
    importance = F.one_hot(index[:, 0], experts).double().sum(0)
    load = importance
    if training:
        bar = torch.where(logits > top[:, 1:], top[:, 1:], top[:, :1])
        load = torch.special.ndtr((clean - bar) / spread).sum(0)
    loss = 0.01 * sum(v.var() / (v.mean() ** 2 + 1e-10) for v in (importance, load))
    made = []
    for z, e in zip(h.permute(0, 3, 1, 2), index[:, 0].tolist(), strict=True):
        u = z = z[None]
        kernel, bias = (given[f"lora_moe_experts.{e}.0.{name}"] for name in ("weight", "bias"))
        if e > 0:
            u = F.interpolate(z, scale_factor=e + 1, mode="bicubic")
        v = F.gelu(F.conv2d(u, kernel, bias, padding=1))
        made.append(z + (v if e == 0 else F.interpolate(v, size=z.shape[2:], mode="bicubic")))
    z = torch.cat(made).permute(0, 2, 3, 1).reshape(*shape[:-1], -1)
    return y + scaling * F.linear(z, given["lora_B"]), loss
