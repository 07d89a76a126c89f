# SPDX-License-Identifier: Apache-2.0
"""The least error that arithmetic of a precision makes, whichever processor computes.

``Rounded`` runs a function, and its backward, in float64 and adds to each operation a random error:

    a sum of n numbers t      u · √(Σ t² · log2 n), about 2.5 times that of a sum in pairs
    every result              u · |result| up or down, about 2.5 times that of a rounding

u is the unit roundoff of the sums: float32's where float16 and bfloat16 are multiplied.
"""

import math

import torch
from torch import Tensor

from samfast.kernels._common.reordered import (
    ADDED,
    ELEMENTWISE,
    PRODUCTS,
    RESIZED,
    SCATTERED,
    Seen,
    accumulates,
    aten,
    axes,
)


class Rounded(Seen):
    """While entered, float64 operations have errors of unit roundoff ``unit``."""

    def __init__(self, seed: int, unit: float):
        super().__init__(seed)
        self.unit = unit

    def seen(self, func, packet, args, kwargs):
        if packet in COMPOSED and _plain(args, kwargs) and args[0].dim():
            return self.inside(COMPOSED[packet], args, kwargs)
        made = func(*args, **kwargs)
        if packet in PRODUCTS:
            return self._product(made, func, PRODUCTS[packet], args, kwargs)
        if packet in (aten.sum, aten.mean):
            return self._sum(made, *args, mean=packet is aten.mean, **kwargs)
        if packet is aten.convolution:
            x, weight, _, *options = args
            squares = func(x.square(), weight.square(), None, *options)
            return self._err(made, squares, weight[0].numel())
        if packet is aten.convolution_backward:
            return self._convolution_backward(made, func, *args)
        if packet in SCATTERED and accumulates(args, kwargs):
            target, indices, values, *_ = args
            squares = torch.zeros_like(target).index_put_(indices, values.square(), True)
            return self._err(made, squares, max(i.numel() for i in indices))
        if packet in ADDED:
            _, dim, index, source = args
            squares = torch.zeros_like(made).index_add_(dim, index, source.square())
            return self._err(made, squares, len(index))
        if packet in RESIZED:  # the weights of each result add up to one
            squares = func(args[0].square(), *args[1:], **kwargs).abs()
            return self._err(made, squares, 16 * max(1, args[0].numel() // made.numel()))
        return self._err(made) if packet in ELEMENTWISE else made

    def _err(self, made, squares: Tensor | None = None, count: int = 1):
        """``made`` and its error; squares: of the numbers that are summed, in sum."""
        if isinstance(made, tuple):
            return tuple(self._err(t) for t in made)
        if made.dtype != torch.float64:
            return made
        sign = 2.0 * torch.randint(2, made.shape, generator=self.generator) - 1.0
        error = made.abs() * sign.to(made.device)
        if squares is not None and count > 1:
            draw = torch.randn(made.shape, dtype=torch.float64, generator=self.generator)
            error += (squares * math.log2(count)).sqrt() * draw.to(made.device)
        return made.add_(error, alpha=self.unit)  # in place: an operation in place stays one

    def _product(self, made, func, places, args, kwargs):
        count = args[places[0][0]].shape[places[0][1]]
        squares = [t.square() if isinstance(t, Tensor) else t for t in args]
        factors = {name: value * value for name, value in kwargs.items()}  # alpha and beta
        return self._err(made, func(*squares, **factors), count)

    def _sum(self, made, t, *rest, mean, **kwargs):
        if not made.is_floating_point() or t.numel() == 0:
            return made
        dims = axes(t, rest)
        count = math.prod(t.shape[d] for d in dims)
        squares = t.double().square().sum(dims).view(made.shape)
        return self._err(made, squares / count**2 if mean else squares, count)

    def _convolution_backward(self, made, func, dy, x, weight, sizes, *options):
        squares = func(dy.square(), x.square(), weight.square(), sizes, *options)
        points = dy.numel() // dy.shape[1]  # of no image: 0
        counts = weight[:, 0].numel(), points, points
        triples = zip(made, squares, counts, strict=True)
        return tuple(t if t is None else self._err(t, s, n) for t, s, n in triples)


def _plain(args, kwargs) -> bool:
    return args[0].dtype == torch.float64 and "tanh" not in (*args, *kwargs.values())


def _softmax(x, dim, half):
    e = (x - x.amax(dim, True)).exp()
    return e / e.sum(dim, True)


def _log_softmax(x, dim, half):
    x = x - x.amax(dim, True)
    return x - x.exp().sum(dim, True).log()


def _logsumexp(x, dim, keepdim=False):
    most = x.amax(dim, True)
    total = (x - most).exp().sum(dim, True).log() + most
    return total if keepdim else total.sum(dim)


def _var(x, dim=None, *, correction=1, keepdim=False):
    dims = axes(x, (dim,))
    count = math.prod(x.shape[d] for d in dims)
    squares = (x - x.mean(dims, True)) ** 2
    return squares.sum(dims, keepdim) / (count - (1 if correction is None else correction))


def _var_mean(x, dim=None, *, correction=1, keepdim=False):
    made = _var(x, dim, correction=correction, keepdim=keepdim)
    return made, x.mean(axes(x, (dim,)), keepdim)


def _layer_norm(x, shape, weight, bias, eps):
    dims = list(range(-len(shape), 0))
    mean = x.mean(dims, True)
    rstd = ((x - mean).pow(2).mean(dims, True) + eps).rsqrt()
    y = (x - mean) * rstd
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, rstd


def _layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, mask):
    dims = list(range(-len(shape), 0))
    rows = list(range(x.dim() - len(shape)))
    n, g = (x - mean) * rstd, dy if weight is None else dy * weight
    dx = rstd * (g - g.mean(dims, True) - n * (g * n).mean(dims, True))
    grads = [(dy * n).sum(rows) if rows else dy * n, dy.sum(rows) if rows else dy.clone()]
    return tuple(t if wanted else None for t, wanted in zip((dx, *grads), mask, strict=True))


def _gelu(x, approximate="none"):
    return x * 0.5 * (1 + (x * 0.5**0.5).erf())


def _gelu_backward(dy, x, approximate="none"):
    share = 0.5 * (1 + (x * 0.5**0.5).erf())
    return dy * (share + x * (-0.5 * x * x).exp() * (2 * math.pi) ** -0.5)


COMPOSED = {
    aten._softmax: _softmax,
    aten._log_softmax: _log_softmax,
    aten._softmax_backward_data: lambda dy, y, dim, _: y * (dy - (dy * y).sum(dim, True)),
    aten._log_softmax_backward_data: lambda dy, y, dim, _: dy - y.exp() * dy.sum(dim, True),
    aten.logsumexp: _logsumexp,
    aten.var: _var,
    aten.var_mean: _var_mean,
    aten.native_layer_norm: _layer_norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten.gelu: _gelu,
    aten.gelu_backward: _gelu_backward,
}
