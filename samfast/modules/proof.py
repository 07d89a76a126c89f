# SPDX-License-Identifier: Apache-2.0
"""Whether a Block or an Attention that bears segment_anything's name computes what it does.

Copies of segment_anything change these classes, and programs patch them. A module is fused where
its forward takes what the original takes, its parts are exactly the original's, and runs of it
agree with the formula in ``samfast.kernels.sam_block.reference``.
"""

import copy
import inspect
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.integrations import segment_anything
from samfast.integrations.probe import (
    CodeOf,
    apart,
    attributes,
    difference,
    frozen,
    replicated,
    shell,
    words,
)
from samfast.kernels.relpos_attention.op import fit_table
from samfast.kernels.sam_block.reference import attention, sam_block

_encoder = segment_anything.load().modeling.image_encoder
Attention, Block, MLPBlock = _encoder.Attention, _encoder.Block, _encoder.MLPBlock

TABLES = ("rel_pos_h", "rel_pos_w")
PARTS = {
    Block: ("norm1", "attn", "norm2", "mlp"),
    Attention: ("qkv", "proj"),
    MLPBlock: ("lin1", "lin2", "act"),
}
READ = {  # attributes that the formula reads
    Block: ("window_size",),
    Attention: ("num_heads", "scale", "use_rel_pos"),
    MLPBlock: (),
}
OURS = ("memory", "backend", "left_alone")  # those of SamBlock and RelPosAttention
LAYERS = (nn.LayerNorm, nn.Linear, nn.GELU)
MOST_PROBES = 16  # of one class, before its attributes count as changing from call to call

_codes = {kind: CodeOf(kind) for kind in (*PARTS, *LAYERS)}
_verdicts: dict[tuple, str | None] = {}
_probes: Counter = Counter()


def objection(module: nn.Module, ask: bool = True) -> str | None:
    """Why ``module``, a Block or an Attention, is not what it is called; None where it is.

    Answers from memory while its classes' code and its plain attributes stay as they are, and
    otherwise runs a probe on a CPU; without ``ask`` says None instead. A compiled graph keeps the
    answer it was traced with.
    """
    parts, classes = _stock_parts(module), _classes(module)
    codes = tuple(_codes[kind]() for kind in (*classes, *LAYERS))
    codes += tuple(kind.__call__ for kind in classes)
    states = []
    for name, (kind, part) in parts.items():
        states.append((name, *_held(part)))
        for attribute, value in _options(kind, part).items():
            states.append((attribute, frozen(value)))
            if states[-1][1] is None and attribute in words(kind.forward, kind):
                what = f"{type(value).__name__} whose changes are not seen"
                return f"the forward of {kind.__name__} reads its attribute {attribute}, a {what}"
        if kind is Attention:
            bias = getattr(part._modules.get("qkv"), "bias", None)
            states.append((bool(getattr(part, "use_rel_pos", True)), bias is None))
    key = (codes, tuple(states))
    if key not in _verdicts and ask:
        _verdicts[key] = _judgement(module, parts, codes)
    return _verdicts.get(key)


# What torch.compile calls while it traces, rather than trace it.
objection._dynamo_marked_constant = True


def _classes(module: nn.Module) -> tuple[type[nn.Module], ...]:
    return (Attention,) if isinstance(module, Attention) else (Block, Attention, MLPBlock)


def _stock_parts(module: nn.Module) -> dict[str, tuple[type[nn.Module], nn.Module]]:
    """The module itself and those of its children whose class is segment_anything's, by name."""
    if isinstance(module, Attention):
        return {"": (Attention, module)}
    parts, children = {"": (Block, module)}, module._modules
    attn = children.get("attn")
    if type(attn) is Attention or hasattr(attn, "left_alone"):  # as a RelPosAttention has
        parts["attn"] = (Attention, attn)
    if type(children.get("mlp")) is MLPBlock:
        parts["mlp"] = (MLPBlock, children["mlp"])
    return parts


def _options(kind: type[nn.Module], module: nn.Module) -> dict[str, object]:
    """Plain attributes that the original does not have."""
    known = (*READ[kind], *OURS)
    return {name: value for name, value in attributes(module).items() if name not in known}


def _held(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of the module's children, parameters and buffers."""
    stores = (module._modules, module._parameters, module._buffers)
    children, tensors, buffers = (
        tuple([name for name, value in store.items() if value is not None]) for store in stores
    )
    return children, (*tensors, *replicated(module)), buffers


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
    needed += [(a, (*vars(module), *vars(type(module)))) for a in READ[kind]]
    if kind is Attention and getattr(module, "use_rel_pos", False):
        needed += [(table, tensors) for table in TABLES]
    missing = [part for part, present in needed if part not in present]
    return f"{it} has no {missing[0]}" if missing else None


def _judgement(module: nn.Module, parts: dict, codes: tuple) -> str | None:
    for name, (kind, part) in parts.items():
        if (problem := _structure(name, kind, part)) is not None:
            return problem
    for kind in _classes(module):
        taken = _taken(kind.forward)
        if taken != "(self, x)":
            return f"the forward of {kind.__name__} takes {taken}, not (self, x)"
    _probes[codes] += 1
    if _probes[codes] > MOST_PROBES:
        names = sorted({n for kind, part in parts.values() for n in _options(kind, part)})
        return f"its attributes change from call to call: {', '.join(names)}"
    cases = ((4, 5, 3), (0, 3, 5)) if isinstance(module, Block) else ((0, 3, 5),)
    problems = (apart(_Case(module, parts, *case).problem) for case in cases)
    return next((p for p in problems if p is not None), None)


def _taken(function) -> str:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "what cannot be told"
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
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

    def __init__(self, module: nn.Module, parts: dict, window: int, height: int, width: int):
        self.parts, self.block = parts, isinstance(module, Block)
        self.attn = "attn." if self.block else ""
        self.window, self.size = window, (height, width)
        self.sides = (window, window) if window else (height, width)
        self.heads = int(_found(module, f"{self.attn}num_heads", 2))
        self.dim = _found(module, f"{self.attn}qkv.in_features", 32 * self.heads)
        self.scale = float(_found(module, f"{self.attn}scale", 0.25))
        self.eps = _found(module, "norm1.eps", 1e-6)
        self.tables = bool(_found(module, f"{self.attn}use_rel_pos", True))
        qkv = _found(module, f"{self.attn}qkv", None)
        self.bias = getattr(qkv, "bias", True) is not None
        self.generator = torch.Generator("cpu").manual_seed(0)

    def problem(self) -> str | None:
        tested = self._block() if self.block else self._attention()
        return difference(tested, self.formula, self._draw(2, *self.size, self.dim))

    def formula(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        def layer(name):
            weight, bias = given[f"{name}.weight"], given.get(f"{name}.bias")
            if name.startswith("norm"):
                return lambda t: F.layer_norm(t, t.shape[-1:], weight, bias, self.eps)
            return lambda t: F.linear(t, weight, bias)

        zeros = x.new_zeros(1, self.dim // self.heads)
        tables = [given.get(self.attn + name, zeros) for name in TABLES]
        tables = [fit_table(t, side) for t, side in zip(tables, self.sides, strict=True)]
        qkv, proj = layer(f"{self.attn}qkv"), layer(f"{self.attn}proj")
        if not self.block:
            return attention(x, qkv, proj, *tables, self.heads, self.scale)
        mlp = layer("mlp.lin1"), layer("mlp.lin2")
        around = layer("norm1"), qkv, proj, layer("norm2"), *mlp
        return sam_block(x, *around, *tables, self.heads, self.window, self.scale)

    def _block(self) -> nn.Module:
        return self._shell(
            "",
            {"window_size": self.window},
            norm1=self._norm(),
            attn=self._attention(),
            norm2=self._norm(),
            mlp=self._shell(
                "mlp",
                {},
                lin1=self._linear(self.dim, self.dim),
                lin2=self._linear(self.dim, self.dim),
                act=nn.GELU(),
            ),
        )

    def _attention(self) -> nn.Module:
        rows = 2 * self.sides[0] - 1, 2 * self.sides[1] - 1 if self.window else 7
        size = self.dim // self.heads
        tables = [nn.Parameter(0.3 * self._draw(n, size)) for n in rows] if self.tables else ()
        read = {"num_heads": self.heads, "scale": self.scale, "use_rel_pos": self.tables}
        return self._shell(
            self.attn.strip("."),
            read,
            qkv=self._linear(3 * self.dim, self.dim, self.bias),
            proj=self._linear(self.dim, self.dim),
            **dict(zip(TABLES, tables, strict=False)),
        )

    def _shell(self, name: str, read: dict[str, object], **parts) -> nn.Module:
        default = {"": (Block, None), "attn": (Attention, None), "mlp": (MLPBlock, None)}
        kind, module = self.parts.get(name, default[name])
        options = {} if module is None else _options(kind, module)
        known = {n: copy.deepcopy(v) for n, v in options.items() if frozen(v) is not None}
        return shell(kind, {**known, **read}, **parts)

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
