# SPDX-License-Identifier: Apache-2.0
"""Sums in other orders are the same mathematics; the least error is of the size of real ones."""

import pytest
import torch
import torch.nn.functional as F

from samfast.kernels._common.reordered import Reordered
from samfast.kernels._common.rounded import Rounded

UNIT = 2.0**-24
GENERATOR = torch.Generator().manual_seed(3)


def draw(*shape):
    """Numbers of float32, so that nothing is rounded on the way in."""
    return torch.randn(*shape, generator=GENERATOR).double()


# What they compute, and what of.
FUNCTIONS = {
    "mm": (torch.mm, draw(30, 200), draw(200, 20)),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=3.0), draw(20), draw(30, 200),
              draw(200, 20)),
    "bmm": (torch.bmm, draw(3, 20, 200), draw(3, 200, 10)),
    "baddbmm": (torch.baddbmm, draw(3, 20, 10), draw(3, 20, 200), draw(3, 200, 10)),
    "mv": (torch.mv, draw(30, 200), draw(200)),
    "addmv": (torch.addmv, draw(30), draw(30, 200), draw(200)),
    "dot": (torch.dot, draw(2000), draw(2000)),
    "linear": (F.linear, draw(2, 30, 200), draw(20, 200), draw(20)),
    "einsum": (lambda a, b: torch.einsum("nabc,kc->bnk", a, b), draw(2, 3, 4, 200), draw(5, 200)),
    "sum": (torch.sum, draw(20, 300)),
    "sum over axes": (lambda t: t.sum((0, -1), keepdim=True), draw(20, 5, 30)),
    "mean": (torch.mean, draw(20, 300)),
    "mean over an axis": (lambda t: t.mean(1), draw(20, 300)),
    "variance": (torch.var, draw(300)),
    "logsumexp": (lambda t: t.logsumexp(1, keepdim=True), draw(20, 300)),
    "norm": (torch.linalg.vector_norm, draw(20, 300)),
    "softmax": (lambda t: t.softmax(1), draw(20, 300, 3)),
    "log_softmax": (lambda t: t.log_softmax(-1), draw(20, 300)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (300,), w, b), draw(2, 9, 300), draw(300),
                   draw(300)),
    "bare layer_norm": (lambda x: F.layer_norm(x, (300,)), draw(9, 300)),
    "gelu": (F.gelu, draw(500)),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, padding=(1, 2)), draw(4, 6, 9, 11),
                    draw(5, 6, 3, 5), draw(5)),
    "depthwise": (lambda x, w: F.conv2d(x, w, padding=1, groups=6), draw(4, 6, 9, 11),
                  draw(6, 1, 3, 3)),
    "strided": (lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1)), draw(4, 6, 10, 12),
                draw(5, 6, 3, 2), draw(5)),
    "transposed": (lambda x, w, b: F.conv_transpose2d(x, w, b, stride=(2, 3)),
                   draw(4, 6, 9, 11), draw(6, 5, 2, 3), draw(5)),
    "rows of a table": (lambda t: t[torch.arange(900).view(30, 30) % 7], draw(7, 5)),
    "index_add": (lambda t, s: t.index_add(1, torch.arange(300) % 5, s), draw(4, 5), draw(4, 300)),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=3, mode="bicubic"), draw(2, 3, 8, 9)),
    "by half": (lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"), draw(2, 3, 7, 7)),
    "normalize": (F.normalize, draw(20, 300)),
    "norm over an axis": (lambda t: torch.linalg.vector_norm(t, 2, -1), draw(20, 300)),
    "deviation": (torch.std, draw(300)),
    "variance and mean": (lambda t: sum(torch.var_mean(t, 1)), draw(20, 300)),
    "bilinear": (lambda x: F.interpolate(x, size=(5, 4), mode="bilinear"), draw(2, 3, 8, 9)),
}  # fmt: skip
# Where only the backward adds up, only the forward, neither, or torch does it in float64.
BACKWARD = {"rows of a table"}
FORWARD = {"sum", "sum over axes", "mean", "mean over an axis", "logsumexp", "dot", "index_add"}
NEITHER = {"gelu", "variance", "norm", "norm over an axis", "deviation", "by half",
           "normalize", "variance and mean"}  # fmt: skip


def run(name, dtype):
    """The result and the gradients of a function."""
    function, *given = FUNCTIONS[name]
    leaves = [t.to(dtype).requires_grad_() for t in given]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def rms(t):
    return t.double().square().mean().sqrt().item()


def errors(made, exact):
    return [rms(mine - truth) for mine, truth in zip(made, exact, strict=True)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_orders_are_the_same_mathematics(name):
    exact = run(name, torch.float64)
    for seed in range(8):
        with Reordered(seed):
            made = run(name, torch.float64)
        for mine, truth in zip(made, exact, strict=True):
            assert mine.shape == truth.shape
            assert rms(mine - truth) <= 2.0**-44 * rms(truth)  # 512 units of float64


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in NEITHER])
def test_other_orders_round_otherwise(name):
    """The result, and a gradient."""
    single, found = run(name, torch.float32), set()
    for seed in range(4):
        with Reordered(seed):
            made = run(name, torch.float32)
        pairs = enumerate(zip(made, single, strict=True))
        found |= {i for i, (mine, truth) in pairs if not torch.equal(mine, truth)}
    assert name in FORWARD or found - {0}
    assert name in BACKWARD or 0 in found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_results_round_by_chance(dtype, monkeypatch):
    """To one of the two neighbours, in the long run to the number itself."""
    monkeypatch.setattr(Reordered, "_coin", lambda self: True)
    x = torch.randn(1000, generator=GENERATOR).to(dtype)
    x[:3] = torch.tensor([0.0, 1.0, 6e-8])
    powers = torch.tensor([1.0, -2.0, 0.5]).to(dtype)
    exact, total = 3.3 * x.double(), torch.zeros(1000, dtype=torch.float64)
    info = torch.finfo(dtype)
    step = info.eps * exact.abs().log2().floor().exp2().clamp(min=info.smallest_normal)
    for seed in range(100):
        with Reordered(seed):
            y = x * 3.3
            assert torch.equal(powers * 2, powers + powers)
        assert y.dtype == dtype and ((y.double() - exact).abs() < step * (1 + 1e-4)).all()
        total += y.double() - exact
    assert rms(total / step) < 0.6 * 100**0.5  # half a step, at random signs
    with Reordered(0):
        y = x.clone().mul_(3.3)
        assert y.dtype == dtype and ((y.double() - exact).abs() < step * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_results_have_the_dtypes_they_have(dtype, monkeypatch):
    """With wide tensors, and where a dtype is asked for."""
    monkeypatch.setattr(Reordered, "_coin", lambda self: True)
    x, wide = torch.randn(9, 20).to(dtype), torch.randn(20)
    calls = [
        lambda: x * wide,
        lambda: x * wide[0],
        lambda: x.sum(1, dtype=torch.float32),
        lambda: x.softmax(1, dtype=torch.float32),
        lambda: F.layer_norm(x, (20,)),
    ]
    for call in calls:
        expected = call()
        with Reordered(0):
            made = call()
        assert made.dtype == expected.dtype and made.shape == expected.shape


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_everything_has_narrow_roundings(name, dtype, monkeypatch):
    """The gradients too, some of whose operations are told a dtype."""
    monkeypatch.setattr(Reordered, "_coin", lambda self: True)
    expected = run(name, dtype)
    with Reordered(0):
        made = run(name, dtype)
    for mine, theirs in zip(made, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == dtype
        assert mine.isfinite().all() and mine.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_numbers_without_axes(dtype):
    x = draw(5).to(dtype)
    for mode in (Reordered(0), Rounded(0, UNIT)):
        with mode:
            made = (x.sum().sum(0) * 2.0).softmax(0).logsumexp(0)
        assert made.dtype == dtype and made == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_least_error_is_of_the_size_of_real_ones(name):
    """Not far above what float32 does here in any order, nor below it."""
    exact = run(name, torch.float64)
    real, least = [], []
    for seed in range(3):
        with Reordered(seed):
            real.append(errors(run(name, torch.float32), exact))
        with Rounded(seed, UNIT):
            least.append(errors(run(name, torch.float64), exact))
    real, least = ([max(of) for of in zip(*runs, strict=True)] for runs in (real, least))
    for theirs, mine, truth in zip(real, least, exact, strict=True):
        if truth.unique().numel() < 8:  # of few numbers the real error is luck
            continue
        assert theirs / 16 <= mine <= 16 * theirs, f"{mine / theirs:.2f} of float32's"


@pytest.mark.parametrize("kind", ["sum", "mean", "product"])
def test_the_error_of_a_sum_is_that_of_the_formula(kind):
    """u √(Σ t² · log2 n), and u of the result: over 2000 sums of 512 numbers."""
    t, one = draw(2000, 512), torch.ones(512, 1, dtype=torch.float64)
    share = 1 / 512 if kind == "mean" else 1.0

    def add():
        return t @ one if kind == "product" else getattr(t, kind)(1, keepdim=True)

    exact = add()
    with Rounded(0, UNIT):
        error = rms(add() - exact)
    squares = 9 * (share * t).square().sum(1, keepdim=True) + exact.square()
    assert 0.9 < error / (UNIT * squares.mean().sqrt().item()) < 1.1
