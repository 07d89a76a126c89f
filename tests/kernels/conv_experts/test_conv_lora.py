# SPDX-License-Identifier: Apache-2.0
"""The Conv-LoRA layer: the published numbers, its options, and what it launches and keeps."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from budgets import all_within_budget, keep
from draws import DEVICE, drawing
from safetensors import safe_open

from samfast.counters import count, saved_bytes
from samfast.functional import conv_experts, conv_lora_linear
from samfast.kernels._common.windows import Windows

from ..expert_gate import cases as gate
from . import cases as experts

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("conv_lora_*.safetensors"))
NAMES = ("x", "lora_A", "lora_B", "w_gate", "w_noise")
BACKENDS = ("torch", "cpu", "triton")


def runnable(backend):
    """None when all of the layer's operations run on this backend, else the sentence why not."""
    return experts.runnable(backend) or (gate.runnable(backend) if backend == "triton" else None)


def golden(path, dtype):
    """The tensors of one file, floating ones in dtype, and its sizes as integers."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).to(DEVICE) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    cast = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    return cast, {k: int(meta[k]) for k in ("N", "H", "W", "experts")} | {
        "scaling": float(meta["scaling"])
    }


def run(path, dtype, backend):
    """[y, loss, gradients of NAMES, of every expert's weight and bias]."""
    t, size = golden(path, dtype)
    experts = [
        torch.stack([t[f"expert.{i}.{kind}"] for i in range(size["experts"])])
        for kind in ("weight", "bias")
    ]
    leaves = [t[name].requires_grad_() for name in NAMES] + [e.requires_grad_() for e in experts]
    x, a, b, w_gate, w_noise, weight, bias = leaves
    y, loss = conv_lora_linear(
        x, t["weight"], t["bias"], a, b, weight, bias, w_gate, w_noise, size["scaling"],
        range(1, size["experts"] + 1), windows=Windows.whole(size["N"], size["H"], size["W"]),
        noise=t.get("noise"), backend=backend,
    )  # fmt: skip
    objective = (y * t["grad_y"]).sum() + loss
    grads = torch.autograd.grad(objective, leaves, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
    return [y, loss, *grads]


def published(path):
    """The same list from the file; an expert that was not chosen has no gradient there."""
    t, size = golden(path, torch.float32)

    def gradient(name):
        return t.get(f"grad.{name}", torch.zeros_like(t[name]))

    experts = [
        torch.stack([gradient(f"expert.{i}.{kind}") for i in range(size["experts"])])
        for kind in ("weight", "bias")
    ]
    return [t["y"], t["moe_loss"], *(gradient(name) for name in NAMES), *experts]


RESULTS = ("y", "loss", *NAMES, "expert_weight", "expert_bias")


QUICK = ("scale2", "scale5", "windows_train")  # for the interpreter, minutes for all files


def published_cases():
    for path in GOLDEN:
        for backend in BACKENDS:
            slow = backend == "triton" and DEVICE.type == "cpu" and path.stem[10:] not in QUICK
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(path, backend, id=f"{path.stem[10:]}-{backend}", marks=marks)


@pytest.mark.slow_on_cpu("triton", "global_eval-torch")
@pytest.mark.parametrize(("path", "backend"), list(published_cases()))
def test_published_numbers(path, backend):
    """The published module's own, and ours, are in the budget of its formula."""
    if reason := runnable(backend):
        pytest.skip(reason)
    stock, exact = (partial(run, path, t, "reference") for t in (torch.float32, torch.float64))
    budget = all_within_budget(published(path), stock, exact, torch.float32, RESULTS)
    keep(budget, run(path, torch.float32, backend), RESULTS)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem[10:])
def test_the_reference_is_what_was_published(path):
    """The worst published number is as near to it in float64 as the worst of it in float32."""
    exact = run(path, torch.float64, "reference")

    def worst(values):
        pairs = [(v.double(), e) for v, e in zip(values, exact, strict=True) if e.any()]
        return max(float((v - e).abs().max() / e.abs().max()) for v, e in pairs)

    idle = [p for p, e in zip(published(path), exact, strict=True) if not e.any()]
    assert not any(p.any() for p in idle)
    assert worst(published(path)) <= 2 * worst(run(path, torch.float32, "reference"))


def test_all_published_files_are_here():
    assert len(GOLDEN) == 13


class Layer:
    """A frozen linear layer with Conv-LoRA; windows are samples."""

    def __init__(self, samples=3, size=14, features=24, rank=3, experts=8, depthwise=False):
        draw = drawing(6, torch.float32)
        out = 3 * features
        self.x = draw(samples, size, size, features).requires_grad_()
        self.weight, self.bias = draw(out, features, divisor=features**0.5), draw(out)
        self.dy = draw(samples, size, size, out)
        self.windows = Windows.whole(samples, size, size)
        self.ratios = tuple(range(1, experts + 1))
        self.noise, self.one = draw(samples, experts), torch.ones((), device=DEVICE)
        shapes = [(rank, features), (out, rank), (experts, rank, 1 if depthwise else rank, 3, 3)]
        shapes += [(experts, rank), (rank, experts), (rank, experts)]
        self.factors = [draw(*shape, divisor=10 / 3).requires_grad_() for shape in shapes]

    def forward(self, backend="auto", **options):
        options = {"noise": self.noise} | options
        return conv_lora_linear(
            self.x, self.weight, self.bias, *self.factors, 2.0, self.ratios, windows=self.windows,
            backend=backend, **options,
        )  # fmt: skip

    def both(self, backend="auto", **options):
        y, loss = self.forward(backend, **options)
        return torch.autograd.grad([y, loss], [self.x, *self.factors], [self.dy, self.one])


def fresh_noise(layer, backend):
    """Forward and backward as a module makes them, the draw of the noise included."""
    return layer.both(backend, noise=torch.randn_like(layer.noise))


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("depthwise", [False, True])
def test_fourteen_launches_and_no_sync(depthwise, capsys):
    if reason := runnable("triton"):
        pytest.skip(reason)
    layer = Layer(samples=2, size=4, depthwise=depthwise)
    counts = count(lambda: fresh_noise(layer, "triton"))
    windows = Layer(samples=8, size=4, depthwise=depthwise)
    literal = count(lambda: fresh_noise(windows, "reference"))
    with capsys.disabled():
        print(
            f"\n  Conv-LoRA layer, forward and backward: {counts.total_launches} launches, "
            f"{counts.total_syncs} syncs; literally {literal.total_launches} launches, "
            f"{literal.total_syncs} syncs for eight windows"
        )
    assert counts.total_launches <= 14, counts.launches
    assert counts.total_syncs == 0
    assert literal.total_launches > 100 and literal.total_syncs > 0


def test_the_native_experts_count_three_launches():
    """One forward and two backward, as their CUDA source makes them."""
    if reason := runnable("cpu"):
        pytest.skip(reason)
    counts = count(lambda: Layer(samples=2, size=4).both("cpu")).launches
    assert counts["conv_experts_forward"] == 1
    assert counts["conv_experts_backward"] == 2


@pytest.mark.slow_on_cpu
def test_no_large_allocation():
    """Nothing much larger than h beside the layer's own x, y and their partial sums."""
    if reason := runnable("triton"):
        pytest.skip(reason)
    layer = Layer(samples=1, size=14, features=3, rank=3)
    windows, (_, _, weight, bias, _, _) = layer.windows, layer.factors
    h = torch.randn(windows.tokens, 3, device=DEVICE)
    options = (list(windows), list(layer.ratios), True, "gelu")
    index = torch.full((1,), 7, dtype=torch.int64, device=DEVICE)
    dz = torch.randn_like(h)

    def call():
        torch.ops.samfast.conv_experts_forward(h, weight, bias, index, *options, "triton")
        torch.ops.samfast.conv_experts_backward(
            dz, None, h, weight, bias, index, *options, None, None, None, [True, True], "triton"
        )

    weights = 8 * (weight.numel() + bias.numel()) * 4
    assert count(call).largest <= max(6 * h.numel() * 4, weights)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_bytes(backend):
    """x, h, z, a choice and r numbers a sample, 2·r·M numbers; the noise is an input."""
    if reason := runnable(backend):
        pytest.skip(reason)
    layer = Layer()
    known = [layer.x, layer.weight, layer.bias, layer.noise, *layer.factors]
    saved = saved_bytes(lambda: layer.forward(backend), known)
    tokens, samples, rank, experts = layer.windows.tokens, layer.windows.samples, 3, 8
    assert saved.hooks == 2 * tokens * rank * 4 + samples * (8 + rank * 4) + 2 * rank * experts * 4


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_not_used_gives_the_gate_zeros(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    layer = Layer(size=4, experts=3)
    y, _ = layer.forward(backend)
    *_, dgate, dnoise = torch.autograd.grad(y, layer.factors, layer.dy)
    assert not dgate.any() and not dnoise.any()
    _, loss = layer.forward(backend)
    da, _, dweight, _, dgate, dnoise = torch.autograd.grad(loss, layer.factors, allow_unused=True)
    assert da.any() and dgate.any() and dnoise.any() and not dweight.any()


def test_options_of_the_reference():
    """Top-2 sums two experts by their gates; the paper's formula has no skip and no GELU."""
    layer = Layer(experts=4)
    plain, _ = layer.forward("reference", noise=None)
    paper, _ = layer.forward(formula="paper", noise=None)
    both, _ = layer.forward(top_k=2, noise=None)
    frozen = (layer.x, layer.weight, layer.bias)

    def literal(dtype):
        """The three, by one expert or the sum of two."""
        x, base, shift, a, b, weight, bias, w_gate, _ = (
            t.detach().to(dtype) for t in (*frozen, *layer.factors)
        )
        h = F.linear(x, a)
        top, order = (h.mean((1, 2)) @ w_gate).topk(2)
        gates = top.softmax(1)

        def expert(k, activation):
            return conv_experts(
                h, weight, bias, order[:, k], layer.ratios, residual=False, activation=activation,
                backend="reference",
            )  # fmt: skip

        mixed = sum(gates[:, k, None, None, None] * expert(k, "gelu") for k in range(2))
        updates = h + expert(0, "gelu"), expert(0, "none"), h + mixed
        return [F.linear(x, base, shift) + 2.0 * F.linear(z, b) for z in updates]

    stock, exact = (partial(literal, t) for t in (torch.float32, torch.float64))
    all_within_budget([plain, paper, both], stock, exact, torch.float32)


@pytest.mark.slow_on_cpu
def test_compile_fullgraph():
    layer = Layer(samples=2, size=4, experts=4)
    compiled = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    wanted = [layer.x, *layer.factors]
    results = []
    for call in (layer.forward, compiled):
        y, loss = call()
        one = loss.new_ones(())
        results.append([y, loss, *torch.autograd.grad([y, loss], wanted, [layer.dy, one])])
    assert all(torch.equal(e, t) for e, t in zip(*results, strict=True))
