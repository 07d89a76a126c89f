# SPDX-License-Identifier: Apache-2.0
"""Placeholder while the engine is written: the final signature over the reference."""

from samfast.kernels.lora_linear import reference


def lora_linear(
    x,
    weight,
    bias,
    lora_a,
    lora_b,
    scaling,
    *,
    dropout=0.0,
    seed=None,
    slices=None,
    backend="auto",
):
    return reference.lora_linear(
        x, weight, bias, lora_a, lora_b, scaling, dropout=dropout, seed=seed, slices=slices
    )
