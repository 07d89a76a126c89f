# SPDX-License-Identifier: Apache-2.0
"""Maps of probabilities agree with masks and classes in every pixel, rounding included."""

import numpy as np
import pytest
import torch

from samfast.training.probabilities import key_of, probabilities
from samfast.training.task_scores import read_off
from samfast.training.tasks import TaskSpec

TINY = [0.0, -0.0, 1e-45, -1e-45, 1e-9, -1e-9, 3e-8, -3e-8, 1e-7, -1e-7, 200.0, -200.0]


def test_above_a_half_is_the_mask():
    draw = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(0)) * 3
    for maps in (torch.tensor(TINY)[None, None], draw):
        found = read_off(None, maps, True)
        mask, values = found[""], found[key_of("")][0]
        assert values.dtype == np.float32 and values.min() >= 0 and values.max() <= 1
        np.testing.assert_array_equal(mask, maps[0].numpy() > 0)
        np.testing.assert_array_equal(values > 0.5, mask)
        np.testing.assert_array_equal(values >= 0.5, mask)
        exact = 1 / (1 + np.exp(-maps[0].double().numpy()))
        np.testing.assert_allclose(values, exact, atol=4 * np.finfo(np.float32).eps)


def test_the_largest_page_is_the_class():
    near = torch.zeros(3, 1, 4)  # softmax of which rounds to equal numbers
    near[1, 0] = torch.tensor([1e-9, 1e-8, 0.0, -1e-9])
    near[2, 0] = torch.tensor([0.0, 2e-8, 0.0, 1e-9])
    draw = torch.randn(3, 30, 40, generator=torch.Generator().manual_seed(0)) * 3
    spec = TaskSpec("classes", kind="semantic", channels=3)
    for maps in (near, draw):
        found = read_off(spec, maps, True)
        values = found[key_of("classes")]
        np.testing.assert_array_equal(values.argmax(0), found["classes"])
        exact = maps.double().softmax(0).numpy()
        np.testing.assert_allclose(values, exact, atol=4 * np.finfo(np.float32).eps)
    assert torch.equal(probabilities(maps), torch.from_numpy(values))


@pytest.mark.parametrize("probable", [False, True])
def test_values_have_none(probable):
    spec = TaskSpec("depth", kind="regression")
    assert set(read_off(spec, torch.ones(1, 2, 2), probable)) == {"depth"}
