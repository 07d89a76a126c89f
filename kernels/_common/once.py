# SPDX-License-Identifier: Apache-2.0
"""Backwards that have no backward of their own."""

import functools

import torch


def once_differentiable(backward):
    """As torch's decorator, but refusing a second derivative in every case.

    torch's lets one through as zero where the incoming gradient is a constant, as that of a sum
    is. Here all that a backward with ``create_graph=True`` gives raises when it is differentiated.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *incoming):
        with torch.no_grad():
            grads = backward(ctx, *incoming)
        if not torch.is_grad_enabled():
            return grads
        sentence = (
            b"samfast's functions are differentiable once: their backward is written by hand "
        )
        sentence += b"and marked with @once_differentiable"
        refuse = torch._C._functions.DelayedError(sentence, len(grads))
        return refuse(*(g if g is None else g.detach().requires_grad_() for g in grads))

    return wrapped
