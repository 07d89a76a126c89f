# SPDX-License-Identifier: Apache-2.0
"""Dice and IoU from pixel counts of a whole set."""

import pytest
import torch

from samfast.training.evaluate import full_size_mask
from samfast.training.metrics import ForegroundScores, all_foreground_scores


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "#" for c in row] for row in rows])


def test_counts_are_summed_over_images_of_any_size():
    scores = ForegroundScores()
    scores.update(mask("##."), mask("#.#"))  # TP 1, FP 1, FN 1
    scores.update(mask("##", "##"), mask("##", "#."))  # TP 3, FP 1
    scores.update(mask("...."), mask("...."))
    dice, iou = scores.compute()
    assert dice == torch.tensor(8 / 11).item()  # 2·4 / (2·4 + 2 + 1)
    assert iou == torch.tensor(4 / 7).item()


def test_all_foreground_is_the_baseline():
    assert all_foreground_scores([mask("#..."), mask("##..")]) == (
        torch.tensor(6 / 11).item(),  # TP 3, FP 5
        torch.tensor(3 / 8).item(),
    )


def test_nothing_to_find_and_nothing_found_is_right():
    scores = ForegroundScores()
    scores.update(mask(".."), mask(".."))
    assert scores.compute() == (1.0, 1.0)
    scores.update(mask("#."), mask(".."))
    assert scores.compute() == (0.0, 0.0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(1, 2\)"):
        ForegroundScores().update(mask("..."), mask(".."))


def test_padding_never_reaches_the_full_size_mask():
    logits = torch.full((8, 8), 50.0)
    logits[:4, :6] = -1.0
    logits[1:3, 2:4] = 1.0
    predicted = full_size_mask(logits, 4, 6, (8, 12))
    assert predicted.shape == (8, 12)
    assert predicted[2:6, 4:8].all() and predicted.sum() == 16
