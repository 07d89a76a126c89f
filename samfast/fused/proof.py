# SPDX-License-Identifier: Apache-2.0
"""Whether a Block or an Attention that bears segment_anything's name computes what it does.

Copies of segment_anything change these classes, and programs patch them. A module is fused where
its forward takes what the original takes, its parts are exactly the original's, and runs of it
agree with the formula in ``samfast.kernels.sam_block.reference``.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.fused import parts as own
from samfast.integrations.plain_code import PlainCode
from samfast.integrations.probe import apart, deviation, difference, shell
from samfast.kernels.relpos_attention.op import fit_table
from samfast.kernels.sam_block.reference import attention, sam_block

Attention, Block, MLPBlock = own.load()

TABLES = own.TABLES
PARTS = {Block: own.IN_BLOCK, Attention: own.IN_ATTENTION, MLPBlock: own.IN_MLP}
READ = {Block: (own.WINDOW,), Attention: own.OPTIONS, MLPBlock: ()}  # what the formula reads
LAYERS = (nn.LayerNorm, nn.Linear, nn.GELU)
_NAMES = frozenset("weight bias normalized_shape eps approximate".split()).union(
    TABLES, *PARTS.values(), *READ.values()
)
_codes = {kind: PlainCode(kind, _NAMES) for kind in (*PARTS, *LAYERS)}
_verdicts: dict[tuple, str | None] = {}


def objection(module: nn.Module, ask: bool = True) -> str | None:
    """Why ``module``, a Block or an Attention, is not what it is called; None where it is.

    Answers from memory while its classes' code, its parts and its sizes stay as they are, and
    otherwise runs a probe on a CPU; without ``ask`` says None instead. A compiled graph keeps the
    answer it was traced with.
    """
    parts, codes = _stock_parts(module), []
    for kind in (*_classes(module), *LAYERS):
        code, problem = _codes[kind]()
        if problem is not None:
            return _signatures(module) or problem
        codes.append(code)
    held = [(name, *_held(part)) for name, (_, part) in parts.items()]
    kept = tuple(codes), tuple(held), _has(parts, own.HAS_TABLES), _has(parts, own.QKV, "bias")
    sizes = tuple([getattr(p, n, None) for k, p in parts.values() for n in READ[k]])
    for number in sizes:
        if not isinstance(number, (bool, int, float)):
            return f"one of its sizes is a {type(number).__name__}, not a number"
    width = getattr(getattr(module, own.NORM1, None), "normalized_shape", None)
    for key, judge in ((kept, _judgement), ((kept, sizes, width), _second_look)):
        if key not in _verdicts:
            if not ask:
                return None
            _verdicts[key] = judge(module, parts)
        if _verdicts[key] is not None:
            return _verdicts[key]
    return None


# What torch.compile calls while it traces, rather than trace it.
objection._dynamo_marked_constant = True


def _classes(module: nn.Module) -> tuple[type[nn.Module], ...]:
    return (Attention,) if isinstance(module, Attention) else (Block, Attention, MLPBlock)


def _stock_parts(module: nn.Module) -> dict[str, tuple[type[nn.Module], nn.Module]]:
    """The module itself and those of its children whose class is segment_anything's, by name."""
    if isinstance(module, Attention):
        return {"": (Attention, module)}
    parts, children = {"": (Block, module)}, module._modules
    attn, mlp = children.get(own.ATTENTION), children.get(own.MLP)
    if type(attn) is Attention or hasattr(attn, "left_alone"):  # as a RelPosAttention has
        parts[own.ATTENTION] = (Attention, attn)
    if type(mlp) is MLPBlock:
        parts[own.MLP] = (MLPBlock, mlp)
    return parts


def _has(parts: dict, *names: str) -> bool:
    """Whether what these names lead to from the attention is there, and true where it is a flag."""
    value = next((part for kind, part in parts.values() if kind is Attention), None)
    for name in names:
        value = getattr(value, name, None)
    return value is not None and value is not False


def _held(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of the module's children, parameters and buffers."""
    stores = (module._modules, module._parameters, module._buffers)
    children, tensors, buffers = (
        tuple([name for name, value in store.items() if value is not None]) for store in stores
    )
    if getattr(module, "_is_replica", False):  # DataParallel's hold parameters as attributes
        tensors += tuple([name for name in TABLES if name in vars(module)])
    return children, tensors, buffers


def _structure(name: str, kind: type[nn.Module], module: nn.Module) -> str | None:
    """What the module has that the original does not have, or the other way round."""
    it = f"its {name}" if name else "it"
    children, tensors, buffers = _held(module)
    known = TABLES if kind is Attention else ()
    for what, names, expected in (
        ("child", children, PARTS[kind]),
        ("parameter", tensors, known),
        ("buffer", buffers, ()),
    ):
        if more := [n for n in names if n not in expected]:
            return f"{it} has a {what} {more[0]}, which would be left out"
    needed = [(part, children) for part in PARTS[kind]]
    if kind is Attention and own.has_tables(module):
        needed += [(table, tensors) for table in TABLES]
    missing = [part for part, present in needed if part not in present]
    return f"{it} has no {missing[0]}" if missing else None


def _judgement(module: nn.Module, parts: dict) -> str | None:
    for name, (kind, part) in parts.items():
        if (problem := _structure(name, kind, part)) is not None:
            return problem
    if (problem := _signatures(module)) is not None:
        return problem
    cases = ((4, 5, 3), (0, 3, 5)) if isinstance(module, Block) else ((0, 3, 5),)
    problems = (apart(_Case(module, *case).problem) for case in cases)
    return next((p for p in problems if p is not None), None)


def _signatures(module: nn.Module) -> str | None:
    for kind in _classes(module):
        if (taken := signature(kind)) != "(self, x)":
            return f"the forward of {kind.__name__} takes {taken}, not (self, x)"
    return None


def _second_look(module: nn.Module, parts: dict) -> str | None:
    """At the module's own window, heads and scale."""
    side = getattr(module, own.WINDOW, 0)
    size = (side - side // 4, side - 1) if side else (3, 5)
    return apart(_Case(module, side, *size).deviation)


def signature(kind: type[nn.Module]) -> str:
    """What the forward of a class takes, as it is written."""
    found = inspect.signature(kind.forward, follow_wrapped=False)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return str(inspect.Signature(bare))


def _found(module: nn.Module, path: str, default):
    """The attribute at the end of a path of names, or the default where there is none."""
    value = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return default if value is None else value


class _Case:
    """One run: a shell as wide as the module, with weights of its own, on maps of two images.

    window: side of the windows, 0 for the whole map, where one table fits and the other is to be
        interpolated. The MLP is no wider than the block, which saves time.
    """

    def __init__(self, module: nn.Module, window: int, height: int, width: int):
        self.block = isinstance(module, Block)
        self.attn = f"{own.ATTENTION}." if self.block else ""
        self.window, self.size = window, (height, width)
        self.sides = (window, window) if window else (height, width)
        self.heads = int(_found(module, self.attn + own.HEADS, 2))
        self.dim = _found(module, f"{self.attn}{own.QKV}.in_features", 32 * self.heads)
        self.scale = float(_found(module, self.attn + own.SCALE, 0.25))
        self.eps = _found(module, f"{own.NORM1}.eps", 1e-6)
        self.tables = bool(_found(module, self.attn + own.HAS_TABLES, True))
        qkv = _found(module, self.attn + own.QKV, None)
        self.bias = getattr(qkv, "bias", True) is not None
        self.generator = torch.Generator("cpu").manual_seed(0)

    def problem(self) -> str | None:
        tested = self._block() if self.block else self._attention()
        return difference(tested, self.formula, self._draw(2, *self.size, self.dim))

    def deviation(self) -> str | None:
        tested = self._block() if self.block else self._attention()
        x = self._draw(1, *self.size, self.dim)
        if self.block:  # tokens of every size, from 0.003 to 100
            x = x * 10.0 ** (2.25 * self._draw(1, *self.size, 1) - 0.25)
        return deviation(tested.eval(), self.formula, x)

    def formula(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        def layer(name):
            weight, bias = given[f"{name}.weight"], given.get(f"{name}.bias")
            if name in (own.NORM1, own.NORM2):
                return lambda t: F.layer_norm(t, t.shape[-1:], weight, bias, self.eps)
            return lambda t: F.linear(t, weight, bias)

        zeros = x.new_zeros(1, self.dim // self.heads)
        tables = [given.get(self.attn + name, zeros) for name in TABLES]
        tables = [fit_table(t, side) for t, side in zip(tables, self.sides, strict=True)]
        qkv, proj = (layer(self.attn + name) for name in own.IN_ATTENTION)
        if not self.block:
            return attention(x, qkv, proj, *tables, self.heads, self.scale)
        mlp = (layer(f"{own.MLP}.{name}") for name in (own.LIN1, own.LIN2))
        around = layer(own.NORM1), qkv, proj, layer(own.NORM2), *mlp
        return sam_block(x, *around, *tables, self.heads, self.window, self.scale)

    def _block(self) -> nn.Module:
        made = self._norm(), self._attention(), self._norm(), self._mlp()
        inside = dict(zip(own.IN_BLOCK, made, strict=True))
        return shell(Block, {own.WINDOW: self.window}, **inside)

    def _mlp(self) -> nn.Module:
        made = *(self._linear(self.dim, self.dim) for _ in range(2)), nn.GELU()
        return shell(MLPBlock, {}, **dict(zip(own.IN_MLP, made, strict=True)))

    def _attention(self) -> nn.Module:
        rows = 2 * self.sides[0] - 1, 2 * self.sides[1] - 1 if self.window else 7
        size = self.dim // self.heads
        tables = [nn.Parameter(0.3 * self._draw(n, size)) for n in rows] if self.tables else ()
        read = {own.HEADS: self.heads, own.SCALE: self.scale, own.HAS_TABLES: self.tables}
        layers = (
            self._linear(3 * self.dim, self.dim, self.bias),
            self._linear(self.dim, self.dim),
        )
        return shell(
            Attention,
            read,
            **dict(zip(own.IN_ATTENTION, layers, strict=True)),
            **dict(zip(TABLES, tables, strict=False)),
        )

    def _linear(self, features: int, inputs: int, bias: bool = True) -> nn.Linear:
        layer = nn.Linear(1, 1, bias=bias)
        layer.in_features, layer.out_features = inputs, features
        layer.weight = nn.Parameter(self._draw(features, inputs) * (3 / inputs) ** 0.5)
        if bias:
            layer.bias = nn.Parameter(0.3 * self._draw(features))
        return layer

    def _norm(self) -> nn.LayerNorm:
        norm = nn.LayerNorm(self.dim, self.eps)
        for parameter in norm.parameters():
            parameter.data += 0.3 * self._draw(self.dim)
        return norm

    def _draw(self, *shape: int) -> Tensor:
        """Uniform in -1 to 1."""
        return torch.empty(shape).uniform_(-1.0, 1.0, generator=self.generator)
