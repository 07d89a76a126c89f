# SPDX-License-Identifier: Apache-2.0
"""Blocks whose attention has rotary positions or none, and whose q, k and v are layers apart."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from budgets import all_within_budget

from samfast import backends
from samfast.counters import counting
from samfast.kernels._common.philox import keep_mask
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts.conv_lora import conv_lora_linear, middle_key
from samfast.kernels.lora_linear.reference import lora_linear
from samfast.kernels.sam_block import reference
from samfast.kernels.sam_block.op import sam_block
from samfast.kernels.sam_block.plan import APART, LAYERS, LayerPlan, Plan

D, HEADS, HIDDEN, SIZE = 32, 2, 40, (2, 7, 8)
SCALE, EPS, RATIOS = 0.25, 1e-5, (1, 2)
SEED = torch.tensor([1234])
EXPERTS = middle_key(RATIOS, 0.01, "torch")


class Case(NamedTuple):
    """adapters: by layer its rank, or rank and "experts", or nothing   window: 0 for the map
    dropout: of these layers' adapters"""

    kind: str
    apart: bool
    window: int
    adapters: dict
    halves: bool = False
    drops: bool = False
    bias: bool = True
    dropout: tuple = ()


ALIKE = {"q": 3, "k": 3, "v": 3, "proj": 2, "lin1": 2, "lin2": 4}
CASES = {
    "rope, three alike": Case("rope", True, 4, ALIKE),
    "rope, map, two alike": Case("rope", True, 0, {"q": 3, "v": 3, "lin1": 2}, drops=True),
    "rope, ranks differ": Case("rope", True, 3, {"q": 2, "k": 3}, bias=False),
    "rope, experts": Case("rope", True, 3, {"q": (3, "experts"), "k": 2, "v": (3, "experts")}),
    "rope, packed": Case("rope", False, 3, {"qkv": 4}, halves=True),
    "rope, dropout": Case("rope", True, 0, {"q": 3, "k": 3, "lin1": 3}, dropout=("k", "lin1")),
    "plain, one adapted": Case("plain", True, 5, {"v": 3}, drops=True),
    "plain, packed experts": Case("plain", False, 3, {"qkv": (3, "experts")}),
    "relpos, three alike": Case("relpos", True, 3, ALIKE),
    "relpos, frozen": Case("relpos", True, 4, {}),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Call:
    """One block's tensors by name, float64 at first."""

    def __init__(self, case, dtype=torch.float64, size=SIZE):
        self.size, self.case, self.names = size, case, APART if case.apart else LAYERS
        self.generator = torch.Generator().manual_seed(0)
        sides = (case.window, case.window) if case.window else size[1:]
        self.t = {"x": self.draw(*size, D)}
        self.t |= {f"norm{i}.{n}": 0.3 * self.draw(D) + (n == "weight")
                   for i in (1, 2) for n in ("weight", "bias")}  # fmt: skip
        for name in self.names:
            outputs = {"qkv": 3 * D, "lin1": HIDDEN}.get(name, D)
            inputs = HIDDEN if name == "lin2" else D
            self.t[f"{name}.weight"] = self.draw(outputs, inputs) / inputs**0.5
            if case.bias:
                self.t[f"{name}.bias"] = 0.3 * self.draw(outputs)
            if name in case.adapters:
                self.adapt(name, case.adapters[name], outputs, inputs)
        if case.kind == "relpos":
            self.tables = ["table_h", "table_w"]
            self.t |= {n: self.draw(2 * side - 1, D // HEADS)
                       for n, side in zip(self.tables, sides, strict=True)}  # fmt: skip
        angles = 3 * self.draw(sides[0] * sides[1], D // HEADS // 2)
        self.constant = {"cos": angles.cos(), "sin": angles.sin()}
        self.factors = torch.tensor([[0.0, 1.25], [1.25, 1.25]], dtype=torch.float64)
        self.dy = self.draw(*size, D)
        self.dy = self.dy.to(dtype)
        self.t = {n: t.to(dtype).requires_grad_() for n, t in self.t.items()}
        wide = torch.promote_types(dtype, torch.float32)
        self.constant = {n: t.to(wide) for n, t in self.constant.items()}

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def adapt(self, name, option, outputs, inputs):
        rank, *experts = option if isinstance(option, tuple) else (option,)
        self.t[f"{name}.a"] = self.draw(rank, inputs) / inputs**0.5
        self.t[f"{name}.b"] = self.draw(outputs, rank)
        if experts:
            shapes = {"expert": (2, rank, rank, 3, 3), "shift": (2, rank), "gate": (rank, 2),
                      "noise": (rank, 2)}  # fmt: skip
            self.t |= {f"{name}.{n}": 0.5 * self.draw(*shape) for n, shape in shapes.items()}

    def of(self, name):
        tables = {"relpos": ("table_h", "table_w"), "rope": ("cos", "sin"), "plain": (None, None)}
        if name == "tables":
            every = {**self.t, **self.constant, None: None}
            return [every[n] for n in tables[self.case.kind]]
        return [self.t.get(f"{name}.{n}") for n in ("weight", "bias", "a", "b")]

    def experts(self, name):
        return [self.t[f"{name}.{n}"] for n in ("expert", "shift", "gate", "noise")]

    def plan(self, memory):
        layers = []
        for name in self.names:
            option = self.case.adapters.get(name)
            if option is None:
                layers.append(LayerPlan())
            elif isinstance(option, tuple):
                layers.append(LayerPlan(True, 0.5, middle=EXPERTS, flags=(0, 0), params=4))
            else:
                layers.append(LayerPlan(True, 0.5, 0.25 if name in self.case.dropout else 0.0))
        case = self.case
        return Plan(
            HEADS, case.window, SCALE, (EPS, EPS), "", memory, "", tuple(layers), None, case.kind,
            case.halves, case.apart, case.drops,
        )  # fmt: skip

    def fused(self, memory="fast", backend="torch"):
        tensors = [*self.of("norm1")[:2], *self.of("norm2")[:2], *self.of("tables")]
        for name in self.names:
            tensors += [*self.of(name), SEED if name in self.case.dropout else None]
            if isinstance(self.case.adapters.get(name), tuple):
                tensors += self.experts(name)
        if self.case.drops:
            tensors += [*self.factors.to(self.t["x"].dtype)]
        y, aux = sam_block(self.t["x"], tensors, self.plan(memory), backend)
        assert len(aux) == len(self.names)
        return self.results(y, sum(a for a in aux if a.numel()))

    def layer(self, name, x, losses):
        weight, bias, a, b = self.of(name)
        if a is None:
            return F.linear(x, weight, bias)
        if f"{name}.expert" in self.t:
            y, loss = conv_lora_linear(
                x, weight, bias, a, b, *self.experts(name), 0.5, RATIOS,
                windows=Windows.whole(*x.shape[:3]), backend="reference",
            )  # fmt: skip
            losses.append(loss)
            return y
        if name not in self.case.dropout:
            return lora_linear(x, weight, bias, a, b, 0.5)
        kept = keep_mask(SEED, x[..., 0].numel(), x.shape[-1], 0.25).view(x.shape)
        update = lora_linear(x * kept / 0.75, torch.zeros_like(weight), None, a, b, 0.5)
        return F.linear(x, weight, bias) + update

    def literal(self):
        losses = []
        norms = [
            partial(F.layer_norm, normalized_shape=(D,), weight=w, bias=b, eps=EPS)
            for w, b, *_ in (self.of("norm1"), self.of("norm2"))
        ]
        into, (proj, lin1, lin2) = self.names[:-3], (
            partial(self.layer, name, losses=losses) for name in self.names[-3:]
        )  # fmt: skip

        def qkv(n):
            return torch.cat([self.layer(name, n, losses) for name in into], -1)

        factors = self.factors.to(self.t["x"].dtype) if self.case.drops else None
        y = reference.sam_block(
            self.t["x"], norms[0], qkv, proj, norms[1], lin1, lin2, *self.of("tables"), HEADS,
            self.case.window, SCALE, self.case.kind, self.case.halves, factors,
        )  # fmt: skip
        return self.results(y, sum(losses))

    def results(self, y, loss):
        leaves = {name: t for name, t in self.t.items() if t.requires_grad}
        outputs, towards = [y], [self.dy]
        if isinstance(loss, torch.Tensor):
            outputs, towards = [y, loss], [self.dy, 3.0 * torch.ones_like(loss)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), towards, allow_unused=True)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@EVERY
def test_results_and_gradients_are_the_literal_ones(case):
    exact, ours = Call(case).literal(), Call(case).fused()
    for name, value in ours.items():
        if value is None or exact[name] is None:  # the gate's noise takes no part in eval mode
            found = [t for t in (value, exact[name]) if t is not None]
            assert name.endswith("noise") and not any(t.any() for t in found), name
            continue
        torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("memory", ["balanced", "minimal"])
@EVERY
def test_memory_modes_give_the_same_bits(case, memory):
    kept = Call(case, torch.float32).fused()
    for name, value in Call(case, torch.float32).fused(memory).items():
        assert value is kept[name] is None or torch.equal(value, kept[name]), name


ALL = dict.fromkeys(APART, 3)
PACKED = dict.fromkeys(LAYERS, 3)
missing = backends.triton_missing(torch.device("cpu"))


@pytest.mark.skipif(
    torch.cuda.is_available() or missing is not None, reason=f"nothing is interpreted: {missing}"
)
@pytest.mark.parametrize(
    ("case", "more"),
    [
        pytest.param(Case("relpos", False, 4, PACKED), {}, id="relpos", marks=pytest.mark.slow),
        pytest.param(
            Case("rope", False, 4, PACKED), {"rope_kernel": 2}, id="packed", marks=pytest.mark.slow
        ),
        pytest.param(
            Case("rope", True, 4, ALL),
            {"rope_kernel": 2, "addmm": 2, "mm": 2, "cat": 4, "down_backward_kernel": 1},
            id="apart",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_launches_and_values_on_triton(case, more):
    """As many as a block of SAM 1 has in windows, and one more each way for rope. Three layers take
    two more products each way, and their factors are put together each way. Rank 12 of the three is
    above what norm1's backward makes a gradient of."""

    def call(dtype):
        made = Call(case, dtype, (2, 8, 8))
        for name, t in made.t.items():
            t.requires_grad_(name == "x" or name.endswith((".a", ".b")))
        return made

    half = call(torch.float16)
    with counting() as counts:
        ours = half.fused(backend="triton")
    all_within_budget(ours, call(torch.float16).literal, call(torch.float64).literal, torch.float16)
    assert counts.total_syncs == 0
    assert counts.total_launches == 30 + sum(more.values()), counts.launches
    assert counts.launches["cat"] == 1 + more.get("cat", 0)  # one for the factors of the sums


@pytest.mark.skipif(
    torch.cuda.is_available() or missing is not None, reason=f"nothing is interpreted: {missing}"
)
def test_adapters_of_two_dtypes():
    """Their gradients are cast, which cannot wait for the end of the block."""

    def made(backend):
        call = Call(Case("rope", True, 3, {"q": 2, "v": 2}), torch.float16, (1, 3, 3))
        for name in ("v.a", "v.b"):
            call.t[name] = call.t[name].detach().float()
        for name, t in call.t.items():
            t.requires_grad_(name == "x" or name.endswith((".a", ".b")))
        return call.fused(backend=backend)

    ours, stock = made("triton"), made("torch")
    for name in ("q.a", "q.b", "v.a", "v.b"):
        assert (ours[name] - stock[name]).norm() < 0.02 * stock[name].norm(), name
