# SPDX-License-Identifier: Apache-2.0
"""Stock runs for the budget, of models that hold samfast's modules."""

import copy

import pytest
import torch


def by_reference(function, *args, **options):
    """That call on the reference backend, which is plain autograd, as a function to call later."""

    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SAMFAST_BACKEND", "reference")
            return function(*args, **options)

    return run


def double(sam):
    """A float64 copy; segment_anything's position encoding is fixed to float32, so freed here."""
    sam = copy.deepcopy(sam).double()

    class Positions(type(sam.prompt_encoder.pe_layer)):
        def forward(self, size):
            height, width = size
            y, x = (torch.arange(n, dtype=torch.float64).add(0.5) / n for n in (height, width))
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
            return self._pe_encoding(grid).permute(2, 0, 1)

        def forward_with_coords(self, coords, image_size):
            return self._pe_encoding(coords.double() / coords.new_tensor(image_size[::-1]))

    sam.prompt_encoder.pe_layer.__class__ = Positions
    return sam
