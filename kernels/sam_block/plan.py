# SPDX-License-Identifier: Apache-2.0
"""What an operator has to know of a block beside its tensors, as a string and back.

Operators take strings and tensors. The tensors come in one list: ``HEAD`` first, then, of each
layer in LAYERS, weight, bias, lora_a, lora_b, seed and the middle map's parameters.
"""

import ast
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from samfast.kernels._common.middle import IDENTITY, find
from samfast.kernels._common.windows import Windows

HEAD = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "table_h", "table_w")
LAYERS = ("qkv", "proj", "lin1", "lin2")
FACTORS = ("weight", "bias", "lora_a", "lora_b", "seed")
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

    @property
    def pads_vary(self) -> bool:
        """Whether the update of padding, where x is zeros, may be other than zero."""
        return self.adapted and not find(self.middle).zero_preserving


class Plan(NamedTuple):
    """window: side, 0 for the whole map   eps: of the two norms   dtype: of the products, "" for
    x's   memory: one of MEMORY   attention: backend of the attention alone, "" for the block's"""

    heads: int
    window: int
    scale: float
    eps: tuple[float, float]
    dtype: str
    memory: str
    attention: str
    layers: tuple[LayerPlan, ...]

    @property
    def key(self) -> str:
        return repr((*self[:-1], tuple(map(tuple, self.layers))))

    def windows(self, x: Tensor) -> Windows:
        """Of the attention; x (B, H, W, D)."""
        sides = (self.window, self.window) if self.window else x.shape[1:3]
        return Windows(*x.shape[:3], *sides)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return getattr(torch, self.dtype) if self.dtype else x.dtype

    def split(self, tensors: Sequence) -> tuple[list, dict[str, list]]:
        """The tensors of HEAD, and of each layer (or whatever runs parallel to them)."""
        head, rest, parts = list(tensors[: len(HEAD)]), list(tensors[len(HEAD) :]), {}
        for name, layer in zip(LAYERS, self.layers, strict=True):
            count = len(FACTORS) + layer.params
            parts[name], rest = rest[:count], rest[count:]
        return head, parts

    def check(self, x: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """Raise one sentence for a tensor on another device, or factors that do not chain.

        What else may not fit the library's products notice; kernels would read beyond these.
        """
        head, parts = self.split(tensors)
        named = [("the block", HEAD, head)]
        named += [(name, FACTORS, part) for name, part in parts.items()]
        for name, names, part in named:
            for i, t in enumerate(part):
                if t is not None and t.device != x.device:
                    what = names[i] if i < len(names) else f"parameter {i - len(names)}"
                    raise ValueError(f"{what} of {name} is on {t.device} but x is on {x.device}")
        for name, layer in zip(LAYERS, self.layers, strict=True):
            if not layer.adapted:
                continue
            weight, _, lora_a, lora_b = parts[name][:4]
            outputs, inputs = weight.shape
            if lora_a.shape[1] != inputs or (not layer.starts and lora_b.shape[0] != outputs):
                raise ValueError(
                    f"{name} has a weight {tuple(weight.shape)}, to which lora_a "
                    f"{tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} do not fit"
                )


@functools.lru_cache(maxsize=256)
def plan_of(key: str) -> Plan:
    *rest, layers = ast.literal_eval(key)
    return Plan(*rest, tuple(LayerPlan(*layer) for layer in layers))
