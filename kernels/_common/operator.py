# SPDX-License-Identifier: Apache-2.0
"""One operation with a hand-written backward, declared once: operators, fakes and autograd.

Defining a subclass of ``Operator`` registers

    samfast::NAME            what users and torch.compile call; it has autograd
    samfast::NAME_forward    takes the same inputs; returns all results, kept tensors included
    samfast::NAME_backward   takes gradients, what is kept and inputs; returns gradients

The last two have no autograd. Schemas name all arguments, and the backward gets its arguments by
name. ``task_core/op.py`` is a short example.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.autograd import (
    Plan,
    as_result,
    as_tuple,
    below_autograd,
    function,
    made_only,
    spread,
    with_list,
)
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.planned import PLAIN, Planned, is_direct
from samfast.kernels._common.ranges import stage


class Arguments:
    """The arguments of a schema such as ``"Tensor x, Tensor?[] more, float scaling"``."""

    def __init__(self, text: str):
        self.text = text
        pairs = [argument.split() for argument in text.split(", ")]
        self.kinds = {name: kind for kind, name in pairs}
        self.names = tuple(self.kinds)
        self.tensors = tuple(name for name in self.names if self.kinds[name].startswith("Tensor"))
        self.at = self.names.index("backend") if "backend" in self.names else len(self.names)
        self.lists = {name for name in self.tensors if self.kinds[name].endswith("[]")}

    def without_backend(self, values) -> tuple:
        return (*values[: self.at], *values[self.at + 1 :])

    def result(self, names) -> str:
        """The schema of a result that has the arguments of these names."""
        kinds = [self.kinds[name] for name in names]
        return kinds[0] if len(kinds) == 1 else f"({', '.join(kinds)})"


class Operator:
    """Base class of the declarations. A subclass's docstring says what is saved.

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
        stacked for a list.
    casts: names of inputs whose gradients come in other dtypes than theirs, to be cast
    residual: input that is added to what is first returned, so that they share a gradient
    fake_path: path on which ``forward`` runs to tell the shapes of its results
    fake_backward_path: the same of ``backward``, for gradients that are not contiguous
    has_forward, has_backward: whether there are operators of these names
    planned: whether the bodies run by launch plans, see ``planned.py``
    """

    name: str
    inputs: str
    makes: str
    returns: str = ""
    labels: str = ""
    backward_inputs: str
    backward_makes: str = "Tensor[]"
    gradients: str
    casts: str = ""
    residual: str = ""
    fake_path = None
    fake_backward_path = None
    has_forward = True
    has_backward = True
    planned = False

    @staticmethod
    def path(backend: str, **others):
        """The path for this backend; others: all other arguments of a forward or backward."""

    @staticmethod
    def forward(path, *inputs):
        """The results; the inputs come in order, without backend."""
        raise NotImplementedError

    @staticmethod
    def backward(path, *inputs):
        """Gradients from the backward's inputs without backend; None where one is not needed."""
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
        groups = []
        for names in cls.groups:
            whole = [values[name] for name in names]
            groups += [[t] for t in whole[0]] if names[0] in cls.arguments.lists else [whole]
        needed = [group for group, need in zip(groups, values["needs"], strict=True) if need]
        return [t.new_empty(t.shape) for group in needed for t in group]

    @classmethod
    def light(cls, path, *inputs):
        """The users' results when nothing is kept for a backward."""
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
    def call(cls, *args: Any) -> Any:
        """The users' results, with autograd; through torch's dispatcher if anything may watch."""
        if cls.planned and not torch.compiler.is_compiling() and is_direct():
            flat = cls.flat(args)
            if PLAIN.issuperset(map(type, flat)):
                return cls.autograd(args, flat)
        return getattr(torch.ops.samfast, cls.name)(*args)

    @classmethod
    def returned(cls, made):
        """The part of what ``forward`` made that users get."""
        named = dict(zip(cls.made.names, as_tuple(made), strict=True))
        return as_result([named[name] for name in cls.returned_names])

    def __init_subclass__(cls):
        cls.arguments, cls.made = Arguments(cls.inputs), Arguments(cls.makes)
        cls.back = Arguments(cls.backward_inputs)
        cls.returned_names = tuple(cls.returns.split()) or cls.made.names
        cls.groups = [entry.split("+") for entry in cls.gradients.split()]
        _register(cls)


def _register(cls: type[Operator]) -> None:
    """Define the operators and register their bodies, fakes and autograd."""
    name = f"samfast::{cls.name}"
    outputs = cls.labels or cls.made.result(cls.returned_names)
    cls.bodies = []
    cls.calls = [
        _define(cls, name, cls.arguments, outputs, cls.light, lambda *a: cls.returned(cls.fake(*a)))
    ]
    if cls.has_forward:
        outputs = cls.made.result(cls.made.names)
        cls.calls.append(
            _define(cls, f"{name}_forward", cls.arguments, outputs, cls.forward, cls.fake)
        )
    if cls.has_backward:
        runs = (made_only(run) for run in (cls.backward, cls.fake_backward))
        cls.calls.append(_define(cls, f"{name}_backward", cls.back, cls.backward_makes, *runs))
    plan = Plan(cls, cls.spare is not Operator.spare, cls.wants is not Operator.wants)
    light = cls.calls[0]
    made_of = function(cls, plan)
    apply, apply_directly = made_of.apply, super(torch.autograd.Function, made_of).apply

    def flat_of(args):
        return spread(plan.tensors(args), plan.lists)

    def autograd(args, flat):
        if not _wanted(flat):
            with below_autograd():  # nothing is kept, not for a moment either
                return light(*args)
        # Function.apply looks at each argument for what functorch may have left.
        made = (apply_directly if is_direct() else apply)(args, *flat)
        return with_list(cls, made) if plan.ends_in_list else made

    torch.library.impl(name, "Autograd")(lambda *args: autograd(args, flat_of(args)))
    cls.flat, cls.autograd = staticmethod(flat_of), staticmethod(autograd)


def _wanted(tensors) -> bool:
    """Whether a gradient is wanted, or a tangent, which torch says that there is none of."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _define(cls: type[Operator], name: str, arguments: Arguments, outputs: str, run, fake):
    """One operator: its schema, its body, which takes the path for its backend, and its fake.

    Returns what calls it below autograd.
    """
    torch.library.define(name, f"({arguments.text}) -> {outputs}")

    way = "backward" if name.endswith("_backward") else "forward"

    def body(*args):
        path = cls.path(**dict(zip(arguments.names, args, strict=True)))
        with stage(cls.name, way), without_autocast(_device(args)):
            return run(path, *arguments.without_backend(args))

    @torch.library.register_fake(name)
    def without_data(*args):
        with without_autocast(_device(args)):
            return fake(*args)

    called = getattr(torch.ops.samfast, name.partition("::")[2])
    if not cls.planned:
        implement(name)(body)
        return called
    places = {n: i for i, n in enumerate(arguments.names)}
    single = [places[n] for n in arguments.tensors if n not in arguments.lists]
    lists = [places[n] for n in arguments.names if n in arguments.lists]
    planned = Planned(body, called, single, lists, len(arguments.names))
    cls.bodies.append(planned)
    implement(name)(lambda *args: planned(*args))
    return planned.direct


def _device(args) -> str:
    """Type of the device of the first tensor, which may be in a list."""
    for value in args:
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, Tensor):
            return first.device.type
    raise TypeError("an operator was called without tensors")
