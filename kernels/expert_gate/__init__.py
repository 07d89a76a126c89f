# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.expert_gate.op import expert_gate

__all__ = ["expert_gate"]
