# SPDX-License-Identifier: Apache-2.0
"""The names that libraries give to a SAM-like transformer block and its parts.

The other files of this folder look up names and parts here.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from samfast.adapters.foreign import Foreign
from samfast.adapters.stand_in import altered, kind_of
from samfast.kernels.relpos_attention.op import fit_table

KEPT = "_samfast_tables"  # the attribute in which a fused block keeps its tables


class Layout:
    """The names in segment_anything; other libraries have subclasses of this class.

    Paths start at the block.

    IDENTITIES: children that a fused block leaves out, so they must be nn.Identity
    DROPOUTS: children that are dropout   CHANCES: numbers that are dropout probabilities
    VALUES: other attributes that a forward reads, with the value they must have
    FLAGS: attributes that a forward reads and that may be true or false
    takes: the forwards' arguments   IDLE: named arguments without effect in a block
    KIND, HALVES: of the attention, see ``samfast.kernels.sam_block.plan``
    OTHERS, BUFFERS: further children and buffers from which a block computes its tables
    DROP_PATH: a child that drops branches of samples in training
    WATCHED: True if a block's answers depend only on its own state, see
        ``samfast.fused.remembered``
    """

    IN_BLOCK: ClassVar[tuple[str, ...]] = ("norm1", "attn", "norm2", "mlp")
    IN_ATTENTION: ClassVar[tuple[str, ...]] = ("qkv", "proj")
    IN_MLP: ClassVar[tuple[str, ...]] = ("lin1", "lin2", "act")
    TABLES: ClassVar[tuple[str, ...]] = (
        "rel_pos_h",
        "rel_pos_w",
    )  # parameters with relative positions
    WINDOW: ClassVar = "window_size"  # on a block; 0 for the whole map
    OPTIONS: ClassVar[tuple[str, ...]] = ("num_heads", "scale", "use_rel_pos")  # on an attention
    IDENTITIES: ClassVar[tuple[str, ...]] = ()
    DROPOUTS: ClassVar[tuple[str, ...]] = ()
    CHANCES: ClassVar[tuple[str, ...]] = ()
    VALUES: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    FLAGS: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar = "(self, x)"
    IDLE: ClassVar[frozenset[str]] = frozenset()
    KIND: ClassVar = "relpos"
    HALVES: ClassVar = False
    OTHERS: ClassVar[tuple[str, ...]] = ()
    BUFFERS: ClassVar[tuple[str, ...]] = ()
    DROP_PATH: ClassVar[str | None] = None
    WATCHED: ClassVar = True

    @classmethod
    def norms(cls, block: Foreign) -> dict[str, Foreign]:
        """Return the norms before the attention and before the MLP."""
        return {name: getattr(block, name) for name in cls.IN_BLOCK[::2]}

    @classmethod
    def attention(cls, block: Foreign) -> Foreign:
        """Return the attention of a block."""
        return getattr(block, cls.IN_BLOCK[1])

    @classmethod
    def mlp(cls, block: Foreign) -> Foreign:
        """Return the MLP of a block."""
        return getattr(block, cls.IN_BLOCK[3])

    @classmethod
    def activation(cls, block: Foreign) -> Foreign:
        """Return the activation in the MLP of a block."""
        return getattr(cls.mlp(block), cls.IN_MLP[2])

    @classmethod
    def window(cls, block: Foreign) -> int:
        """Return the side of a block's windows; 0 for the whole map."""
        return getattr(block, cls.WINDOW)

    @classmethod
    def linears(cls, block: Foreign) -> dict[str, Foreign]:
        """Return the linear layers in the order they run: qkv or q, k and v, and three more."""
        mlp = cls.mlp(block)
        around = {name: getattr(mlp, name) for name in cls.IN_MLP[:2]}
        return {**cls.projections(cls.attention(block)), **around}

    @classmethod
    def projections(cls, attention: Foreign) -> dict[str, Foreign]:
        """Return the layers before and after the attention."""
        return {name: getattr(attention, name) for name in cls.IN_ATTENTION}

    @classmethod
    def heads(cls, attention: Foreign) -> int:
        """Return the number of heads of an attention."""
        return getattr(attention, cls.OPTIONS[0])

    @classmethod
    def scale(cls, attention: Foreign) -> float:
        """Return the factor of an attention's logits."""
        return getattr(attention, cls.OPTIONS[1])

    @classmethod
    def has_tables(cls, attention: Foreign) -> bool:
        """True if an attention has relative positions."""
        return getattr(attention, cls.OPTIONS[2])

    @classmethod
    def relative_positions(cls, attention: Foreign) -> tuple[Tensor, Tensor]:
        """Return the tables along the height and along the width."""
        height, width = cls.TABLES
        return getattr(attention, height), getattr(attention, width)

    @classmethod
    def tables(cls, block: Foreign, sides: tuple[int, int]) -> list[Tensor]:
        """Return the two tables of the attention's kind, for windows of these sides."""
        own = cls.relative_positions(cls.attention(block))
        return [fit_table(table, side) for table, side in zip(own, sides, strict=True)]

    @classmethod
    def positions_problem(cls, block: Foreign) -> str | None:
        """Say what is wrong with the attention's positions; None if nothing is."""
        attention = cls.attention(block)
        return None if cls.has_tables(attention) else "attn has no relative positions"

    @classmethod
    def fits_positions(cls, block: Foreign, sides: tuple[int, int]) -> bool:
        """True if the tables fit windows of these sides, or can be interpolated to fit."""
        return True

    @classmethod
    def drop_chance(cls, block: Foreign) -> float:
        """Return the probability that a sample's branch is dropped, in the block's mode."""
        part = None if cls.DROP_PATH is None else block.get_submodule(cls.DROP_PATH)
        return (
            getattr(part, "drop_prob", None) or 0.0 if part is not None and part.training else 0.0
        )

    @classmethod
    def activation_problem(cls, act: Foreign) -> str | None:
        """Say why the activation is not the exact GELU."""
        if type(act) is not nn.GELU or act.approximate != "none":
            return f"the activation is {act}, not the exact GELU"
        return None

    @classmethod
    def attention_altered(cls, attention: Foreign) -> bool:
        """True if calling the attention does more than its class says."""
        return altered(attention)

    @classmethod
    def recording(cls, attention: Foreign) -> bool:
        """True if this forward must give the library the attention's inner results."""
        return False

    @classmethod
    def option_problem(cls, block: Foreign) -> str | None:
        """Name a part with an effect that a fused block would leave out."""
        for path in cls.IDENTITIES:
            part = block.get_submodule(path)
            if type(part) is not nn.Identity or altered(part):
                return f"{path} is {kind_of(part)}, which a fused block leaves out"
        for path in cls.DROPOUTS:
            part = block.get_submodule(path)
            if type(part) not in (nn.Dropout, nn.Identity) or altered(part):
                return f"{path} is {kind_of(part)}, not a plain dropout"
            if part.training and getattr(part, "p", 0.0) > 0:
                return f"{path} is a dropout of {part.p}, which acts in training"
        for path in cls.CHANCES:
            parent, _, name = path.rpartition(".")
            part = block.get_submodule(parent)
            if part.training and (chance := getattr(part, name)) > 0:
                return f"{path} is {chance}, which acts in training"
        for path, value in cls.VALUES.items():
            parent, _, name = path.rpartition(".")
            if (found := getattr(block.get_submodule(parent), name, value)) is not value:
                return f"{path} is {found!r}, where a fused block takes {value!r}"
        return None

    @classmethod
    def example(
        cls, family: "Family", block: nn.Module, dim: int, heads: int, window: int,
        size: tuple[int, int], bias: bool, eps: float,
    ) -> nn.Module:  # fmt: skip
        """Let the library build a block of these sizes, if ``cases`` does not build one itself."""
        raise NotImplementedError


class Family(NamedTuple):
    """The classes of one library.

    package: its name   published: its code is trusted by its place, without reading each line
    attentions: all classes that a block's attention may have
    others: classes of further children
    """

    package: str
    attention: type[nn.Module]
    block: type[nn.Module]
    mlp: type[nn.Module]
    parts: type[Layout] = Layout
    published: bool = False
    attentions: tuple[type[nn.Module], ...] = ()
    others: tuple[type[nn.Module], ...] = ()

    def attention_of(self, block: Foreign) -> type[nn.Module]:
        """Find which of the classes the block's attention has."""
        found = type(block._modules.get(self.parts.IN_BLOCK[1]))
        return found if found in self.attentions else self.attention


def child(module: nn.Module, name: str) -> nn.Module | None:
    """Return the part of that name; None if there is none."""
    return module._modules.get(name)
