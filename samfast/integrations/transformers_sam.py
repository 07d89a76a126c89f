# SPDX-License-Identifier: Apache-2.0
"""The vision layers of Hugging Face's SamModel and SamHQModel (tested with transformers 5.23)."""

import sys
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from samfast.adapters.foreign import Foreign
from samfast.adapters.stand_in import altered
from samfast.fused.parts import Family, Layout

_HOOKS = "transformers.utils.output_capturing"
_GELU = "transformers.activations"


class VisionLayer(Layout):
    """The names that transformers gives to the parts."""

    WATCHED: ClassVar = False
    IN_BLOCK: ClassVar = ("layer_norm1", "attn", "layer_norm2", "mlp")
    OPTIONS: ClassVar = ("num_attention_heads", "scale", "use_rel_pos")
    CHANCES: ClassVar = ("attn.dropout",)

    @classmethod
    def activation_problem(cls, act: Foreign) -> str | None:
        """Say if the activation is not the exact GELU; GELUActivation holds its function."""
        kind = type(act)
        if kind.__module__ != _GELU or kind.__qualname__ != "GELUActivation":
            return super().activation_problem(act)
        as_written = getattr(kind.forward, "__globals__", {}).get("__name__") == _GELU
        as_written = as_written and kind.__call__ is nn.Module.__call__
        return None if as_written and act.act is F.gelu else f"the activation is a changed {act}"

    @classmethod
    def attention_altered(cls, attention: Foreign) -> bool:
        """True if a call does more; transformers' recording hooks count only while they record."""
        hooks = attention._forward_hooks
        if not hooks or not all(_records(hook) for hook in hooks.values()):
            return altered(attention)
        if torch.compiler.is_compiling():
            return True  # a graph may serve both cases
        others = (
            attention._forward_pre_hooks,
            attention._backward_hooks,
            attention._backward_pre_hooks,
        )
        return cls.recording(attention) or any(others) or "forward" in vars(attention)

    @classmethod
    def recording(cls, attention: Foreign) -> bool:
        """True during a forward that returns attentions."""
        if not attention._forward_hooks or torch.compiler.is_compiling():
            return False
        hooks = sys.modules.get(_HOOKS)
        return hooks is not None and "attentions" in (hooks._active_collector.get() or ())


def _records(hook: Any) -> bool:
    """True for a hook with which transformers records outputs."""
    return getattr(hook, "__module__", "") == _HOOKS


def family(kind: type[nn.Module]) -> Family | None:
    """Return the classes in the module of a layer's or an attention's class."""
    prefix = "SamHQ" if kind.__name__.startswith("SamHQ") else "Sam"
    beside = vars(sys.modules[kind.__module__])
    names = (f"{prefix}Vision{part}" for part in ("Layer", "Attention", "SdpaAttention"))
    layer, eager, sdpa = (beside.get(name) for name in names)
    mlp = beside.get(f"{prefix}MLPBlock")
    if layer is None or eager is None or mlp is None:
        return None
    attentions = tuple(kind for kind in (eager, sdpa) if kind is not None)
    return Family("transformers", eager, layer, mlp, VisionLayer, True, attentions)
