# SPDX-License-Identifier: Apache-2.0
"""Prove that a block or an attention computes what its name says.

Copies of segment_anything change these classes, and programs patch them. A module is fused only if
its forward has the original's arguments and its parts are exactly the original's. Its runs must
also agree with the formula in ``samfast.kernels.sam_block.reference``.
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

LARGEST_WINDOW = 32  # in a run
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

_Parts = dict[str, tuple[str, nn.Module]]  # name -> its role, and the module


def objection(module: nn.Module, ask: bool = True) -> str | None:
    """Say why ``module``, a block or an attention, is not what its name says; None if it is.

    The answer is remembered while its classes' code, its parts and its sizes stay the same.
    Otherwise it runs a probe on a CPU, or returns None without ``ask``. A compiled graph keeps the
    answer from its trace.
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
    """Return a mark that changes with the code of a module's stock classes.

    The module's family must be one whose code is read, not a published one.
    """
    family = family_of(type(module))
    assert family is not None, type(module)
    return unchanged([_codes[kind] for kind in (*_classes(family, module), *LAYERS)])


# torch.compile calls this while tracing, and does not trace it.
objection._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it


def _read(own: type[Layout], role: str) -> tuple[str, ...]:
    """Return the numbers that the formula or the forward reads from a part."""
    numbers = {BLOCK: (own.WINDOW,), ATTENTION: own.OPTIONS, MLP: ()}[role]
    return (*numbers, *below(own, role, own.FLAGS))


def _code(family: Family, kind: type[nn.Module]) -> tuple[object, str | None]:
    """Return a mark for the state of a class's code, and what is wrong with it."""
    if family.published and kind not in LAYERS:
        return _published(kind)
    if kind not in _codes:
        _codes[kind] = PlainCode(kind, _NAMES)
    return _codes[kind]()


def _published(kind: type[nn.Module]) -> tuple[tuple[object, ...], str | None]:
    """Check the methods of a library's class, again whenever one was replaced."""
    known, state, problem = _methods.get(kind, (None, (), None))
    if known is None or any(getattr(kind, n, None) is not m for n, m in known.items()):
        known, replaced = methods_of(kind), foreign_method(kind)
        state = tuple(known.values())
        problem = replaced and f"the {replaced} of {kind.__name__} was replaced"
        _methods[kind] = known, state, problem
    return state, problem


def _own_method(family: Family, module: nn.Module, role: str, part: nn.Module) -> str | None:
    """Name a method that this part has replaced in a library's class."""
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
    """Return the module and those children whose class is the library's, by name."""
    if isinstance(module, family.attention):
        return {"": (ATTENTION, module)}
    children = module._modules
    parts: _Parts = {"": (BLOCK, module)}
    _, name_of_attn, _, name_of_mlp = family.parts.IN_BLOCK
    attn, mlp = children.get(name_of_attn), children.get(name_of_mlp)
    stock = type(attn) is family.attention or type(attn) in family.attentions
    if attn is not None and (stock or hasattr(attn, "left_alone")):  # a FusedAttention
        parts[name_of_attn] = (ATTENTION, attn)
    if mlp is not None and type(mlp) is family.mlp:
        parts[name_of_mlp] = (MLP, mlp)
    return parts


def _has(parts: _Parts, *names: str) -> bool:
    """True if these paths from the attention exist, and lead to true if they are flags."""
    value: object = next((part for role, part in parts.values() if role == ATTENTION), None)
    for name in names:
        value = getattr(value, name, None)
    return value is not None and value is not False


def _held(family: Family, module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return names of the module's children, parameters and buffers."""
    stores = (module._modules, module._parameters, module._buffers)
    children, tensors, buffers = (
        tuple([name for name, value in store.items() if value is not None]) for store in stores
    )
    if getattr(module, "_is_replica", False):  # replicas hold parameters as attributes
        tensors += tuple([name for name in family.parts.TABLES if name in vars(module)])
    return children, tensors, buffers


def _structure(family: Family, name: str, role: str, module: nn.Module) -> str | None:
    """Say what the module has and the original lacks, or the other way round."""
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
    """Say if a forward has other arguments than expected; trust a published library's."""
    for kind in () if family.published else _classes(family, module):
        if (taken := signature(kind)) != family.parts.takes:
            return f"the forward of {kind.__name__} takes {taken}, not {family.parts.takes}"
    return None


def _second_look(family: Family, module: nn.Module, parts: _Parts) -> str | None:
    """Choose window, heads and scale of a run: the module's own, with a limited window."""
    side = min(getattr(module, family.parts.WINDOW, 0), LARGEST_WINDOW)
    size = (side - side // 4, side - 1) if side else (3, 5)
    return apart(case_of(family, module, side, *size).deviation)


def signature(kind: type[nn.Module]) -> str:
    """Return the arguments of a class's forward, as written."""
    found = inspect.signature(kind.forward, follow_wrapped=False)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return str(inspect.Signature(bare))
