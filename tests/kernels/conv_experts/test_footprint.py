# SPDX-License-Identifier: Apache-2.0
"""One NaN or infinity reaches the maps as far as in the literal recipe, in every backend.

An odd ratio above one is apart: there the recipe's resampling reads neighbours with weights of zero
or of rounding size, of which a backend reads none, so it may reach less. The kernels' gradients are
apart at a border: whether zero padding times NaN counts depends on the library's convolution.
"""

import dataclasses
import types

import pytest
import torch

from samfast import backends
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import cpu_path, torch_path
from samfast.kernels.conv_experts.footprint import reach, twice

from .problems import RESULTS, Problem, not_interpreted

NAN, INF = float("nan"), float("inf")
MAP, STRIPS = Windows.whole(1, 9, 13), Windows.whole(1, 19, 18)  # one tile; tiles with a halo
PADDED = Windows(2, 10, 17, 7, 7)
PLACES = {  # corner, interior and border, and the borders of tiles and windows
    MAP: (0, 4 * 13 + 6, 12),
    STRIPS: (19 * 18 - 1, 7 * 18 + 8, 8 * 18 + 7, 16 * 18),
    PADDED: (3 * 17 + 6, 170 + 7 * 17 + 7),
}


@dataclasses.dataclass(frozen=True)
class Broken(Problem):
    """A problem in which one number is not finite: of h, dz or dz_pad."""

    where: str = "h"
    row: int = 0
    channel: int = 0
    value: float = NAN

    def tensors(self, *dtypes):
        tensors = list(super().tensors(*dtypes))
        broken = tensors[{"h": 0, "dz": 3, "dz_pad": 4}[self.where]]
        broken[self.row, self.channel] = self.value
        return tuple(tensors)


def blocks():
    native = torch.ops.samfast_native
    return types.SimpleNamespace(
        conv_experts_forward=native.conv_experts_tiles_forward,
        conv_experts_backward=native.conv_experts_tiles_backward,
    )


@pytest.fixture(params=["torch", "cpu", "blocks"])
def path(request, monkeypatch):
    if request.param == "torch":
        return torch_path
    if backends.native_missing() is not None:
        pytest.skip(backends.native_missing())
    if request.param == "blocks":
        monkeypatch.setattr(cpu_path, "_native", blocks())
    return cpu_path


def check(problem, path):
    ours, literal = problem.run(path, torch.float32), problem.literal(torch.float32)
    inexact = any(ratio % 2 and ratio > 1 for ratio in problem.ratios)
    for name, value, exact in zip(RESULTS, ours, literal, strict=True):
        broken, expected = ~value.isfinite(), ~exact.isfinite()
        if name == "dweight":
            assert (broken | ~expected).all() and (problem.where != "h" or expected.any())
        elif inexact:
            assert not (broken & ~expected).any(), f"{problem}: {name} reaches further"
            assert broken.any() == expected.any(), f"{problem}: {name} reaches nothing"
        else:
            assert torch.equal(broken, expected), f"{problem}: {name}"


@pytest.mark.parametrize(
    "ratio", [1, 2, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 5, 6, 8))]
)
def test_maps(path, ratio):
    """A sample of this ratio beside others, depthwise or not."""
    for windows, rows in PLACES.items():
        for number, row in enumerate(rows):
            options = {"depthwise": number % 2 == 1, "row": row, "channel": 1}
            check(Broken(windows, 2, (ratio,), **options), path)
            check(Broken(windows, 2, (ratio,), where="dz", **options), path)
            check(Broken(windows, 2, (ratio,), value=-INF, activation="none", **options), path)
    check(Broken(PADDED, 2, (ratio,), where="dz_pad", row=5), path)


@pytest.mark.parametrize("ratio, pixels", [(1, 9), (2, 49), (4, 25)])
def test_pixels(path, ratio, pixels):
    """What the literal layer's footprint is: 3 x 3 where nothing is resampled."""
    broken = Broken(STRIPS, 2, (ratio,), row=8 * 18 + 8)
    z, _, dh, *_ = broken.run(path, torch.float32)
    assert (~z.isfinite()).sum() == 2 * pixels == 2 * (2 * reach(ratio) + 1) ** 2
    assert (~dh.isfinite()).sum() == 2 * (2 * twice(ratio) + 1) ** 2


def test_other_samples_stay_as_they_are(path):
    """Of a batch in windows, to the bit."""
    whole, broken = (
        p.run(path, torch.float32) for p in (Problem(PADDED, 2, (1, 2)), Broken(PADDED, 2, (1, 2)))
    )
    for name, a, b in zip(RESULTS[:3], whole, broken, strict=False):
        a, b = (PADDED.cut(t)[1:] if name != "z_pad" else t[1 :: PADDED.pads] for t in (a, b))
        assert torch.equal(a, b), name


@pytest.mark.slow_on_cpu
@pytest.mark.skipif(bool(not_interpreted()), reason=str(not_interpreted()))
@pytest.mark.parametrize(
    "problem",
    [
        Broken(Windows.whole(2, 4, 5), 1, (1,), row=6),
        pytest.param(
            Broken(Windows(1, 5, 4, 3, 3), 2, (2,), where="dz_pad", row=3), marks=pytest.mark.slow
        ),
        pytest.param(Broken(STRIPS, 2, (1,), row=8 * 18 + 7), marks=pytest.mark.slow),
        pytest.param(Broken(STRIPS, 1, (2,), True, row=8 * 18 + 7), marks=pytest.mark.slow),
        pytest.param(Broken(STRIPS, 2, (4,), where="dz", row=135), marks=pytest.mark.slow),
        pytest.param(Broken(PADDED, 2, (1, 8), row=57, value=INF), marks=pytest.mark.slow),
        pytest.param(Broken(MAP, 2, (3,), row=0, activation="none"), marks=pytest.mark.slow),
    ],
    ids=lambda problem: f"{problem.id}-{problem.where}-{problem.row}",
)
def test_interpreted(problem):
    from samfast.kernels.conv_experts import triton_kernels

    check(problem, triton_kernels)
