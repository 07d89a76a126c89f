# SPDX-License-Identifier: Apache-2.0
"""Backwards that cannot be differentiated again."""

import functools

import torch


class _Refused(torch.autograd.Function):
    """The first ``count`` tensors, hanging on all of them, with no derivative."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(t if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "samfast's functions are differentiable once: their backward is written by hand and "
            "marked with @once_differentiable"
        )


def once_differentiable(backward):
    """As torch's decorator, but refuses a second derivative in every case.

    torch's lets one through as zero if the incoming gradient is a constant, such as that of a sum.
    Here the results of a backward with ``create_graph=True`` also depend on what was saved, and
    raise when they are differentiated.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *incoming):
        with torch.no_grad():
            grads = backward(ctx, *incoming)
        if not torch.is_grad_enabled():
            return grads
        known = (*ctx.saved_tensors, *incoming)
        sources = [t for t in known if t is not None and t.requires_grad]
        sources = sources or [torch.zeros((), requires_grad=True)]  # nothing saved is an input
        return _Refused.apply(len(grads), *grads, *sources)

    return wrapped
