# SPDX-License-Identifier: Apache-2.0
"""The vision blocks of Meta's package ``sam3`` (tested with sam3 0.1.4).

Since SAM 3.1 its MLP calls an operator without gradients, which a fused block does not call.
"""

import functools
import sys
from typing import ClassVar

import torch
from torch import Tensor, nn

from samfast.adapters.foreign import Foreign
from samfast.adapters.stand_in import altered, kind_of
from samfast.fused.parts import Family, Layout


class RotaryBlock(Layout):
    """The names that sam3 gives to the parts of a vitdet.Block."""

    WATCHED: ClassVar = False
    KIND: ClassVar = "rope"
    IN_MLP: ClassVar = ("fc1", "fc2", "act")
    TABLES: ClassVar[tuple[str, ...]] = ()
    OPTIONS: ClassVar = ("num_heads", "scale", "use_rope")
    IDENTITIES: ClassVar = ("ls1", "ls2", "mlp.norm")
    DROPOUTS: ClassVar = ("dropout", "mlp.drop1", "mlp.drop2")
    FLAGS: ClassVar = ("attn.use_rel_pos", "attn.cls_token")
    OTHERS: ClassVar = ("drop_path",)
    BUFFERS: ClassVar = ("attn.freqs_cis",)
    DROP_PATH: ClassVar = "drop_path"

    @classmethod
    def scale(cls, attention: Foreign) -> float:
        """Return torch's default scale, which the forward uses whatever the attention holds."""
        return (attention.qkv.out_features // (3 * attention.num_heads)) ** -0.5

    @classmethod
    def positions_problem(cls, block: Foreign) -> str | None:
        attention = block.attn
        if not attention.use_rope or attention.use_rel_pos or attention.cls_token:
            options = (f"{n}={getattr(attention, n)}" for n in ("use_rope", *cls._flags()))
            return f"its attention has {', '.join(options)}, where a fused one has only rope"
        if not attention.freqs_cis.is_complex():
            return f"freqs_cis is {attention.freqs_cis.dtype}, a cast lost its imaginary part"
        return None

    @classmethod
    def _flags(cls) -> list[str]:
        return [path.rpartition(".")[2] for path in cls.FLAGS]

    @classmethod
    def tables(cls, block: Foreign, sides: tuple[int, int]) -> list[Tensor]:
        """Return views of the buffer's real and imaginary parts."""
        return list(torch.view_as_real(block.attn.freqs_cis).unbind(-1))

    @classmethod
    def fits_positions(cls, block: Foreign, sides: tuple[int, int]) -> bool:
        return len(block.attn.freqs_cis) == sides[0] * sides[1]

    @classmethod
    def option_problem(cls, block: Foreign) -> str | None:
        drop = block.drop_path
        known = type(drop) is nn.Identity or (
            type(drop).__name__ == "DropPath" and type(drop).__module__.startswith("timm.")
        )
        if not known or altered(drop) or not getattr(drop, "scale_by_keep", True):
            return f"drop_path is {kind_of(drop)}, not timm's DropPath as it is made"
        return super().option_problem(block)

    @classmethod
    def example(
        cls, family: Family, block: Foreign, dim: int, heads: int, window: int,
        size: tuple[int, int], bias: bool, eps: float,
    ) -> nn.Module:  # fmt: skip
        """Let sam3 build a block of these sizes; skip its MLP, which may have no gradients."""
        made = family.block(
            dim, heads, mlp_ratio=1.0, qkv_bias=bias, use_rope=True, window_size=window,
            input_size=size, rope_pt_size=(24, 24), rope_interp=True,
            norm_layer=functools.partial(nn.LayerNorm, eps=eps),
        )  # fmt: skip
        made.mlp = _MLP(dim)
        return made


class _MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def family(kind: type[nn.Module]) -> Family | None:
    """Return the classes in the module of a block's or an attention's class."""
    beside = vars(sys.modules[kind.__module__])
    attention, block, mlp = (beside.get(name) for name in ("Attention", "Block", "Mlp"))
    if attention is None or block is None or mlp is None:
        return None
    return Family("sam3", attention, block, mlp, RotaryBlock, True)
