# SPDX-License-Identifier: Apache-2.0
"""The blocks of timm's ``samvit_*`` models (tested with timm 1.0.31)."""

import sys
from types import MappingProxyType
from typing import ClassVar

from torch import nn

from samfast.fused.parts import Family, Layout


class TimmBlock(Layout):
    """The names that timm gives to the parts."""

    WATCHED: ClassVar = False
    IN_MLP: ClassVar = ("fc1", "fc2", "act")
    IDENTITIES: ClassVar = (
        *("ls1", "drop_path1", "ls2", "drop_path2"),
        *("attn.q_norm", "attn.k_norm", "mlp.norm"),
    )
    DROPOUTS: ClassVar = ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2")
    VALUES: ClassVar = MappingProxyType({"attn.rope": None})
    FLAGS: ClassVar = ("attn.fused_attn",)


def family(kind: type[nn.Module]) -> Family | None:
    """Return the classes in the module of a block's or an attention's class."""
    beside = vars(sys.modules[kind.__module__])
    attention, block, mlp = (beside.get(name) for name in ("Attention", "Block", "Mlp"))
    if attention is None or block is None or mlp is None:
        return None
    return Family("timm", attention, block, mlp, TimmBlock, True)
