# SPDX-License-Identifier: Apache-2.0
"""Autograd of a declared operation (see operator.py), on positions that are known beforehand.

A GPU waits for its host here, so a call looks nothing up by name.
"""

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from samfast.kernels._common.once import once_differentiable
from samfast.kernels._common.ranges import stage

below_autograd = torch._C._AutoDispatchBelowADInplaceOrView


def as_tuple(made) -> tuple:
    return (made,) if isinstance(made, Tensor) else tuple(made)


def as_result(values):
    return values[0] if len(values) == 1 else tuple(values)


def _picker(names, among) -> Callable:
    """A function that picks the values of these names, in their order, from those of ``among``."""
    at = [among.index(name) for name in names]
    if len(at) > 1:
        return operator.itemgetter(*at)
    return lambda values: tuple([values[i] for i in at])


def spread(values, lists) -> list:
    """The tensors of these, with those of a list one after another; lists: places of lists."""
    flat, after = [], 0
    for at in lists:
        flat += values[after:at]
        flat += values[at]
        after = at + 1
    flat += values[after:]
    return flat


def _gathered(flat: tuple, lists, lengths) -> list:
    """The values before ``spread``; lengths: of the lists."""
    values, start, after = [], 0, 0
    for at, length in zip(lists, lengths, strict=True):
        stop = start + at - after
        values += flat[start:stop]
        start = stop + length
        values.append(flat[stop:start])
        after = at + 1
    values += flat[start:]
    return values


def made_only(run):
    """The gradients that a backward's operator returns: only those that are needed."""

    def backward(*args):
        made = run(*args)
        return made if isinstance(made, tuple) else [d for d in made if d is not None]

    return backward


def with_list(cls: type, flat: tuple) -> tuple:
    """Results, or their gradients, with the list at the end made a list again."""
    before = len(cls.returned_names) - 1
    return *flat[:before], list(flat[before:])


class Plan:
    """The positions of the values that autograd hands on."""

    def __init__(self, cls: type, spares: bool, chooses: bool):
        self.spares, self.chooses = spares, chooses
        inputs, made, back = cls.arguments, cls.made, cls.back
        known = (*inputs.names, *made.names)
        self.saved = [n for n in back.names if n in (*inputs.tensors, *made.names)]
        plain = [n for n in back.names if n in inputs.names and n not in self.saved]
        given = [f"d{name}" for name in cls.returned_names]
        pool = [*self.saved, *plain, *given, "needs"]
        self.facts = [n for n in back.names if n not in pool and "Tensor" not in back.kinds[n]]
        pool += [*self.facts, None]
        self.tensors = _picker(inputs.tensors, inputs.names)
        self.keep, self.others = _picker(self.saved, known), _picker(plain, inputs.names)
        self.returned = _picker(cls.returned_names, known)
        self.asked = _picker([n if n in pool else None for n in back.names], pool)
        self.spared = [i for i, n in enumerate(self.saved) if back.kinds[n] == "Tensor"]
        # A gradient that a backward of several must have is zeros where nobody gives one.
        several = len(given) > 1
        self.musts = [i for i, n in enumerate(given) if several and back.kinds.get(n) == "Tensor"]
        self.ends_in_list = cls.returned_names[-1] in made.lists
        self.returned_lists = [len(given) - 1] if self.ends_in_list else []
        self.groups = [[inputs.tensors.index(name) for name in group] for group in cls.groups]
        self.lists = [i for i, n in enumerate(inputs.tensors) if n in inputs.lists]
        self.saved_lists = [
            i for i, n in enumerate(self.saved) if n in inputs.lists or n in made.lists
        ]
        casts = (*cls.casts.split(), *cls.residual.split())
        self.casts = [inputs.tensors.index(name) for name in casts]
        self.residual = inputs.tensors.index(cls.residual) if cls.residual else None
        self.stacked = "needs" not in back.names


def function(cls: type, plan: Plan) -> type[torch.autograd.Function]:
    """Autograd of an operation, applied to its inputs and then to the tensors among them."""
    run = cls.calls[1 if cls.has_forward else 0]
    names = cls.arguments.tensors

    def forward(ctx, args, *flat):
        with below_autograd():
            values = args + as_tuple(run(*args))
        inputs, kept = plan.tensors(args), plan.keep(values)
        ctx.lengths = [len(inputs[i]) for i in plan.lists]
        ctx.saved_lengths = [len(kept[i]) for i in plan.saved_lists]
        if plan.spares:
            need = _gathered(ctx.needs_input_grad[1:], plan.lists, ctx.lengths)
            spare = cls.spare(dict(zip(names, need, strict=True)))
            kept = [None if n in spare else t for n, t in zip(plan.saved, kept, strict=True)]
        ctx.save_for_backward(*spread(kept, plan.saved_lists))
        ctx.others = plan.others(args)
        if plan.facts:
            found = cls.facts(**dict(zip(cls.arguments.names, args, strict=True)))
            ctx.facts = [found[name] for name in plan.facts]
        if plan.casts:
            ctx.dtypes = [_dtype(inputs[i]) for i in plan.casts]
        out = spread(plan.returned(values), plan.returned_lists)
        ctx.like = [(out[i].shape, out[i].dtype) for i in plan.musts]
        ctx.mark_non_differentiable(*[t for t in out if not t.is_floating_point()])
        ctx.set_materialize_grads(False)
        return as_result(out)

    @once_differentiable
    def backward(ctx, *incoming):
        used = next((d for d in incoming if d is not None), None)
        if used is None:
            return (None,) * len(ctx.needs_input_grad)
        # A checkpoint computes again when it is asked for what was saved, with autograd.
        saved = _gathered(ctx.saved_tensors, plan.saved_lists, ctx.saved_lengths)
        if plan.spares:
            for i in plan.spared:
                saved[i] = used.new_empty(0) if saved[i] is None else saved[i]
        need = _gathered(ctx.needs_input_grad[1:], plan.lists, ctx.lengths)
        given = [*with_list(cls, incoming)] if plan.ends_in_list else [*incoming]
        if plan.chooses:
            there = {n for n, d in zip(cls.returned_names, given, strict=True) if d is not None}
            need = [*cls.wants(dict(zip(names, need, strict=True)), there).values()]
        for i, (shape, dtype) in zip(plan.musts, ctx.like, strict=True):
            if given[i] is None:
                given[i] = used.new_zeros((), dtype=dtype).expand(shape)
        values = (*saved, *ctx.others, *given)
        grads = _gradients(cls, plan, need, values, ctx.facts if plan.facts else ())
        if plan.residual is not None and need[plan.residual]:
            grads[plan.residual] = given[0]
        if plan.casts:
            for i, dtype in zip(plan.casts, ctx.dtypes, strict=True):
                grads[i] = _cast(grads[i], dtype)
        return None, *spread(grads, plan.lists)

    name = f"{cls.name.title().replace('_', '')}Function"
    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), {**body, "__doc__": cls.__doc__})


def _dtype(value) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else value[0].dtype


def _cast(grads, dtype: torch.dtype):
    if isinstance(grads, list):
        return [_cast(d, dtype) for d in grads]
    return None if grads is None else grads.to(dtype)


def _gradients(cls: type, plan: Plan, need: list, values: tuple, facts) -> list:
    """Call the backward once; return the gradient of each input tensor, None where unneeded.

    need: whether each wants one, a tuple for a list   values: in the order of the plan's pool
    """
    needs = []
    for group in plan.groups:
        if group[0] in plan.lists:
            needs += need[group[0]]
        else:
            needs.append(need[group[0]] if len(group) == 1 else any([need[i] for i in group]))
    grads = [None] * len(need)
    for i in plan.lists:
        grads[i] = [None] * len(need[i])
    if True not in needs:
        return grads
    asked = plan.asked((*values, needs, *facts, None))
    with below_autograd():
        if cls.has_backward:
            made = iter(cls.calls[-1](*asked))
        else:
            with stage(cls.name, "backward"):
                made = iter(made_only(cls.backward)(None, *asked))
    for group in plan.groups:
        first = group[0]
        if first in plan.lists and plan.stacked:
            parts = zip(next(made).unbind(), need[first], strict=True)
            grads[first] = [d if wanted else None for d, wanted in parts]
        elif first in plan.lists:
            grads[first] = [next(made) if wanted else None for wanted in need[first]]
        elif len(group) == 1:
            d = next(made) if plan.stacked or need[first] else None
            grads[first] = d if need[first] else None
        elif any([need[i] for i in group]):
            for i in group:
                d = next(made)
                grads[i] = d if need[i] else None
    return grads
