# SPDX-License-Identifier: Apache-2.0
"""FLOP of the operators for torch's FLOP counter, which does not look into them.

Importing registers the formulas. They count what the backend that runs executes, see ``costs.py``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from samfast.kernels._common import backends
from samfast.kernels._common.windows import Windows
from samfast.kernels.lora_linear.costs import Stage
from samfast.kernels.relpos_attention import costs, op

_OPS = torch.ops.samfast
OPERATORS = tuple(
    f"samfast::{kind}_{way}"
    for kind in ("relpos_attention", "window_relpos_attention")
    for way in ("forward", "backward")
)
_TORCH_STANDS_FOR: ContextVar[str] = ContextVar("torch_stands_for", default="torch")


class _Like(NamedTuple):
    """What ``op.supports`` asks of q, without a call that a mode would see."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@contextmanager
def torch_stands_for(backend: str) -> Iterator[None]:
    """Count what is asked of the torch backend as ``backend`` would execute it.

    For a call that is made only to count another one; "auto" is resolved as the operator does.
    """
    token = _TORCH_STANDS_FOR.set(backend)
    try:
        yield
    finally:
        _TORCH_STANDS_FOR.reset(token)


def _stages(q, windows, backend: str, tables: bool = True, way: str = "forward") -> int:
    """FLOP of one way. q: (batch, H, W, heads, head_dim), or packed with 3 before the heads"""
    windows, heads = Windows(*windows), q.shape[-2:]
    like = _Like((*q.shape[:3], *heads), q.dtype, q.device)
    asked = backends.requested(backend)
    asked = _TORCH_STANDS_FOR.get() if asked == "torch" else asked
    chosen = op.TABLE.choose(asked, q.device, lambda b: op.supports(b, like, windows))
    made: list[Stage] = costs.BY_BACKEND[chosen](windows, *heads, q.element_size(), tables)
    first = costs.FORWARD_STAGES[chosen](windows)
    return sum(stage.flops for stage in (made[:first] if way == "forward" else made[first:]))


@register_flop_formula(_OPS.relpos_attention_forward, get_raw=True)
def _apart_forward(q, k, v, table_h, table_w, windows, scale, backend, *_, **__) -> int:
    return _stages(q, windows, backend)


@register_flop_formula(_OPS.relpos_attention_backward, get_raw=True)
def _apart_backward(
    dout, out, lse, q, k, v, table_h, table_w, windows, scale, backend, needs, *_, **__
) -> int:
    return _stages(q, windows, backend, any(needs[3:]), "backward")


@register_flop_formula(_OPS.window_relpos_attention_forward, get_raw=True)
def _packed_forward(
    qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, scale, backend, *_, **__
) -> int:
    return _stages(qkv, windows, backend)


@register_flop_formula(_OPS.window_relpos_attention_backward, get_raw=True)
def _packed_backward(
    dout, out, lse, qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, scale, backend, needs,
    *_, **__,
) -> int:  # fmt: skip
    return _stages(qkv, windows, backend, any(needs[4:]), "backward")
