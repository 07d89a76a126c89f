# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.lora_linear.op import lora_linear

__all__ = ["lora_linear"]
