# SPDX-License-Identifier: Apache-2.0
"""What an operator has to know of a block beside its tensors, as a string and back.

Operators take strings and tensors. The tensors come in one list: ``HEAD`` first, then, of each
layer in LAYERS, weight, bias, lora_a, lora_b, seed and the middle map's parameters, at last, where
a branch stands beside the MLP, ``SIDE``.
"""

import ast
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from samfast.kernels._common.middle import IDENTITY, find
from samfast.kernels._common.windows import Windows
from samfast.kernels.adapt_former.op import SIDE as BRANCH
from samfast.kernels.adapt_former.op import check_side

HEAD = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "table_h", "table_w")
LAYERS = ("qkv", "proj", "lin1", "lin2")
FACTORS = ("weight", "bias", "lora_a", "lora_b", "seed")
SIDE = (*BRANCH, "seed")
MEMORY = ("fast", "balanced", "minimal")


def check_memory(memory: str) -> None:
    """Raise one sentence for what is no mode."""
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
        """Raise one sentence where the factors do not fit a weight of this shape."""
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
    """adapt_former's branch beside the MLP: its norm's eps, and its dropout."""

    eps: float = 1e-5
    dropout: float = 0.0


class Plan(NamedTuple):
    """window: side, 0 for the whole map   eps: of the two norms   dtype: of the products, "" for
    x's   memory: one of MEMORY   attention: backend of the attention alone, "" for the block's
    side: what stands beside the MLP, None for nothing"""

    heads: int
    window: int
    scale: float
    eps: tuple[float, float]
    dtype: str
    memory: str
    attention: str
    layers: tuple[LayerPlan, ...]
    side: SidePlan | None = None

    @property
    def key(self) -> str:
        """All but ``numbers``, which are symbols under torch.compile(dynamic=True)."""
        layers = (layer._replace(scaling=0.0, dropout=0.0) for layer in self.layers)
        plain = self._replace(scale=0.0, eps=(0.0, 0.0), layers=())
        return repr((*plain[:-2], tuple(map(tuple, layers)), self.side is not None))

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
        for name, layer in zip(LAYERS, self.layers, strict=True):
            count = len(FACTORS) + layer.params
            parts[name], rest = rest[:count], rest[count:]
        return head, parts | ({} if self.side is None else {"side": rest})

    def check(self, x: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """Raise one sentence for a tensor on another device, or shapes that do not chain: kernels
        would read beyond them."""
        check_memory(self.memory)
        head, parts = self.split(tensors)
        named = [("the block", HEAD, head)]
        named += [(name, SIDE if name == "side" else FACTORS, part) for name, part in parts.items()]
        for name, names, part in named:
            for i, t in enumerate(part):
                if t is not None and t.device != x.device:
                    what = names[i] if i < len(names) else f"parameter {i - len(names)}"
                    raise ValueError(f"{what} of {name} is on {t.device} but x is on {x.device}")
        width, inner = x.shape[3], parts["proj"][0].shape[1]
        if inner % self.heads:
            raise ValueError(f"proj takes {inner} features, which {self.heads} heads do not divide")
        sides = (self.window, self.window) if self.window else x.shape[1:3]
        shapes = [(width,)] * 4 + [(2 * side - 1, inner // self.heads) for side in sides]
        for what, t, shape in zip(HEAD, head, shapes, strict=True):
            _check_shape(f"{what} of the block", t, shape)
        hidden = parts["lin1"][0].shape[0]
        chain = ((3 * inner, width), (width, inner), (hidden, width), (width, hidden))
        for name, layer, shape in zip(LAYERS, self.layers, chain, strict=True):
            _check_shape(f"the weight of {name}", parts[name][0], shape)
            if parts[name][1] is not None:
                _check_shape(f"the bias of {name}", parts[name][1], shape[:1])
            if layer.adapted:
                layer.check(name, shape, *parts[name][2:4])
        if self.side is not None:
            check_side(width, parts["side"][: len(BRANCH)])


def _check_shape(what: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{what} has shape {tuple(t.shape)}, but must have {tuple(shape)}")


def plan_of(key: str, numbers: Sequence[float]) -> Plan:
    return _plan_of(key, tuple(numbers))


@functools.lru_cache(maxsize=256)
def _plan_of(key: str, numbers: tuple[float, ...]) -> Plan:
    *rest, layers, sided = ast.literal_eval(key)
    scale, eps, of_layers = numbers[0], numbers[1:3], numbers[3:]
    side = SidePlan(*of_layers[2 * len(layers) :]) if sided else None
    layers = (
        LayerPlan(*layer)._replace(scaling=of_layers[2 * i], dropout=of_layers[2 * i + 1])
        for i, layer in enumerate(layers)
    )
    return Plan(*rest, tuple(layers), side)._replace(scale=scale, eps=eps)
