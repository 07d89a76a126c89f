# SPDX-License-Identifier: Apache-2.0
"""Inputs for conv_experts and the backends that run on this machine."""

import dataclasses

import torch
from draws import DEVICE, drawing
from marks import CUDA

from samfast.functional import conv_experts, conv_lora_linear
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import example

from ..operation import Operation, runnable_by

NAMES = ("z", "dh", "dweight", "dbias")
BACKENDS = ("torch", "cpu", "triton", CUDA)
# Those that are fast enough for every case; the interpreter has cases of its own.
WHOLE = ("torch", "triton", "cuda") if DEVICE.type == "cuda" else ("torch", "cpu")
runnable = runnable_by(example)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; tensors are drawn from a seed, in float64. index None routes samples in turn."""

    samples: int = 3
    height: int = 14
    width: int = 14
    rank: int = 3
    ratios: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    depthwise: bool = False
    index: tuple[int, ...] | None = None
    residual: bool = True
    activation: str = "gelu"

    @property
    def id(self):
        name = f"{self.samples}x{self.height}x{self.width}-r{self.rank}-M{len(self.ratios)}"
        name += f"-e{self.index[0]}" if self.index else ""
        name += "-depthwise" if self.depthwise else ""
        name += "" if self.residual else "-noskip"
        return name + ("" if self.activation == "gelu" else f"-{self.activation}")

    @property
    def groups(self):
        return self.rank if self.depthwise else 1

    def choices(self):
        index = self.index or tuple(n % len(self.ratios) for n in range(self.samples))
        return torch.tensor(index, dtype=torch.int64, device=DEVICE)

    def tensors(self, dtype, weight_dtype=None):
        """h, weight, bias as leaves that want gradients, and dz."""
        draw, experts, rank = drawing(11, weight_dtype or dtype), len(self.ratios), self.rank
        h = draw(self.samples, self.height, self.width, rank, dtype=dtype)
        weight = draw(experts, rank, rank // self.groups, 3, 3, divisor=2.5)
        bias, dz = draw(experts, rank), draw(*h.shape, dtype=dtype)
        return [t.requires_grad_() for t in (h, weight, bias)], dz

    def run(self, dtype, backend, weight_dtype=None):
        """[z, dh, dweight, dbias]."""
        leaves, dz = self.tensors(dtype, weight_dtype)
        z = self.call(leaves, backend)
        grads = torch.autograd.grad(z, leaves, dz, materialize_grads=True)  # none without samples
        return [z, *grads]

    def call(self, leaves, backend):
        return conv_experts(
            *leaves, self.choices(), self.ratios, residual=self.residual,
            activation=self.activation, groups=self.groups, backend=backend,
        )  # fmt: skip


SMALL = Case(samples=2, height=3, width=5, rank=2, ratios=(1, 3))


def operation(case, way=""):
    index = case.choices()

    def call(tensors, backend):
        z = conv_experts(
            *tensors, index, case.ratios, residual=case.residual, activation=case.activation,
            groups=case.groups, backend=backend,
        )  # fmt: skip
        return [z]

    return Operation(
        "conv_experts",
        way,
        lambda dtype: case.tensors(dtype)[0],
        call,
        runnable,
        ("torch", "cpu", "triton", "cuda"),
        kept=lambda tensors, wanted: (tensors[0].nbytes + index.nbytes, 0),
        apart=((0,), (1, 2)),  # those of an expert are made together
    )


def at_borders(ratios, depthwise):
    """Every pixel is at one."""
    sizes = dict(samples=2, height=2, width=3, rank=2, index=(0, 1))
    case = Case(ratios=ratios, depthwise=depthwise, **sizes)
    return operation(case, "borders" + case.id)


WINDOWS, RATIOS = Windows(1, 4, 3, 3, 3), (1, 2, 3)
NOISE = drawing(13, torch.float32)(WINDOWS.samples, len(RATIOS))


def layer_tensors(dtype):
    """x, lora_a, lora_b, the experts' weight and bias, w_gate and w_noise; then weight and bias."""
    draw, rank, experts = drawing(12, dtype), 2, len(RATIOS)
    made = [draw(1, 4, 3, 6), draw(rank, 6, divisor=2.5), draw(8, rank)]
    made += [draw(experts, rank, rank, 3, 3, divisor=3), draw(experts, rank)]
    return [*made, draw(rank, experts), draw(rank, experts), draw(8, 6, divisor=2.5), draw(8)]


def layer(tensors, backend):
    """A Conv-LoRA layer in windows with padding: y, its loss and z of the padding."""
    x, a, b, expert_weight, expert_bias, w_gate, w_noise, weight, bias = tensors
    return conv_lora_linear(
        x, weight, bias, a, b, expert_weight, expert_bias, w_gate, w_noise, 0.5, RATIOS,
        windows=WINDOWS, noise=NOISE, return_pads=True, backend=backend,
    )  # fmt: skip


LAYER = Operation(
    "lora_linear",
    "conv-lora",
    layer_tensors,
    layer,
    runnable,
    ("torch", "cpu", "triton"),
    apart=((0,), (1,), (2,), (3, 4), (7,), (8,)),
    autocast="result",
)
OPERATIONS = [operation(SMALL), LAYER]
FINITE = [at_borders(r, d) for r in ((1, 2), (3, 4), (5, 8)) for d in (False, True)]
FINITE += [LAYER]
