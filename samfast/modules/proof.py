# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.fused.proof``."""

from samfast.fused.families import load
from samfast.fused.proof import LAYERS, objection, signature

__all__ = ["LAYERS", "PARTS", "READ", "TABLES", "objection", "signature"]

_family = load()
_kinds, _parts = (_family.block, _family.attention, _family.mlp), _family.parts
PARTS = dict(zip(_kinds, (_parts.IN_BLOCK, _parts.IN_ATTENTION, _parts.IN_MLP), strict=True))
READ = dict(zip(_kinds, ((_parts.WINDOW,), _parts.OPTIONS, ()), strict=True))
TABLES = _parts.TABLES
