# SPDX-License-Identifier: Apache-2.0
"""The engine's middle-map protocol: a map with parameters, an aux loss and r_in ≠ r_out."""

import dataclasses
from functools import partial

import pytest
import torch
from budgets import all_within_budget
from draws import DEVICE

from samfast.kernels._common import middle
from samfast.kernels.lora_linear.op import low_rank_linear

from .cases import runnable


@middle.register
@dataclasses.dataclass(frozen=True)
class MatrixMap:
    """f(h) = h K with aux = power · mean(h²); geometry is (tokens,), checked."""

    power: float
    zero_preserving = True

    def forward(self, h, geometry, matrix):
        assert list(geometry) == [h.shape[0]]
        return (
            h @ matrix.to(h.dtype),
            self.power * h.float().square().mean(),
            middle.no_pads(h),
            [h.clone()],
        )

    def backward(self, dz, daux, dz_pad, saved, params, geometry, needs):
        (h,), (matrix,) = saved, params
        dh = dz @ matrix.t().to(dz.dtype) if needs[0] else None
        if daux is not None and needs[0]:
            dh = dh + (daux * 2.0 * self.power / h.numel() * h.float()).to(dh.dtype)
        return dh, [(h.t() @ dz).to(matrix.dtype) if needs[1] else None]


@middle.register
@dataclasses.dataclass(frozen=True)
class AwkwardMap(MatrixMap):
    """The same numbers in another layout, or in float32 whatever h is."""

    wide: bool = False

    def _awkward(self, t):
        return t.float() if self.wide else t.t().contiguous().t()

    def forward(self, h, geometry, matrix):
        z, *rest = super().forward(h, geometry, matrix)
        return self._awkward(z), *rest

    def backward(self, dz, *rest):
        dh, grads = super().backward(dz, *rest)
        return self._awkward(dh), grads


def literal(x, weight, bias, a, b, matrix, power):
    h = x @ a.t()
    y = x @ weight.t() + bias + 0.5 * (h @ matrix) @ b.t()
    return y, power * h.square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "kind",
    [("MatrixMap", 0.3), ("AwkwardMap", 0.3), ("AwkwardMap", 0.3, True)],
    ids=["plain", "transposed", "wide"],
)
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_a_map_with_parameters_and_an_aux_loss(backend, kind, dtype):
    if reason := runnable(backend):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    sizes = [(11, 20), (30, 20), (30,), (3, 20), (30, 5), (3, 5)]
    given = [torch.randn(*s, generator=generator, dtype=torch.float64).to(DEVICE) for s in sizes]
    dy = torch.randn(11, 30, generator=generator, dtype=torch.float64).to(DEVICE)
    key = middle.key_of(*kind)

    def run(dtype, by_hand=True):
        leaves = [t.to(dtype).requires_grad_() for t in given]
        if by_hand:
            y, aux = literal(*leaves, 0.3)
        else:
            y, aux, _ = low_rank_linear(
                *leaves[:5], 0.5, middle=key, geometry=[11], params=leaves[5:], backend=backend
            )
        grads = torch.autograd.grad([y, aux], leaves, [dy.to(dtype), torch.ones_like(aux)])
        return [y, aux, *grads]

    stock, exact = (partial(run, t) for t in (dtype, torch.float64))
    names = ["y", "aux", "dx", "dweight", "dbias", "dlora_a", "dlora_b", "dmatrix"]
    all_within_budget(run(dtype, by_hand=False), stock, exact, dtype, names)


def test_a_backward_through_aux_alone():
    x = torch.randn(11, 20, requires_grad=True)
    a, b, matrix = torch.randn(3, 20, requires_grad=True), torch.randn(30, 5), torch.randn(3, 5)
    key = middle.key_of("MatrixMap", 0.3)
    _, aux, _ = low_rank_linear(
        x, torch.randn(30, 20), None, a, b, 0.5, middle=key, geometry=[11], params=[matrix]
    )
    grads = torch.autograd.grad(aux, [x, a])

    def by_autograd(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, a)]
        return torch.autograd.grad(0.3 * (leaves[0] @ leaves[1].t()).square().mean(), leaves)

    stock, exact = (partial(by_autograd, t) for t in (torch.float32, torch.float64))
    all_within_budget(grads, stock, exact, torch.float32, ["dx", "dlora_a"])


def test_a_key_spells_its_map_out():
    assert middle.find(middle.key_of("MatrixMap", 0.5)) == MatrixMap(0.5)
    assert middle.find("AwkwardMap(0.25, True)") == AwkwardMap(0.25, wide=True)
