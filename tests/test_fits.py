# SPDX-License-Identifier: Apache-2.0
"""README's table of what fits is what benchmarks.fits counts."""

import pytest
import torch

from benchmarks import fits
from samfast.training.card import room

HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="counts a stand-in without a GPU")
ROWS = fits.readme_table(fits.README.read_text("utf-8")).splitlines()


def cells(model, memory):
    (row,) = (row for row in ROWS if row.startswith(f"| {fits.NAMES[model]} | `{memory}` |"))
    return [cell.strip() for cell in row.strip("|").split("|")][2:]


@HERE
@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("memory", ["fast", "minimal"])
def test_one_image_of_readme(memory):
    assert fits.gigabytes(fits.Peaks("vit_tiny", memory)(1)) == cells("vit_tiny", memory)[0]


@HERE
@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(("model", "memory", "card"), [("vit_b", "minimal", 8)])
def test_a_batch_of_readme(model, memory, card):
    """It fits, and one more image does not."""
    batch, peaks = int(cells(model, memory)[1 + fits.CARDS.index(card)]), fits.Peaks(model, memory)
    assert peaks(batch) <= room(card * 10**9) < peaks(batch + 1)


@HERE
@pytest.mark.slow
@pytest.mark.parametrize("model", fits.NAMES)
def test_all_of_readme(model):
    made = fits.table((model,)).splitlines()
    assert made[:2] == ROWS[:2]
    assert made[2:] == [row for row in ROWS if row.startswith(f"| {fits.NAMES[model]} |")]


def test_readme_has_every_row():
    kinds = [(name, f"`{memory}`") for name in fits.NAMES.values() for memory in fits.MEMORY]
    assert [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in ROWS[2:]] == kinds


class Counted(fits.Peaks):
    """By a formula in place of steps."""

    def __init__(self, peak):
        super().__init__("vit_tiny", "fast")
        self.peak = peak

    def __call__(self, batch):
        return self.known.setdefault(batch, self.peak(batch))


@pytest.mark.parametrize(
    ("peak", "most"),
    [
        (lambda n: 100 + 30 * n, 19),
        (lambda n: max(100 + 30 * n, 400 + 20 * n), 30),
        (lambda n: max(200 + 2 * n, 40 * n, 90 * n - 900), 30),
    ],
    ids=["line", "kink", "kinks"],
)
def test_the_largest_batch_is_found(peak, most):
    """Also after other sizes have been asked for, and with few counted steps."""
    for order in (1, -1):
        peaks = Counted(peak)
        for free in range(90, 3000, 170)[::order]:
            expected = max((n for n in range(1, 200) if peak(n) <= free), default=0)
            assert fits.largest(peaks, free) == expected
        assert len(peaks.known) <= most
