# SPDX-License-Identifier: Apache-2.0
"""Whether tensors from a file hold numbers only, in one pass over their bytes."""

from collections.abc import Mapping

from torch import Tensor


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or infinity, None where there is none."""
    return next((name for name, tensor in tensors.items() if not _finite(tensor)), None)


def _finite(tensor: Tensor) -> bool:
    """By the sum, which NaN and infinity never leave finite; it may overflow without any."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.itemsize == 1:  # float8 has few operations
        tensor = tensor.float()
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
