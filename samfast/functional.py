# SPDX-License-Identifier: Apache-2.0
"""Every operation as a function: ``backend="auto"`` and autograd throughout."""

from samfast.kernels.lora_linear import lora_linear

__all__ = ["lora_linear"]
