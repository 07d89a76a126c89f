# SPDX-License-Identifier: Apache-2.0
"""Inputs for conv_experts and the backends that run on this machine."""

import dataclasses

import torch
from marks import CUDA

from samfast import backends
from samfast.functional import conv_experts
from samfast.kernels.conv_experts.op import supports

NAMES = ("z", "dh", "dweight", "dbias")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "cpu", "triton", CUDA)
# Those that are fast enough for every case; the interpreter has cases of its own.
WHOLE = ("torch", "triton", "cuda") if DEVICE.type == "cuda" else ("torch", "cpu")


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
        generator = torch.Generator().manual_seed(11)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        experts, rank = len(self.ratios), self.rank
        h = draw(self.samples, self.height, self.width, rank)
        weight = 0.4 * draw(experts, rank, rank // self.groups, 3, 3)
        bias, dz = draw(experts, rank), draw(*h.shape)
        small = weight_dtype or dtype
        leaves = [h.to(DEVICE, dtype), weight.to(DEVICE, small), bias.to(DEVICE, small)]
        return [t.requires_grad_() for t in leaves], dz.to(DEVICE, dtype)

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


def runnable(backend: str) -> str | None:
    """None when the backend runs on this machine's test device, else the sentence why not."""
    if backend == "triton" and (missing := backends.triton_missing(DEVICE)) is not None:
        return missing
    return supports(backend, torch.empty(1, 3, device=DEVICE), torch.empty(8, 3, 3, 3, 3))
