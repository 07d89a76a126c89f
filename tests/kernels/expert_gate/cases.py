# SPDX-License-Identifier: Apache-2.0
"""Inputs of the gate and its backends."""

import torch
from draws import drawing

from samfast.functional import expert_gate
from samfast.kernels.expert_gate import example

from ..operation import Operation, runnable_by

BACKENDS = ("torch", "triton")
runnable = runnable_by(example)
NOISE = drawing(4)(5, 4)  # its arithmetic's dtype is made of it


def tensors(samples, height=3, width=4, rank=3, experts=4, dtype=torch.float64, seed=2):
    """h, w_gate, w_noise as leaves, and the noise."""
    draw = drawing(seed, torch.promote_types(dtype, torch.float32))
    h, noise = draw(samples, height, width, rank, dtype=dtype), draw(samples, experts)
    leaves = [h, draw(rank, experts), draw(rank, experts)]
    return [t.requires_grad_() for t in leaves], noise


def call(leaves, backend):
    noise = NOISE[:, : leaves[1].shape[1]]
    return [expert_gate(*leaves, noise=noise, backend=backend)[1]]


def kept(leaves, wanted):
    """The loss's gradient."""
    h, w_gate, w_noise = leaves
    return 0, 4 * (h.shape[0] * h.shape[3] + w_gate.numel() + w_noise.numel())


OPERATIONS = [
    Operation(
        "expert_gate",
        "",
        lambda dtype: tensors(5, dtype=dtype)[0],
        call,
        runnable,
        BACKENDS,
        kept,
    )
]
FINITE = [Operation("expert_gate", "", lambda dtype: tensors(5, 2, 2, 2, 3)[0], call, runnable)]
