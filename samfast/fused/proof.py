# SPDX-License-Identifier: Apache-2.0
"""Whether a block or an attention computes what its name says.

Copies of segment_anything change these classes, and programs patch them. A module is fused where
its forward takes what the original takes, its parts are exactly the original's, and runs of it
agree with the formula in ``samfast.kernels.sam_block.reference``.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

from samfast.fused.cases import ATTENTION, BLOCK, MLP, ROLES, below, case_of, inside
from samfast.fused.families import family_of
from samfast.fused.parts import Family, Layout
from samfast.integrations.plain_code import PlainCode, unchanged
from samfast.integrations.probe import apart
from samfast.integrations.swap import foreign_method, methods_of, own_method

LARGEST_WINDOW = 32  # that a run is made at
LAYERS = (nn.LayerNorm, nn.Linear, nn.GELU)
_NAMES = frozenset("weight bias normalized_shape eps approximate".split()).union(
    Layout.TABLES,
    Layout.IN_BLOCK,
    Layout.IN_ATTENTION,
    Layout.IN_MLP,
    Layout.OPTIONS,
    [Layout.WINDOW],
)
_codes: dict[type[nn.Module], PlainCode] = {}
_methods: dict[type[nn.Module], tuple[dict[str, FunctionType], tuple[object, ...], str | None]] = {}
_verdicts: dict[tuple[Any, ...], str | None] = {}

_Parts = dict[str, tuple[str, nn.Module]]  # by name: its role, and what has it


def objection(module: nn.Module, ask: bool = True) -> str | None:
    """Why ``module``, a block or an attention, is not what it is called; None where it is.

    Answers from memory while its classes' code, its parts and its sizes stay as they are, and
    otherwise runs a probe on a CPU; without ``ask`` says None instead. A compiled graph keeps the
    answer it was traced with.
    """
    family = family_of(type(module))
    assert family is not None, type(module)
    parts = _stock_parts(family, module)
    codes: list[tuple[type[nn.Module], object]] = []
    for kind in (*_classes(family, module), *LAYERS):
        code, problem = _code(family, kind)
        if problem is not None:
            return _signatures(family, module) or problem
        codes.append((kind, code))
    for name, (role, part) in parts.items() if family.published else ():
        if (method := _own_method(family, module, role, part)) is not None:
            return f"its {name}.{method} was replaced" if name else f"its {method} was replaced"
    held = [(name, *_held(family, part)) for name, (_, part) in parts.items()]
    own = family.parts
    has_tables, has_bias = _has(parts, own.OPTIONS[2]), _has(parts, own.IN_ATTENTION[0], "bias")
    kept = tuple(codes), tuple(held), has_tables, has_bias
    sizes = tuple([getattr(p, n, None) for role, p in parts.values() for n in _read(own, role)])
    for number in sizes:
        if not isinstance(number, (bool, int, float)):
            return f"one of its sizes is a {type(number).__name__}, not a number"
        if number < 0:
            return f"one of its sizes is {number}"
    width = getattr(getattr(module, own.IN_BLOCK[0], None), "normalized_shape", None)
    for key, judge in ((kept, _judgement), ((kept, sizes, width), _second_look)):
        if key not in _verdicts:
            if not ask:
                return None
            _verdicts[key] = judge(family, module, parts)
        if _verdicts[key] is not None:
            return _verdicts[key]
    return None


def stock_code_watch(module: nn.Module) -> Callable[[], bool]:
    """What tells whether the code of the stock classes of a module is as it is now.

    The module's family must be one whose code is read, not a published one.
    """
    family = family_of(type(module))
    assert family is not None, type(module)
    return unchanged([_codes[kind] for kind in (*_classes(family, module), *LAYERS)])


# What torch.compile calls while it traces, rather than trace it.
objection._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it


def _read(own: type[Layout], role: str) -> tuple[str, ...]:
    """The numbers that the formula, or the forward, reads of a part."""
    numbers = {BLOCK: (own.WINDOW,), ATTENTION: own.OPTIONS, MLP: ()}[role]
    return (*numbers, *below(own, role, own.FLAGS))


def _code(family: Family, kind: type[nn.Module]) -> tuple[object, str | None]:
    """What tells states of a class's code apart, and what is not as it should be."""
    if family.published and kind not in LAYERS:
        return _published(kind)
    if kind not in _codes:
        _codes[kind] = PlainCode(kind, _NAMES)
    return _codes[kind]()


def _published(kind: type[nn.Module]) -> tuple[tuple[object, ...], str | None]:
    """The methods of a library's class, looked at again once one was replaced."""
    known, state, problem = _methods.get(kind, (None, (), None))
    if known is None or any(getattr(kind, n, None) is not m for n, m in known.items()):
        known, replaced = methods_of(kind), foreign_method(kind)
        state = tuple(known.values())
        problem = replaced and f"the {replaced} of {kind.__name__} was replaced"
        _methods[kind] = known, state, problem
    return state, problem


def _own_method(family: Family, module: nn.Module, role: str, part: nn.Module) -> str | None:
    """A method of a library's class that this part has another of."""
    block = isinstance(module, family.block)
    attention = family.attention_of(module) if block else family.attention
    kinds = dict(zip(ROLES, (family.block, attention, family.mlp), strict=True))
    methods, _, _ = _methods[kinds[role]]
    return own_method(part, methods)


def _classes(family: Family, module: nn.Module) -> tuple[type[nn.Module], ...]:
    if isinstance(module, family.attention):
        return (family.attention,)
    return family.block, family.attention_of(module), family.mlp, *family.others


def _stock_parts(family: Family, module: nn.Module) -> _Parts:
    """The module itself and those of its children whose class is the library's, by name."""
    if isinstance(module, family.attention):
        return {"": (ATTENTION, module)}
    children = module._modules
    parts: _Parts = {"": (BLOCK, module)}
    _, name_of_attn, _, name_of_mlp = family.parts.IN_BLOCK
    attn, mlp = children.get(name_of_attn), children.get(name_of_mlp)
    stock = type(attn) is family.attention or type(attn) in family.attentions
    if attn is not None and (stock or hasattr(attn, "left_alone")):  # as a FusedAttention has
        parts[name_of_attn] = (ATTENTION, attn)
    if mlp is not None and type(mlp) is family.mlp:
        parts[name_of_mlp] = (MLP, mlp)
    return parts


def _has(parts: _Parts, *names: str) -> bool:
    """Whether what these names lead to from the attention is there, and true where it is a flag."""
    value: object = next((part for role, part in parts.values() if role == ATTENTION), None)
    for name in names:
        value = getattr(value, name, None)
    return value is not None and value is not False


def _held(family: Family, module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of the module's children, parameters and buffers."""
    stores = (module._modules, module._parameters, module._buffers)
    children, tensors, buffers = (
        tuple([name for name, value in store.items() if value is not None]) for store in stores
    )
    if getattr(module, "_is_replica", False):  # DataParallel's hold parameters as attributes
        tensors += tuple([name for name in family.parts.TABLES if name in vars(module)])
    return children, tensors, buffers


def _structure(family: Family, name: str, role: str, module: nn.Module) -> str | None:
    """What the module has that the original does not have, or the other way round."""
    it, own = f"its {name}" if name else "it", family.parts
    children, tensors, buffers = _held(family, module)
    idle = below(own, role, (*own.IDENTITIES, *own.DROPOUTS, *own.OTHERS))
    known = own.TABLES if role == ATTENTION else ()
    for what, names, expected in (
        ("child", children, (*inside(own, role), *idle)),
        ("parameter", tensors, known),
        ("buffer", buffers, below(own, role, own.BUFFERS)),
    ):
        if more := [n for n in names if n not in expected]:
            return f"{it} has a {what} {more[0]}, which would be left out"
    needed = [(part, children) for part in (*inside(own, role), *idle)]
    needed += [(buffer, buffers) for buffer in below(own, role, own.BUFFERS)]
    if role == ATTENTION and own.has_tables(module):
        needed += [(table, tensors) for table in own.TABLES]
    missing = [part for part, present in needed if part not in present]
    return f"{it} has no {missing[0]}" if missing else None


def _judgement(family: Family, module: nn.Module, parts: _Parts) -> str | None:
    for name, (role, part) in parts.items():
        if (problem := _structure(family, name, role, part)) is not None:
            return problem
    if (problem := _signatures(family, module)) is not None:
        return problem
    block = isinstance(module, family.block)
    cases = ((4, 5, 3), (0, 6, 7)) if block else ((0, 6, 7),)
    problems = (apart(case_of(family, module, *case).problem) for case in cases)
    return next((p for p in problems if p is not None), None)


def _signatures(family: Family, module: nn.Module) -> str | None:
    """Whether the forwards take what they should; a published library's are as they are."""
    for kind in () if family.published else _classes(family, module):
        if (taken := signature(kind)) != family.parts.takes:
            return f"the forward of {kind.__name__} takes {taken}, not {family.parts.takes}"
    return None


def _second_look(family: Family, module: nn.Module, parts: _Parts) -> str | None:
    """At the module's own window, up to a size where that takes no time, heads and scale."""
    side = min(getattr(module, family.parts.WINDOW, 0), LARGEST_WINDOW)
    size = (side - side // 4, side - 1) if side else (3, 5)
    return apart(case_of(family, module, side, *size).deviation)


def signature(kind: type[nn.Module]) -> str:
    """What the forward of a class takes, as it is written."""
    found = inspect.signature(kind.forward, follow_wrapped=False)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return str(inspect.Signature(bare))
