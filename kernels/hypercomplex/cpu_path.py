# SPDX-License-Identifier: Apache-2.0
"""The two passes in C++ (csrc/cpu/hypercomplex.cpp); the interface is that of torch_path."""

import torch

_native = torch.ops.samfast_native


def build(rules, weights, base, scaling, dtype):
    """base + s · Σ_i rules_i ⊗ weights_i in ``dtype``, (n · P, n · Q), rounded once."""
    (_, n, _), (_, rows, columns) = rules.shape, weights.shape
    h = weights.new_empty(n * rows, n * columns, dtype=dtype)
    base = None if base is None else base.contiguous()
    _native.hypercomplex_build(_dense(rules), _dense(weights), base, scaling, h)
    return h


def contract(grad, rules, weights, scaling, needs):
    """drules and dweights from dH (n · P, n · Q), of the parameters' dtypes; None unless needed."""
    made = [
        t.new_empty(t.shape, dtype=torch.float32) if need else None
        for t, need in zip((rules, weights), needs, strict=True)
    ]
    if any(needs):
        _native.hypercomplex_contract(
            grad.contiguous(), _dense(rules), _dense(weights), scaling, *made
        )
    return [
        None if new is None else new.to(t.dtype)
        for new, t in zip(made, (rules, weights), strict=True)
    ]


def _dense(t):
    return t.float().contiguous()
