# SPDX-License-Identifier: Apache-2.0
"""Build small modules of a library's classes, and compare their runs with the formula.

The formula is that of ``samfast.kernels.sam_block.reference``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.fused.parts import Family, Layout
from samfast.integrations.probe import deviation, difference, shell
from samfast.kernels.relpos_attention.op import fit_table
from samfast.kernels.sam_block.reference import Maps, attention, sam_block

BLOCK, ATTENTION, MLP = ROLES = ("block", "attention", "mlp")


def case_of(family: Family, module: nn.Module, window: int, height: int, width: int) -> "Case":
    """Make the run of a module of this family, on maps of this size."""
    kind = Case if family.parts.KIND == "relpos" else RotaryCase
    return kind(family, module, window, height, width)


def inside(own: type[Layout], role: str) -> tuple[str, ...]:
    """Return the children that the formula uses."""
    return dict(zip(ROLES, (own.IN_BLOCK, own.IN_ATTENTION, own.IN_MLP), strict=True))[role]


def below(own: type[Layout], role: str, paths: Iterable[str]) -> list[str]:
    """Return the names that belong to a part, among paths that start at the block."""
    prefix = {BLOCK: "", ATTENTION: f"{own.IN_BLOCK[1]}.", MLP: f"{own.IN_BLOCK[3]}."}[role]
    found = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    return [name for name in found if "." not in name]


def _found(module: nn.Module, path: str, default: Any) -> Any:
    """Return the attribute at the end of a path, or the default if there is none."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return default if value is None else value


class Case:
    """One run: a shell as wide as the module, with its own weights, on maps of two images.

    window: side of the windows; 0 for the whole map, where one table fits and the other must be
        interpolated. The MLP is no wider than the block, to save time.
    """

    def __init__(self, family: Family, module: nn.Module, window: int, height: int, width: int):
        self.family, self.own = family, family.parts
        self.block = isinstance(module, family.block)
        self.before, attn, self.between, self.mlp = self.own.IN_BLOCK
        self.attn = f"{attn}." if self.block else ""
        self.attention_class = family.attention_of(module) if self.block else family.attention
        self.window, self.size = window, (height, width)
        self.sides = (window, window) if window else (height, width)
        heads, scale, has_tables = (self.attn + name for name in self.own.OPTIONS)
        qkv = f"{self.attn}{self.own.IN_ATTENTION[0]}"
        self.heads = int(_found(module, heads, 2))
        self.dim = _found(module, f"{qkv}.in_features", 32 * self.heads)
        self.scale = float(_found(module, scale, 0.25))
        self.eps = _found(module, f"{self.before}.eps", 1e-6)
        self.tables = bool(_found(module, has_tables, True))
        self.bias = getattr(_found(module, qkv, None), "bias", True) is not None
        self.flags = {path: _found(module, path, True) for path in self.own.FLAGS}
        self.generator = torch.Generator("cpu").manual_seed(0)

    def problem(self) -> str | None:
        """Say how result or gradients differ from the formula's; None if they do not."""
        tested = self._block() if self.block else self._attention()
        return difference(tested, self.formula, self._draw(3, *self.size, self.dim))

    def deviation(self) -> str | None:
        """Say how the result without gradients differs from the formula's; None if it does not."""
        tested = self._block() if self.block else self._attention()
        x = self._draw(1, *self.size, self.dim)
        if self.block:  # tokens of sizes from 0.003 to 100
            x = x * 10.0 ** (2.25 * self._draw(1, *self.size, 1) - 0.25)
        return deviation(tested.eval(), self.formula, x)

    def formula(self, x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Run the block or attention as samfast computes it. given: its parameters by name"""

        def layer(name: str) -> Maps:
            weight, bias = given[f"{name}.weight"], given.get(f"{name}.bias")
            if name in (self.before, self.between):
                return lambda t: F.layer_norm(t, t.shape[-1:], weight, bias, self.eps)
            return lambda t: F.linear(t, weight, bias)

        table_h, table_w = self._tables(x, given)
        *into, proj = (layer(self.attn + name) for name in self.own.IN_ATTENTION)
        qkv = into[0] if len(into) == 1 else lambda t: torch.cat([part(t) for part in into], -1)
        if not self.block:
            return attention(x, qkv, proj, table_h, table_w, self.heads, self.scale)
        lin1, lin2 = (layer(f"{self.mlp}.{name}") for name in self.own.IN_MLP[:2])
        return sam_block(
            x, layer(self.before), qkv, proj, layer(self.between), lin1, lin2, table_h, table_w,
            self.heads, self.window, self.scale, self.own.KIND, self.own.HALVES,
        )  # fmt: skip

    def _tables(self, x: Tensor, given: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the tensors of the attention's kind."""
        zeros = x.new_zeros(1, self.dim // self.heads)
        tables = [given.get(self.attn + name, zeros) for name in self.own.TABLES]
        return [fit_table(t, side) for t, side in zip(tables, self.sides, strict=True)]

    def _shell(
        self, role: str, kind: type[nn.Module], made: Iterable[nn.Module], read: dict[str, Any],
        tables: Sequence[nn.Parameter] = (),
    ) -> nn.Module:  # fmt: skip
        own = self.own
        idle: dict[str, nn.Module] = {
            name: nn.Identity() for name in below(own, role, own.IDENTITIES)
        }
        idle |= {name: nn.Dropout(0.0) for name in below(own, role, own.DROPOUTS)}
        read |= dict.fromkeys(below(own, role, own.CHANCES), 0.0)
        given = {**own.VALUES, **self.flags}
        values = {path.rpartition(".")[2]: value for path, value in given.items()}
        read |= {name: values[name] for name in below(own, role, given)}
        parts = dict(zip(inside(own, role), made, strict=True))
        return shell(kind, read, **parts, **idle, **dict(zip(own.TABLES, tables, strict=False)))

    def _block(self) -> nn.Module:
        made = self._norm(), self._attention(), self._norm(), self._mlp()
        return self._shell(BLOCK, self.family.block, made, {self.own.WINDOW: self.window})

    def _mlp(self) -> nn.Module:
        made = *(self._linear(self.dim, self.dim) for _ in range(2)), nn.GELU()
        return self._shell(MLP, self.family.mlp, made, {})

    def _attention(self) -> nn.Module:
        rows = 2 * self.sides[0] - 1, 2 * self.sides[1] - 1 if self.window else 7
        size = self.dim // self.heads
        tables = [nn.Parameter(0.3 * self._draw(n, size)) for n in rows] if self.tables else ()
        read = dict(zip(self.own.OPTIONS, (self.heads, self.scale, self.tables), strict=True))
        layers = (
            self._linear(3 * self.dim, self.dim, self.bias),
            self._linear(self.dim, self.dim),
        )
        return self._shell(ATTENTION, self.attention_class, layers, read, tables)

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
        """Draw uniformly from -1 to 1."""
        return torch.empty(shape).uniform_(-1.0, 1.0, generator=self.generator)


class RotaryCase(Case):
    """The run of a block that rotates q and k: the library builds it, with other weights."""

    def __init__(self, family: Family, module: nn.Module, *where: int):
        super().__init__(family, module, *where)
        self.module = module
        self.scale = self.own.scale(self.own.attention(module))

    def _block(self) -> nn.Module:
        sizes = self.dim, self.heads, self.window, self.size, self.bias, self.eps
        block = self.own.example(self.family, self.module, *sizes)
        for name, parameter in block.named_parameters():
            drawn = self._draw(*parameter.shape)
            if parameter.dim() == 2:
                parameter.data = drawn * (3 / parameter.shape[1]) ** 0.5
            else:
                norm = name.rpartition(".")[0] in (self.before, self.between)
                parameter.data = 0.3 * drawn + (norm and name.endswith("weight"))
        self.turns = [t.float() for t in self.own.tables(block, self.sides)]
        return block

    def _tables(self, x: Tensor, given: Mapping[str, Tensor]) -> list[Tensor]:
        return self.turns
