# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients: means, what is not finite, and torch's own clipping."""

import pytest
import torch

from samfast.training.watch import PATIENCE, Losses, NotFinite, clip_gradients

NAMES = ("first", "second")


def as_it_is(values, reduction):
    assert reduction == "mean"
    return values


def test_the_mean_weighs_images_and_looks_now_and_then():
    losses = Losses(NAMES, as_it_is)
    for i in range(PATIENCE):
        assert not losses.due() and losses.values == []
        losses.add(torch.tensor(float(i), dtype=torch.float64), 1 + i % 2, i)
    assert losses.due()
    losses.look()
    counts = [1 + i % 2 for i in range(PATIENCE)]
    assert losses.mean() == sum(i * n for i, n in enumerate(counts)) / sum(counts)
    losses.add(torch.tensor(9.0), 1, PATIENCE)
    assert not losses.due() and len(losses.values) == PATIENCE  # not looked at


def test_several_processes_are_averaged():
    losses = Losses(NAMES, lambda values, reduction: 2 * values)
    losses.add(torch.tensor(0.5), 3, 1)
    losses.look()
    assert losses.values == [1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_largest_gradient(value):
    losses = Losses(NAMES, as_it_is)
    losses.add_norms(torch.tensor([1.0, 4.5]), 6)
    losses.add(torch.tensor(1.0), 2, 6)
    losses.look()
    losses.add(torch.tensor(1.0), 2, 7)  # the first batch of two in its step
    losses.add(torch.tensor(value), 2, 7)
    losses.add_norms(torch.tensor([torch.nan, 1.0]), 7)
    told = f"the loss is {value} in step 7; the largest gradient of the step before has norm 4.5"
    with pytest.raises(NotFinite, match=f"{told}, of second") as error:
        losses.look()
    assert error.value.batch == 2


def test_the_first_step_names_its_own_gradient():
    losses = Losses(NAMES, as_it_is)
    losses.add(torch.tensor(torch.nan), 2, 1)
    losses.add_norms(torch.tensor([3.0, torch.inf]), 1)
    with pytest.raises(NotFinite, match="the largest gradient of that step has norm inf, of sec"):
        losses.look()
    losses = Losses(NAMES, as_it_is)
    losses.add(torch.tensor(torch.nan), 2, 1)
    with pytest.raises(NotFinite, match=r"in step 1$"):
        losses.look()


@pytest.mark.parametrize("limit", [0.0, 0.1, 1e6])
def test_clipping_is_that_of_torch(limit):
    def drawn():
        torch.manual_seed(3)
        found = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 1000, 3)]
        for parameter in found[:2]:
            parameter.grad = torch.randn(parameter.shape)
        return found

    own, reference = drawn(), drawn()
    norms = clip_gradients(own, limit)
    assert norms.tolist()[2] == 0 and torch.equal(norms[0], reference[0].grad.norm())
    if limit:
        torch.nn.utils.clip_grad_norm_(reference, limit)
    for ours, theirs in zip(own[:2], reference[:2], strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert own[2].grad is None
