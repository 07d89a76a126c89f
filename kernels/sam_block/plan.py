# SPDX-License-Identifier: Apache-2.0
"""What an operator must know of a block in addition to its tensors, as a string and back.

Operators take strings and tensors. The tensors come in one list: ``HEAD`` first, then for each
layer weight, bias, lora_a, lora_b, seed and the middle map's parameters. ``SIDE`` follows if there
is a branch next to the MLP, and ``DROPS`` if samples drop branches.
"""

import ast
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from samfast.kernels._common.middle import IDENTITY, find
from samfast.kernels._common.windows import Windows
from samfast.kernels.adapt_former.op import SIDE as BRANCH
from samfast.kernels.adapt_former.op import check_side

HEAD = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "table_h", "table_w")
LAYERS = ("qkv", "proj", "lin1", "lin2")
APART = ("q", "k", "v", *LAYERS[1:])  # where three layers stand in qkv's place
DROPS = ("factors1", "factors2")  # (B,): of proj's and lin2's results, by sample
KINDS = ("relpos", "rope", "plain")  # of the attention; their tables: relative positions along
# height and width; cos and sin, one row a position of the window; none
FACTORS = ("weight", "bias", "lora_a", "lora_b", "seed")
SIDE = (*BRANCH, "seed")
Memory = Literal["fast", "balanced", "minimal"]
MEMORY = get_args(Memory)


def check_memory(memory: str) -> None:
    """Raise ValueError when this is not a memory mode."""
    if memory not in MEMORY:
        raise ValueError(f"memory is {memory!r}; it must be one of {', '.join(MEMORY)}")


class LayerPlan(NamedTuple):
    """One linear layer and its adapter.

    adapted: there is an adapter, else what follows means nothing
    flags: what follows the numbers of Windows in the middle map's geometry, None where it takes no
        geometry   params: number of the map's parameters
    """

    adapted: bool = False
    scaling: float = 1.0
    dropout: float = 0.0
    middle: str = IDENTITY
    flags: tuple[int, ...] | None = None
    starts: tuple[int, ...] = ()
    own: bool = False
    params: int = 0

    def options(self, windows: Windows) -> tuple:
        """As the engine takes them."""
        geometry = () if self.flags is None else (*windows, *self.flags)
        return self.scaling, self.dropout, self.middle, geometry, self.starts, self.own

    def check(self, name: str, shape: tuple[int, int], lora_a: Tensor, lora_b: Tensor) -> None:
        """Raise ValueError when the factors do not fit a weight of this shape."""
        outputs, inputs = shape
        count = max(len(self.starts), 1)
        rows, rank = lora_b.shape
        length = rows // count
        fits = lora_a.shape[1] == inputs and rows == count * length
        fits = fits and (
            length == outputs if not self.starts else max(self.starts) + length <= outputs
        )
        if self.middle == IDENTITY:
            fits = fits and lora_a.shape[0] == (count * rank if self.own else rank)
        if not fits:
            raise ValueError(
                f"lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} of {name} do not "
                f"fit its weight {shape}" + (f" at columns {self.starts}" if self.starts else "")
            )

    @property
    def pads_vary(self) -> bool:
        """Whether the update of padding, where x is zeros, may be other than zero."""
        return self.adapted and not find(self.middle).zero_preserving


class SidePlan(NamedTuple):
    """adapt_former's branch next to the MLP: its norm's eps, and its dropout."""

    eps: float = 1e-5
    dropout: float = 0.0


class Plan(NamedTuple):
    """window: side, 0 for the whole map   eps: of the two norms   dtype: of the products, "" for
    x's   memory: one of MEMORY   attention: backend of only the attention, "" for the block's
    side: the branch next to the MLP, or None
    kind: of the attention, one of KINDS   halves: how rope pairs features, see ``kernels.rope``
    apart: whether q, k and v are separate layers   drops: whether there are DROPS"""

    heads: int
    window: int
    scale: float
    eps: tuple[float, float]
    dtype: str
    memory: str
    attention: str
    layers: tuple[LayerPlan, ...]
    side: SidePlan | None = None
    kind: str = KINDS[0]
    halves: bool = False
    apart: bool = False
    drops: bool = False

    @property
    def key(self) -> str:
        """All but ``numbers``, which are symbols under torch.compile(dynamic=True)."""
        layers = (layer._replace(scaling=0.0, dropout=0.0) for layer in self.layers)
        plain = self._replace(scale=0.0, eps=(0.0, 0.0), layers=())
        own = plain[_SAM:]
        own = () if own == _DEFAULTS else own  # as plans of SAM's blocks have always been written
        return repr((*plain[: _SAM - 2], tuple(map(tuple, layers)), self.side is not None, *own))

    @property
    def names(self) -> tuple[str, ...]:
        """Name the layers in the order in which they run."""
        return APART if self.apart else LAYERS

    @property
    def numbers(self) -> list[float]:
        """scale, eps, then scaling and dropout of each layer, then eps and dropout of the side."""
        of_layers = (n for layer in self.layers for n in (layer.scaling, layer.dropout))
        return [self.scale, *self.eps, *of_layers, *(self.side or ())]

    def windows(self, x: Tensor) -> Windows:
        """Return the attention's windows for x (B, H, W, D)."""
        sides = (self.window, self.window) if self.window else x.shape[1:3]
        return Windows(*x.shape[:3], *sides)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return getattr(torch, self.dtype) if self.dtype else x.dtype

    def split(self, tensors: Sequence) -> tuple[list, dict[str, list]]:
        """The tensors of HEAD, and of each layer and the side (or whatever runs parallel)."""
        head, rest, parts = list(tensors[: len(HEAD)]), list(tensors[len(HEAD) :]), {}
        for name, layer in zip(self.names, self.layers, strict=True):
            count = len(FACTORS) + layer.params
            parts[name], rest = rest[:count], rest[count:]
        if self.side is not None:
            parts["side"], rest = rest[: len(SIDE)], rest[len(SIDE) :]
        if self.drops:
            parts["drops"] = rest
        return head, parts

    def check(self, x: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """Raise ValueError for a tensor on another device, or for shapes that do not fit together:
        kernels would read beyond them."""
        check_memory(self.memory)
        head, parts = self.split(tensors)
        named = [("the block", HEAD, head)]
        own = {"side": SIDE, "drops": DROPS}
        named += [(name, own.get(name, FACTORS), part) for name, part in parts.items()]
        for name, names, part in named:
            for i, t in enumerate(part):
                if t is not None and t.device != x.device:
                    what = names[i] if i < len(names) else f"parameter {i - len(names)}"
                    raise ValueError(f"{what} of {name} is on {t.device} but x is on {x.device}")
        width, inner = x.shape[3], parts["proj"][0].shape[1]
        if inner % self.heads:
            raise ValueError(f"proj takes {inner} features, not a multiple of {self.heads} heads")
        shapes = [(width,)] * 4 + self._table_shapes(x, inner // self.heads)
        for what, t, shape in zip(HEAD, head, shapes, strict=True):
            if t is not None or shape is not None:
                _check_shape(f"{what} of the block", t, shape)
        for what, t in zip(DROPS, parts.get("drops", ()), strict=self.drops):
            _check_shape(f"{what} of the block", t, x.shape[:1])
        hidden = parts["lin1"][0].shape[0]
        into = [(inner, width)] * 3 if self.apart else [(3 * inner, width)]
        chain = (*into, (width, inner), (hidden, width), (width, hidden))
        for name, layer, shape in zip(self.names, self.layers, chain, strict=True):
            _check_shape(f"the weight of {name}", parts[name][0], shape)
            if parts[name][1] is not None:
                _check_shape(f"the bias of {name}", parts[name][1], shape[:1])
            if layer.adapted:
                layer.check(name, shape, *parts[name][2:4])
        if self.side is not None:
            check_side(width, parts["side"][: len(BRANCH)])

    def check_constants(self, tensors: Sequence[Tensor | None]) -> None:
        """Raise ValueError when a tensor wants a gradient that the block does not compute."""
        head, parts = self.split(tensors)
        constant = {} if self.kind == "relpos" else dict(zip(HEAD[4:], head[4:], strict=True))
        constant |= dict(zip(DROPS, parts.get("drops", ()), strict=self.drops))
        for what, t in constant.items():
            if t is not None and t.requires_grad:
                raise ValueError(
                    f"{what} of the block requires a gradient, but the block computes none for it; "
                    f"call {what}.requires_grad_(False)"
                )

    def _table_shapes(self, x: Tensor, head_dim: int) -> list[tuple[int, int] | None]:
        """Tell the shapes of the two tables, None where there is none."""
        sides = (self.window, self.window) if self.window else x.shape[1:3]
        if self.kind == "relpos":
            return [(2 * side - 1, head_dim) for side in sides]
        return [(sides[0] * sides[1], head_dim // 2) if self.kind == "rope" else None] * 2


_SAM = Plan._fields.index("kind")  # fields that a block of SAM's plan has
_DEFAULTS = tuple([Plan._field_defaults[name] for name in Plan._fields[_SAM:]])


def _check_shape(what: str, t: Tensor | None, shape: tuple[int, ...] | None) -> None:
    found = None if t is None else tuple(t.shape)
    if found != (None if shape is None else tuple(shape)):
        has = "is not there" if found is None else f"has shape {found}"
        need = "must not be" if shape is None else f"must have {tuple(shape)}"
        raise ValueError(f"{what} {has}, but {need}")


def plan_of(key: str, numbers: Sequence[float]) -> Plan:
    return _plan_of(key, tuple(numbers))


@functools.lru_cache(maxsize=256)
def _plan_of(key: str, numbers: tuple[float, ...]) -> Plan:
    values = ast.literal_eval(key)
    *rest, layers, sided = values[:_SAM]
    scale, eps, of_layers = numbers[0], numbers[1:3], numbers[3:]
    side = SidePlan(*of_layers[2 * len(layers) :]) if sided else None
    layers = (
        LayerPlan(*layer)._replace(scaling=of_layers[2 * i], dropout=of_layers[2 * i + 1])
        for i, layer in enumerate(layers)
    )
    return Plan(*rest, tuple(layers), side, *values[_SAM:])._replace(scale=scale, eps=eps)
