# SPDX-License-Identifier: Apache-2.0
"""Every operation as a function: ``backend="auto"`` and autograd throughout.

``axial_tables`` and ``tables_of`` give ``rope`` its tables.
"""

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
from samfast.kernels.rope import axial_tables, rope, tables_of
from samfast.kernels.task_core import task_core, task_cores
from samfast.kernels.window_attention import window_attention

__all__ = [
    "adapt_former",
    "axial_tables",
    "cobot_fold",
    "conv_experts",
    "conv_lora_linear",
    "expert_gate",
    "hypercomplex_linear",
    "kronecker_factors",
    "kronecker_weight",
    "lora_linear",
    "relpos_attention",
    "rope",
    "tables_of",
    "task_core",
    "task_cores",
    "window_attention",
    "window_relpos_attention",
]
