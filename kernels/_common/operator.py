# SPDX-License-Identifier: Apache-2.0
"""One operation with a hand-written backward, declared once: operators, fakes and autograd.

Defining a subclass of ``Operator`` registers

    samfast::NAME            what users and torch.compile call; autograd hangs on it
    samfast::NAME_forward    of the same inputs; returns all that is made, kept tensors included
    samfast::NAME_backward   of gradients, what is kept and inputs; returns gradients

The last two have no autograd of their own. Schemas name all arguments, and the backward gets its
arguments by name. ``task_core/op.py`` is a short example.
"""

import torch
from torch import Tensor

from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.once import once_differentiable

_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView


class Arguments:
    """The arguments of a schema such as ``"Tensor x, Tensor?[] more, float scaling"``."""

    def __init__(self, text: str):
        self.text = text
        pairs = [argument.split() for argument in text.split(", ")]
        self.kinds = {name: kind for kind, name in pairs}
        self.names = tuple(self.kinds)
        self.tensors = tuple(name for name in self.names if self.kinds[name].startswith("Tensor"))
        self.lists = {name for name in self.tensors if self.kinds[name].endswith("[]")}

    def without_backend(self, values) -> tuple:
        at = self.names.index("backend")
        return (*values[:at], *values[at + 1 :])

    def result(self, names) -> str:
        """The schema of a result that has the arguments of these names."""
        kinds = [self.kinds[name] for name in names]
        return kinds[0] if len(kinds) == 1 else f"({', '.join(kinds)})"


class Operator:
    """Base of the declarations. A subclass's docstring says what is saved.

    name: of the operator, without its namespace
    inputs: schema of the inputs, with ``str backend``
    makes: schema of what ``forward`` makes
    returns: names of what users get of it, of which the last may be a list; all where empty
    labels: schema of what users get, where that has names
    backward_inputs: schema of the backward. Its names are those of inputs, of what is made, ``d``
        and the name of what is returned for a gradient, ``needs``, ``backend`` and facts. The
        tensors that it names are what autograd saves. An optional one that is not there is None.
    backward_makes: schema of what the backward returns
    gradients: names of the inputs that have gradients. ``needs`` has an entry for each, or for each
        tensor of a list, and the backward returns a gradient for each entry that is needed. Names
        joined by ``+`` share an entry. Without ``needs``, the backward returns one for each name,
        stacked for a list. Autograd casts gradients to their inputs' dtypes.
    residual: input that is added to what is first returned, so that they share a gradient
    fake_path: path on which ``forward`` runs to tell the shapes of its results
    fake_backward_path: the same of ``backward``, for gradients that are not contiguous
    has_forward, has_backward: whether there are operators of these names
    """

    name: str
    inputs: str
    makes: str
    returns: str = ""
    labels: str = ""
    backward_inputs: str
    backward_makes: str = "Tensor[]"
    gradients: str
    residual: str = ""
    fake_path = None
    fake_backward_path = None
    has_forward = True
    has_backward = True

    @staticmethod
    def path(backend: str, **others):
        """What runs on this backend; others: all other arguments of a forward or backward."""

    @staticmethod
    def forward(path, *inputs):
        """What is made of the inputs, which come in order but for backend."""
        raise NotImplementedError

    @staticmethod
    def backward(path, *inputs):
        """Gradients from the backward's inputs but for backend; None where one is not needed."""
        raise NotImplementedError

    @classmethod
    def fake(cls, *inputs):
        """What ``forward`` makes, without data; the inputs come with backend."""
        return cls.forward(cls.fake_path, *cls.arguments.without_backend(inputs))

    @classmethod
    def fake_backward(cls, *inputs):
        """What ``backward`` makes, without data. By itself, contiguous tensors like the inputs."""
        if cls.fake_backward_path is not None:
            return cls.backward(cls.fake_backward_path, *cls.back.without_backend(inputs))
        values = dict(zip(cls.back.names, inputs, strict=True))
        wanted = cls.entries(values)
        needed = [group for group, need in zip(wanted, values["needs"], strict=True) if need]
        return [t.new_empty(t.shape) for group in needed for t in group]

    @classmethod
    def light(cls, path, *inputs):
        """What users get where nothing is kept for a backward."""
        return cls.returned(cls.forward(path, *inputs))

    @staticmethod
    def spare(need: dict) -> tuple[str, ...]:
        """Names of tensors that the backward will not read, so that they are not saved.

        need: by an input's name whether it needs its gradient, for a list a list
        """
        return ()

    @staticmethod
    def facts(**inputs) -> dict:
        """Arguments of the backward that follow from the inputs and are not tensors."""
        return {}

    @staticmethod
    def wants(need: dict, given: set[str]) -> dict:
        """``need`` without the inputs that the outputs in ``given``, which have gradients, are not
        made of: their gradients are None."""
        return need

    @classmethod
    def entries(cls, values: dict) -> list[list]:
        """What belongs to each entry of ``needs``, of values by name."""
        found = []
        for names in cls.groups:
            is_list = names[0] in cls.arguments.lists
            found += [[v] for v in values[names[0]]] if is_list else [[values[n] for n in names]]
        return found

    @classmethod
    def returned(cls, made):
        """What users get of what ``forward`` made."""
        named = dict(zip(cls.made.names, _as_tuple(made), strict=True))
        return _as_result([named[name] for name in cls.returned_names])

    def __init_subclass__(cls):
        cls.arguments, cls.made = Arguments(cls.inputs), Arguments(cls.makes)
        cls.back = Arguments(cls.backward_inputs)
        cls.returned_names = tuple(cls.returns.split()) or cls.made.names
        cls.groups = [entry.split("+") for entry in cls.gradients.split()]
        _register(cls)


def _as_tuple(made) -> tuple:
    return (made,) if isinstance(made, Tensor) else tuple(made)


def _as_result(values):
    return values[0] if len(values) == 1 else tuple(values)


def _spread(values) -> list:
    """The tensors of these, those of a list one after another."""
    return [t for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]


def _nested(names, flat, lengths: dict[str, int]) -> dict:
    """What was spread, by name; lengths: of the lists among them."""
    flat = iter(flat)
    return {
        name: [next(flat) for _ in range(lengths[name])] if name in lengths else next(flat)
        for name in names
    }


def _register(cls: type[Operator]) -> None:
    """Define the operators and hang bodies, fakes and autograd on them."""
    name = f"samfast::{cls.name}"
    outputs = cls.labels or cls.made.result(cls.returned_names)
    _define(cls, name, cls.arguments, outputs, cls.light, lambda *a: cls.returned(cls.fake(*a)))
    if cls.has_forward:
        outputs = cls.made.result(cls.made.names)
        _define(cls, f"{name}_forward", cls.arguments, outputs, cls.forward, cls.fake)
    if cls.has_backward:
        runs = (_made_only(run) for run in (cls.backward, cls.fake_backward))
        _define(cls, f"{name}_backward", cls.back, cls.backward_makes, *runs)
    apply = _function(cls).apply

    @torch.library.impl(name, "Autograd")
    def autograd(*args):
        values = dict(zip(cls.arguments.names, args, strict=True))
        flat = _spread(values[name] for name in cls.arguments.tensors)
        wanted = any(t is not None and t.requires_grad for t in flat)
        if not (wanted and torch.is_grad_enabled()):  # nothing is kept, not for a moment either
            with _below_autograd():
                return getattr(torch.ops.samfast, cls.name)(*args)
        return _as_result(_grouped(cls, _as_tuple(apply(values, *flat))))


def _define(cls: type[Operator], name: str, arguments: Arguments, outputs: str, run, fake) -> None:
    """One operator: its schema, its body, which takes the path for its backend, and its fake."""
    torch.library.define(name, f"({arguments.text}) -> {outputs}")

    @implement(name)
    def body(*args):
        path = cls.path(**dict(zip(arguments.names, args, strict=True)))
        with without_autocast(_device(args)):
            return run(path, *arguments.without_backend(args))

    @torch.library.register_fake(name)
    def without_data(*args):
        with without_autocast(_device(args)):
            return fake(*args)


def _device(args) -> str:
    return next(t for t in _spread(args) if isinstance(t, Tensor)).device.type


def _made_only(run):
    """A backward as its operator returns it: without gradients that are not needed."""

    def backward(*args):
        made = run(*args)
        return made if isinstance(made, tuple) else [d for d in made if d is not None]

    return backward


def _grouped(cls: type[Operator], flat: tuple) -> list:
    """What is returned, or its gradients, of one tensor after another: a list at the end again."""
    if cls.returned_names[-1] not in cls.made.lists:
        return list(flat)
    before = len(cls.returned_names) - 1
    return [*flat[:before], list(flat[before:])]


def _function(cls: type[Operator]) -> type[torch.autograd.Function]:
    """Autograd of an operation. It is applied to the values by name, then to their tensors."""
    tensors, back = cls.arguments.tensors, cls.back
    saved = [name for name in back.names if name in (*tensors, *cls.made.names)]
    plain = [name for name in back.names if name in cls.arguments.names and name not in tensors]
    run = getattr(torch.ops.samfast, f"{cls.name}_forward" if cls.has_forward else cls.name)

    def forward(ctx, values, *flat):
        with _below_autograd():
            made = _as_tuple(run(*values.values()))
        known = {**values, **dict(zip(cls.made.names, made, strict=True))}
        ctx.lengths = {n: len(known[n]) for n in cls.arguments.lists | cls.made.lists}
        spare = cls.spare(_nested(tensors, ctx.needs_input_grad[1:], ctx.lengths))
        ctx.save_for_backward(*_spread(None if n in spare else known[n] for n in saved))
        ctx.others = {**{name: values[name] for name in plain}, **cls.facts(**values)}
        ctx.dtypes = [None if t is None else t.dtype for t in flat]
        out = _spread(known[name] for name in cls.returned_names)
        ctx.like = [(t.shape, t.dtype) for t in out]
        ctx.mark_non_differentiable(*(t for t in out if not t.is_floating_point()))
        ctx.set_materialize_grads(False)
        return _as_result(out)

    @once_differentiable
    def backward(ctx, *incoming):
        used = next((d for d in incoming if d is not None), None)
        if used is None:
            return (None,) * len(ctx.needs_input_grad)
        given = dict(zip(cls.returned_names, _grouped(cls, incoming), strict=True))
        need = _nested(tensors, ctx.needs_input_grad[1:], ctx.lengths)
        need = cls.wants(need, {name for name, d in given.items() if d is not None})
        # A checkpoint computes again when it is asked for what was saved, with autograd.
        values = {**ctx.others, **_nested(saved, ctx.saved_tensors, ctx.lengths)}
        for (name, d), (shape, dtype) in zip(given.items(), ctx.like, strict=False):
            if d is None and back.kinds.get(f"d{name}") == "Tensor":
                d = used.new_zeros((), dtype=dtype).expand(shape)
            values[f"d{name}"] = d
        for name in saved:
            if values[name] is None and back.kinds[name] == "Tensor":  # spared
                values[name] = used.new_empty(0)
        grads = _gradients(cls, values, need)
        if cls.residual:
            grads[cls.residual] = values[f"d{cls.returned_names[0]}"]
        flat = _spread(grads.get(name, need[name]) for name in tensors)
        asked = zip(flat, ctx.needs_input_grad[1:], ctx.dtypes, strict=True)
        return None, *(d.to(dtype) if need and d is not None else None for d, need, dtype in asked)

    name = f"{cls.name.title().replace('_', '')}Function"
    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), {**body, "__doc__": cls.__doc__})


def _gradients(cls: type[Operator], values: dict, need: dict) -> dict:
    """Gradients by name from one call of the backward; lists of them for lists."""
    values["needs"] = [any(group) for group in cls.entries(need)]
    grads = {n: [None] * len(w) if isinstance(w, list) else None for n, w in need.items()}
    if not any(values["needs"]):
        return grads
    given = [values.get(name) for name in cls.back.names]
    with _below_autograd():
        if cls.has_backward:
            made = getattr(torch.ops.samfast, f"{cls.name}_backward")(*given)
        else:
            made = _made_only(cls.backward)(None, *given)
    if "needs" not in cls.back.names:  # one of each name, those of a list stacked
        names = [name for group in cls.groups for name in group]
        pairs = zip(names, made, strict=True)
        return grads | {n: list(d.unbind()) if n in cls.arguments.lists else d for n, d in pairs}
    made = iter(made)
    for names in cls.groups:
        if names[0] in cls.arguments.lists:
            grads[names[0]] = [next(made) if wanted else None for wanted in need[names[0]]]
        elif any(need[name] for name in names):
            grads |= {name: next(made) for name in names}
    return grads
