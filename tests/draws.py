# SPDX-License-Identifier: Apache-2.0
"""The device that tests run on, and random tensors there."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawing(seed, dtype=torch.float64, device=DEVICE):
    """A function that draws normal tensors one after another, all from one seed.

    Every dtype gets the numbers of float64, rounded.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, divisor=1.0, dtype=dtype):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (drawn / divisor).to(device, dtype)

    return draw
