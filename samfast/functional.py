# SPDX-License-Identifier: Apache-2.0
"""Every operation as a function: ``backend="auto"`` and autograd throughout."""

from samfast.kernels.adapt_former import adapt_former
from samfast.kernels.cobot_fold import cobot_fold
from samfast.kernels.conv_experts import conv_experts
from samfast.kernels.conv_experts.conv_lora import conv_lora_linear
from samfast.kernels.expert_gate import expert_gate
from samfast.kernels.hypercomplex import (
    hypercomplex_linear,
    kronecker_factors,
    kronecker_weight,
)
from samfast.kernels.lora_linear import lora_linear
from samfast.kernels.relpos_attention import relpos_attention, window_relpos_attention
from samfast.kernels.task_core import task_core, task_cores
from samfast.kernels.window_attention import window_attention

__all__ = [
    "adapt_former",
    "cobot_fold",
    "conv_experts",
    "conv_lora_linear",
    "expert_gate",
    "hypercomplex_linear",
    "kronecker_factors",
    "kronecker_weight",
    "lora_linear",
    "relpos_attention",
    "task_core",
    "task_cores",
    "window_attention",
    "window_relpos_attention",
]
