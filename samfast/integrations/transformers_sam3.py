# SPDX-License-Identifier: Apache-2.0
"""The vision layers of Hugging Face's SAM 3 (tested with transformers 5.23).

Sam3Model, Sam3TrackerModel and Sam3VisionModel share them.
"""

import copy
import operator
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from samfast.adapters.foreign import Foreign
from samfast.adapters.stand_in import altered, kind_of
from samfast.fused.parts import KEPT, Family
from samfast.integrations.transformers_sam import VisionLayer

_OWN = (None, "eager", "sdpa")  # attentions that compute the formula; None is eager
_FEATURES = "hidden_size", "intermediate_size"


class RotaryLayer(VisionLayer):
    """The names that transformers gives to the parts of a Sam3ViTLayer."""

    IDLE: ClassVar = frozenset({"output_hidden_states", "output_attentions", "return_dict"})
    KIND: ClassVar = "rope"
    IN_BLOCK: ClassVar = ("layer_norm1", "attention", "layer_norm2", "mlp")
    IN_ATTENTION: ClassVar = ("q_proj", "k_proj", "v_proj", "o_proj")
    IN_MLP: ClassVar = ("fc1", "fc2", "activation_fn")
    TABLES: ClassVar[tuple[str, ...]] = ()
    OPTIONS: ClassVar = ("num_attention_heads", "scaling", "is_causal")
    DROPOUTS: ClassVar = ("dropout", "mlp.dropout")
    CHANCES: ClassVar = ("attention.attention_dropout",)
    OTHERS: ClassVar = ("rotary_emb",)
    BUFFERS: ClassVar = ("position_ids",)

    @classmethod
    def positions_problem(cls, block: Foreign) -> str | None:
        attention, rotary = block.attention, block.rotary_emb
        if attention.is_causal:
            return "its attention is causal"
        if (own := attention.config._attn_implementation) not in _OWN:
            return f"its attention is {own!r}, not one of {', '.join(_OWN[1:])}"
        beside = vars(sys.modules[type(rotary).__module__])
        if beside.get("Sam3ViTLayer") is None or altered(rotary):
            return f"rotary_emb is {kind_of(rotary)}, or has hooks or a forward of its own"
        return None

    @classmethod
    def tables(cls, block: Foreign, sides: tuple[int, int]) -> list[Tensor]:
        """Return cos and sin, computed once for each state of their sources."""
        rotary = block.rotary_emb
        sources = block.position_ids, rotary.inv_freq
        if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return _tables(block)
        numbers = *(t._version for t in sources), rotary.attention_scaling
        numbers = *numbers, block.layer_norm1.weight.device
        own: dict[str, Any] = block.__dict__
        kept = own.get(KEPT)
        if kept is not None and kept[1] == numbers and all(map(operator.is_, kept[0], sources)):
            return kept[2]
        with torch.inference_mode(False):  # a later backward may need them
            made = _tables(block)
        if all(type(t) is Tensor for t in made):  # not a tracer's tensors
            own[KEPT] = (sources, numbers, made)
        return made

    @classmethod
    def fits_positions(cls, block: Foreign, sides: tuple[int, int]) -> bool:
        return len(block.position_ids) == sides[0] * sides[1]

    @classmethod
    def example(
        cls, family: Family, block: Foreign, dim: int, heads: int, window: int,
        size: tuple[int, int], bias: bool, eps: float,
    ) -> nn.Module:  # fmt: skip
        """Let transformers build a layer of these sizes, with an MLP no wider than the layer."""
        config = copy.deepcopy(block.config)
        for name, value in (*((name, dim) for name in _FEATURES), ("layer_norm_eps", eps)):
            setattr(config, name, value)
        config.num_attention_heads = heads
        config.attention_dropout = config.hidden_dropout = 0.0
        # This block's own values are checked elsewhere; the answer serves other blocks too.
        config.hidden_act, config._attn_implementation = "gelu", "sdpa"
        patch = config.patch_size
        across, down = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        config.image_size = [size[1] * across, size[0] * down]
        return family.block(config, window_size=window)


def _tables(block: Foreign) -> list[Tensor]:
    """Return every value once; transformers holds it for both features of a pair."""
    twice = block.rotary_emb(block.layer_norm1.weight, block.position_ids)
    return [t.reshape(-1, t.shape[-1])[:, ::2].contiguous() for t in twice]


def family(kind: type[nn.Module]) -> Family | None:
    """Return the classes in the module of a layer's or an attention's class."""
    beside = vars(sys.modules[kind.__module__])
    names = ("Sam3ViTRoPEAttention", "Sam3ViTLayer", "Sam3MLP", "Sam3ViTRotaryEmbedding")
    attention, layer, mlp, rotary = (beside.get(name) for name in names)
    if attention is None or layer is None or mlp is None or rotary is None:
        return None
    return Family("transformers", attention, layer, mlp, RotaryLayer, True, others=(rotary,))
