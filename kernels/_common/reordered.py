# SPDX-License-Identifier: Apache-2.0
"""The same mathematics with other roundings: sums in another order, narrow results at random.

How a library rounds depends on the processor, on threads and on luck. ``Reordered`` draws other
roundings that it might have made, for any function of tensors and for its backward.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samfast.kernels._common.implementation import IMPLEMENTATIONS

aten = torch.ops.aten

# Products: which argument is summed over along which axis.
PRODUCTS = {
    aten.mm: ((0, 1), (1, 0)),
    aten.addmm: ((1, 1), (2, 0)),
    aten.bmm: ((0, 2), (1, 1)),
    aten.baddbmm: ((1, 2), (2, 1)),
    aten.mv: ((0, 1), (1, 0)),
    aten.addmv: ((1, 1), (2, 0)),
    aten.dot: ((0, 0), (1, 0)),
}
# Sums, whose axes are argument 1: all of them where there is none.
SUMS = (aten.sum, aten.mean, aten.var, aten.var_mean, aten.std, aten.logsumexp)
# Operations that sum along an axis and keep it; the axis is the argument of this number.
ALONG = {
    aten._softmax: 1,
    aten._log_softmax: 1,
    aten._softmax_backward_data: 2,
    aten._log_softmax_backward_data: 2,
}
RESIZED = (
    aten.upsample_bilinear2d,
    aten.upsample_bicubic2d,
    aten.upsample_bilinear2d_backward,
    aten.upsample_bicubic2d_backward,
)
SCATTERED = (aten.index_put, aten.index_put_, aten._index_put_impl_)
ADDED = (aten.index_add, aten.index_add_)


# Number by number; what only moves numbers, or compares them, does not round.
ELEMENTWISE = {
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.addcmul, aten.addcdiv, aten.lerp),
    *(aten.add_, aten.sub_, aten.mul_, aten.div_, aten.reciprocal, aten.pow, aten.sqrt, aten.rsqrt),
    *(aten.exp, aten.expm1, aten.log, aten.log1p, aten.sin, aten.cos, aten.tanh, aten.erf),
    *(aten.erfc, aten.sigmoid, aten.softplus, aten.silu, aten.special_ndtr, aten.gelu),
    *(aten.tanh_backward, aten.sigmoid_backward, aten.softplus_backward, aten.silu_backward),
    *(aten.log_sigmoid_forward, aten.log_sigmoid_backward, aten.gelu_backward),
    *(aten.binary_cross_entropy_with_logits, aten.linalg_vector_norm, aten.std),
}
NARROW = (torch.float16, torch.bfloat16)
NORMS = (aten.native_layer_norm, aten.native_layer_norm_backward)
CONVOLUTIONS = (aten.convolution, aten.convolution_backward)
ROUNDING = {*PRODUCTS, *SUMS, *ALONG, *RESIZED, *ADDED, *NORMS, *CONVOLUTIONS, *ELEMENTWISE}


class Seen(TorchDispatchMode):
    """Hands aten's operations to ``seen``; samfast's own are run, and seen from inside."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        body = IMPLEMENTATIONS.get(func._schema.name)
        if body is not None:
            return self.inside(body, args, kwargs or {})
        return self.seen(func, func.overloadpacket, args, kwargs or {})

    def inside(self, function, args, kwargs):
        """What ``function`` calls is seen as well."""
        with self:
            return function(*args, **kwargs)

    def seen(self, func, packet, args, kwargs):
        raise NotImplementedError


class Reordered(Seen):
    """While entered, torch's operations add up in an order drawn from ``seed``, and round narrow.

    Any dtype and device. Inputs are permuted along the axes that are summed over, maps of
    convolutions flipped and transposed; results are turned back. Every other float16 or bfloat16
    result is computed in float32 and rounded up or down by chance, the nearer the likelier: to the
    nearest most would not differ, for libraries mostly add up in float32 too. The others keep how
    the library adds them up. Casts, and what it does not know, run as they are.
    """

    def seen(self, func, packet, args, kwargs):
        tensors = [t for t in args if isinstance(t, Tensor) and t.is_floating_point()]
        tensors = [t for t in tensors if t.dim()] or tensors  # numbers do not decide the dtype
        kinds = {t.dtype for t in tensors} | ({kwargs["dtype"]} if kwargs.get("dtype") else set())
        narrow = len(kinds) == 1 and kinds <= set(NARROW) and packet in ROUNDING
        if narrow and not _told_float32(packet, args) and self._coin():
            return self._narrow(func, packet, args, kwargs, tensors[0])
        return self._reordered(func, packet, args, kwargs)

    def _narrow(self, func, packet, args, kwargs, like):
        """A result in the dtype of ``like``, rounded once, and in place where the operation is."""
        wide = [_widened(t) for t in args]
        options = {name: _widened(value) for name, value in kwargs.items()}
        made = self._reordered(func, packet, wide, options)
        if func._schema.name.endswith("_"):
            return args[0].copy_(self._by_chance(made, args[0]))
        if not isinstance(made, tuple):
            return self._by_chance(made, like)
        # A GPU's mean and 1 / deviation stay float32.
        kept = 1 if packet is aten.native_layer_norm and not like.is_cpu else len(made)
        rounded = [t if t is None else self._by_chance(t, like) for t in made[:kept]]
        return (*rounded, *made[kept:])

    def _by_chance(self, wide, like):
        """wide (float32) in the dtype of ``like``; each neighbour as likely as it is near."""
        if wide.dtype != torch.float32:
            return wide.to(like.dtype)
        info = torch.finfo(like.dtype)
        power = torch.ldexp(torch.ones_like(wide), wide.frexp().exponent - 1)  # at most |wide|
        step = (power * info.eps).clamp(min=info.smallest_normal * info.eps)
        chance = torch.rand(wide.shape, generator=self.generator).to(wide.device) - 0.5
        size = wide.abs() + chance * step
        size = torch.where(wide.abs() < info.smallest_normal, size, torch.maximum(size, power))
        return torch.where(wide == 0, wide, size.copysign(wide)).to(like.dtype)

    def _reordered(self, func, packet, args, kwargs):
        if packet in PRODUCTS:
            return self._product(func, PRODUCTS[packet], args, kwargs)
        if packet in SUMS:
            return self._sum(func, args, kwargs)
        if packet in ALONG and args[0].dim():
            return self._along(func, ALONG[packet], args, kwargs)
        if packet is aten.native_layer_norm and len(args[1]) == 1:
            return self._norm(func, *args)
        if packet is aten.native_layer_norm_backward and len(args[2]) == 1 and args[1].numel():
            return self._norm_backward(func, *args)
        if packet is aten.convolution and args[0].dim() == 4:
            return self._convolution(func, *args)
        if packet is aten.convolution_backward and args[0].dim() == 4:
            return self._convolution_backward(func, *args)
        if packet in SCATTERED and accumulates(args, kwargs):
            return self._scattered(func, args, kwargs)
        if packet in ADDED:
            return self._added(func, *args, **kwargs)
        if packet in RESIZED and _by_whole_factors(args):
            turned = [t.flip((2, 3)) if isinstance(t, Tensor) else t for t in args]
            return func(*turned, **kwargs).flip((2, 3))
        return func(*args, **kwargs)

    def _coin(self) -> bool:
        return torch.rand((), generator=self.generator).item() < 0.5

    def _order(self, t: Tensor, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator).to(t.device)

    def _product(self, func, places, args, kwargs):
        args, ((first, dim), _) = list(args), places
        order = self._order(args[first], args[first].shape[dim])
        for place, dim in places:
            args[place] = args[place].index_select(dim, order)
        return func(*args, **kwargs)

    def _sum(self, func, args, kwargs):
        t, *rest = args
        for dim in axes(t, rest):
            t = t.index_select(dim, self._order(t, t.shape[dim]))
        return func(t, *rest, **kwargs)

    def _along(self, func, place, args, kwargs):
        dim = args[place]
        order = self._order(args[0], args[0].shape[dim])
        turned = [t.index_select(dim, order) if isinstance(t, Tensor) else t for t in args]
        return func(*turned, **kwargs).index_select(dim, order.argsort())

    def _norm(self, func, x, shape, weight, bias, eps):
        order = self._order(x, x.shape[-1])
        small = [t if t is None else t[order] for t in (weight, bias)]
        y, *moments = func(x[..., order], shape, *small, eps)
        return y[..., order.argsort()], *moments

    def _norm_backward(self, func, dy, x, shape, mean, rstd, weight, bias, mask):
        rows, columns = self._order(x, x[..., 0].numel()), self._order(x, x.shape[-1])
        turned = [t.reshape(len(rows), -1)[rows] for t in (dy, x, mean, rstd)]
        turned[:2] = [t[:, columns] for t in turned[:2]]
        small = [t if t is None else t[columns] for t in (weight, bias)]
        dx, *grads = func(*turned[:2], shape, *turned[2:], *small, mask)
        rows, columns = rows.argsort(), columns.argsort()
        if mask[0]:
            dx = dx[rows][:, columns].view(x.shape)
        pairs = zip(grads, mask[1:], strict=True)
        return dx, *(t[columns] if wanted else t for t, wanted in pairs)

    def _convolution(self, func, x, weight, bias, *options):
        transposed, groups = options[3], options[5]
        if groups == 1:
            inputs = self._order(x, x.shape[1])
            x, weight = x[:, inputs], weight.index_select(0 if transposed else 1, inputs)
        turn = self._turn(options)
        return turn(func(turn(x), turn(weight), bias, *turn.options), back=True)

    def _convolution_backward(self, func, dy, x, weight, sizes, *options):
        *options, mask = options
        transposed, groups, turn = options[3], options[5], self._turn(options)
        samples = self._order(x, x.shape[0])
        dy, x, weight = turn(dy[samples]), turn(x[samples]), turn(weight)
        outputs, axis = torch.arange(dy.shape[1], device=dy.device), 1 if transposed else 0
        if groups == 1:
            outputs = self._order(dy, dy.shape[1])
            dy, weight = dy[:, outputs], weight.index_select(axis, outputs)
        dx, dweight, dbias = func(dy, x, weight, sizes, *turn.options, mask)
        samples, outputs = samples.argsort(), outputs.argsort()
        dx = turn(dx[samples], back=True) if mask[0] else dx
        if mask[1]:
            dweight = turn(dweight, back=True)
            dweight = dweight.index_select(axis, outputs) if groups == 1 else dweight
        return dx, dweight, dbias[outputs] if mask[2] else dbias

    def _turn(self, options) -> "_Turn":
        """One of the eight ways to look at a map, for a convolution with these options."""
        flips = [dim for dim in (2, 3) if self._coin()]
        return _Turn(flips, self._coin(), options)

    def _scattered(self, func, args, kwargs):
        target, indices, values, *rest = args
        indices = torch.broadcast_tensors(*indices)
        one = target.shape[len(indices) :]
        order = self._order(values, indices[0].numel())
        values = values.expand(*indices[0].shape, *one).reshape(-1, *one)[order]
        return func(target, [i.flatten()[order] for i in indices], values, *rest, **kwargs)

    def _added(self, func, t, dim, index, source, **kwargs):
        order = self._order(index, len(index))
        return func(t, dim, index[order], source.index_select(dim, order), **kwargs)


def _widened(given):
    """float32 for a narrow tensor, and for a narrow dtype that is asked for."""
    if isinstance(given, Tensor):
        return given.float() if given.dtype in NARROW else given
    return torch.float32 if isinstance(given, torch.dtype) and given in NARROW else given


def axes(t: Tensor, rest) -> list[int]:
    """The axes of a sum of t whose further arguments are ``rest``."""
    dims = rest[0] if rest and not isinstance(rest[0], bool) else None
    dims = [dims] if isinstance(dims, int) else dims
    if t.dim() == 0:
        return []
    return [d % t.dim() for d in dims] if dims else list(range(t.dim()))


def accumulates(args, kwargs) -> bool:
    """Whether an index_put adds up, by whole rows of its target."""
    adds = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    return (
        adds
        and args[0].numel() > 0
        and all(i is not None and i.dtype == torch.int64 for i in args[1])
    )


def _told_float32(packet, args) -> bool:
    """Whether a softmax of narrow numbers is to give float32, as one on a GPU may be."""
    return packet in (aten._softmax, aten._log_softmax) and args[2]


def _by_whole_factors(args) -> bool:
    """Whether a resize looks the same from both ends: by whole factors, or by given sizes."""
    given = [s for a in args[1:] for s in (a if isinstance(a, (list, tuple)) else [a])]
    return all(s.is_integer() for s in given if isinstance(s, float))


class _Turn:
    """A map or a kernel flipped along some axes, then transposed or not; ``back`` undoes both.

    options: of the convolution of such maps. With a stride nothing is flipped: what a stride
        leaves over is at one end.
    """

    def __init__(self, flips: list[int], transposes: bool, options):
        stride, transposed = options[0], options[3]
        self.flips = [] if transposed or any(s != 1 for s in stride) else flips
        self.transposes = transposes
        self.options = [
            option[::-1] if transposes and isinstance(option, (list, tuple)) else option
            for option in options
        ]

    def __call__(self, t: Tensor, back: bool = False) -> Tensor:
        t = t if back else t.flip(self.flips)
        if self.transposes:  # laid out as what is given
            rows = t.is_contiguous() or not t.is_contiguous(memory_format=torch.channels_last)
            form = torch.contiguous_format if rows else torch.channels_last
            t = t.mT.contiguous(memory_format=form)
        return t.flip(self.flips) if back else t
