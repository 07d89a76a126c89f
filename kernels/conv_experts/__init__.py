# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.conv_experts.op import conv_experts

__all__ = ["conv_experts"]
