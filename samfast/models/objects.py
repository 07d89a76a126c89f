# SPDX-License-Identifier: Apache-2.0
"""Repeat rows of images for their objects, which are in sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor


def of_each_object(source: Tensor, first: int, number: int, count: int) -> Tensor:
    """Return [M, ...]: the image's row of source [B, ...] for `number` objects from `first` on.

    It expands instead of indexing, whose backward would add with atomics on a GPU.
    """
    if number == len(source) * count:
        return source[:, None].expand(-1, count, *source.shape[1:]).flatten(0, 1)
    rows, last = [], first + number
    for i, row in enumerate(source):
        own = min(last, (i + 1) * count) - max(first, i * count)
        rows.append(row.expand(own, *row.shape))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def of_counted_objects(source: Tensor, counts: Sequence[int]) -> Tensor:
    """Return [M, ...]: the image's row of source [B, ...] for each object; counts: per image.

    It expands, as above.
    """
    rows = [row.expand(count, *row.shape) for row, count in zip(source, counts, strict=True)]
    return torch.cat(rows)
