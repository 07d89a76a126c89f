# SPDX-License-Identifier: Apache-2.0
"""Inputs for the block's operators, and the literal block on the same tensors."""

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from draws import DEVICE, drawing

from samfast.kernels._common.philox import keep_mask
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts.conv_lora import COEFFICIENT, conv_lora_linear, middle_key
from samfast.kernels.lora_linear.reference import lora_linear
from samfast.kernels.sam_block import example, reference, sam_block
from samfast.kernels.sam_block.plan import HEAD, LAYERS, LayerPlan, Plan

from ..operation import Operation, runnable_by

BACKENDS = ("torch", "auto")
runnable = runnable_by(example)
FACTORS = ("weight", "bias", "lora_a", "lora_b", "seed")
EXPERTS = ("expert_weight", "expert_bias", "w_gate", "w_noise", "noise", "expert_index")
RATIOS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Case:
    """One block; tensors are drawn from a seed, in float64.

    window: 0 for one global map   adapters: which layers have a LoRA of rank 3
    sliced: qkv's is on q and v   experts: qkv's is a Conv-LoRA   narrow: dtype of the products
    """

    batch: int = 2
    height: int = 6
    width: int = 7
    window: int = 4
    dim: int = 32
    heads: int = 2
    adapters: tuple[str, ...] = LAYERS
    sliced: bool = False
    experts: bool = False
    dropout: float = 0.0
    bias: bool = True
    memory: str = "fast"

    scaling, scale, eps, rank = 0.5, 0.3, (1e-6, 1e-5), 3

    @property
    def id(self):
        name = f"{self.batch}x{self.height}x{self.width}-win{self.window}"
        name += f"-{'+'.join(self.adapters) or 'frozen'}"
        for flag in ("sliced", "experts", "dropout"):
            name += f"-{flag}" if getattr(self, flag) else ""
        return name + ("" if self.bias else "-nobias")

    @property
    def windows(self):
        sides = (self.window,) * 2 if self.window else (self.height, self.width)
        return Windows(self.batch, self.height, self.width, *sides)

    @property
    def plan(self):
        layers = []
        for name in LAYERS:
            layer = LayerPlan()
            if name in self.adapters:
                layer = LayerPlan(True, self.scaling, self.dropout)
            if name == "qkv" and self.sliced:
                layer = layer._replace(starts=(0, 2 * self.dim), own=True)
            if name == "qkv" and self.experts:
                key = middle_key(RATIOS, COEFFICIENT, "auto")
                layer = layer._replace(middle=key, flags=(1, 1), params=len(EXPERTS))
            layers.append(layer)
        return Plan(
            self.heads, self.window, self.scale, self.eps, "", self.memory, "", tuple(layers)
        )

    @property
    def names(self):
        """Of the tensors, in their order; "" where there is none or it takes no gradient."""
        names = list(HEAD)
        for layer in LAYERS:
            for factor in FACTORS:
                absent = factor == "seed" or (factor == "bias" and not self.bias)
                absent |= factor.startswith("lora") and layer not in self.adapters
                names.append("" if absent else f"{layer}.{factor}")
            if layer == "qkv" and self.experts:
                names += [f"{layer}.{name}" for name in EXPERTS[:4]] + ["", ""]
        return names

    def tensors(self, dtype, small=None):
        """x and the tensors of the operator, those with a name as leaves that want gradients;
        dy. small: dtype of all but x and the weights."""
        draw = drawing(7, small or dtype)
        dim, size = self.dim, (self.batch, self.height, self.width)
        x, dy = (draw(*size, dim, dtype=dtype) for _ in range(2))
        tensors = [draw(dim) for _ in range(4)]
        tensors += [draw(2 * n - 1, dim // self.heads, divisor=2) for n in self.windows[3:]]
        shapes = {"qkv": (3 * dim, dim), "proj": (dim, dim)}
        shapes |= {"lin1": (2 * dim, dim), "lin2": (dim, 2 * dim)}
        for name, (outputs, inputs) in shapes.items():
            root = inputs**0.5
            tensors.append(draw(outputs, inputs, divisor=root, dtype=dtype))
            tensors.append(draw(outputs) if self.bias else None)
            if name not in self.adapters:
                tensors += [None] * 3
                continue
            sliced = name == "qkv" and self.sliced
            tensors.append(draw((2 if sliced else 1) * self.rank, inputs, divisor=root))
            tensors.append(draw(2 * dim if sliced else outputs, self.rank))
            seed = torch.tensor([1000 + len(tensors)], device=DEVICE)
            tensors.append(seed if self.dropout else None)
            if name == "qkv" and self.experts:
                count, samples = len(RATIOS), self.windows.samples
                tensors += [draw(count, self.rank, self.rank, 3, 3, divisor=3)]
                tensors += [draw(count, self.rank), draw(self.rank, count), draw(self.rank, count)]
                tensors.append(draw(samples, count, dtype=torch.float32))
                tensors.append(torch.arange(samples, device=DEVICE) % count)
        for t, name in zip(tensors, self.names, strict=True):
            if name:
                t.requires_grad_()
        return x.requires_grad_(), tensors, dy

    def call(self, x, tensors, backend="auto"):
        """y and the losses of the layers that have one."""
        if backend == "reference":
            return self.literal(x, tensors)
        y, aux = sam_block(x, tensors, self.plan, backend)
        return y, [a for a in aux if a.numel()]

    def literal(self, x, tensors):
        head, parts = self.plan.split(tensors)
        whole, losses = Windows.whole(self.batch, self.height, self.width), []

        def norm(which):
            weight, bias = head[2 * which : 2 * which + 2]
            return lambda t: F.layer_norm(t, t.shape[3:], weight, bias, self.eps[which])

        def layer(name, n):
            weight, bias, lora_a, lora_b, seed, *experts = parts[name]
            if name not in self.adapters:
                return F.linear(n, weight, bias)
            update = partial(lora_linear, slices=None)
            if name == "qkv" and self.sliced:
                update = partial(lora_linear, slices=((0, self.dim), (2 * self.dim, 3 * self.dim)))
            rows = n
            if self.dropout:  # its masks run through the image, whatever a layer sees of it
                keep = keep_mask(seed, whole.tokens, n.shape[3], self.dropout).to(n.dtype)
                seen = self.windows if name in ("qkv", "proj") else whole
                rows = n * seen.cut(keep) / (1.0 - self.dropout)
            if not experts:
                low = update(rows, 0 * weight, None, lora_a, lora_b, self.scaling)
                return F.linear(n, weight, bias) + low
            *given, noise, index = experts
            low, loss = conv_lora_linear(
                rows, 0 * weight, None, lora_a, lora_b, *given, self.scaling, RATIOS,
                windows=Windows.whole(*n.shape[:3]), noise=noise, expert_index=index,
                backend="reference",
            )  # fmt: skip
            losses.append(loss)
            return F.linear(n, weight, bias) + low

        qkv, proj, lin1, lin2 = (partial(layer, name) for name in LAYERS)
        y = reference.sam_block(
            x, norm(0), qkv, proj, norm(1), lin1, lin2, *head[4:], self.heads, self.window,
            self.scale,
        )  # fmt: skip
        return y, losses

    def run(self, dtype, backend, small=None):
        """{"y", "dx", "loss" with experts, the gradient of every tensor that has a name}."""
        x, tensors, dy = self.tensors(dtype, small)
        y, losses = self.call(x, tensors, backend)
        named = {n: t for n, t in zip(self.names, tensors, strict=True) if n}
        total = (y * dy).sum() + sum(30 * loss for loss in losses)
        leaves = [x, *named.values()]
        dx, *grads = torch.autograd.grad(total, leaves, materialize_grads=True)
        result = {"y": y.detach(), "dx": dx, **dict(zip(named, grads, strict=True))}
        return result | ({"loss": losses[0].detach()} if losses else {})


def operation(case, way, backends):
    """x and the tensors with a name; the others are the same in every call."""

    others = case.tensors(torch.float32)[1]

    def tensors(dtype):
        x, tensors, _ = case.tensors(dtype)
        return [x, *(t for t, name in zip(tensors, case.names, strict=True) if name)]

    def call(leaves, backend):
        x, *named = leaves
        given = iter(named)
        changed = [next(given) if name else t for t, name in zip(others, case.names, strict=True)]
        y, losses = case.call(x, changed, backend)
        return [y, *(30 * loss for loss in losses)]

    return Operation("sam_block", way, tensors, call, runnable, backends, apart=())


WINDOWS = Case(batch=1, height=3, width=2, window=2, dim=16, heads=1, experts=True, dropout=0.2)
MAP = Case(batch=1, height=2, width=3, window=0, dim=16, heads=1, sliced=True)
UNEVEN = Case(batch=1, experts=True, dropout=0.2, heads=1, dim=16)
OPERATIONS = [
    operation(dataclasses.replace(MAP, memory="balanced"), "balanced", ("torch",)),
    operation(UNEVEN, "fast", ("auto",)),
    operation(dataclasses.replace(WINDOWS, memory="minimal"), "minimal", ("torch", "auto")),
]
FINITE = [operation(WINDOWS, "windows", ("torch",)), operation(MAP, "map", ("torch",))]
