# SPDX-License-Identifier: Apache-2.0
"""What SAM's mask decoder predicts: its own masks, or one mask of one class.

"sam"      the decoder as it is: four mask tokens, each with a hypernetwork
"binary"   only token 0 and hypernetwork 0 (Conv-LoRA, ICLR 2024)
"multi-task"   a decoder for each of several tasks; only samfast.models.MultiTaskSam has it

The decoder carries the parts that a head removed, so copies and pickles do too.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samfast.adapters.foreign import Foreign, Model
from samfast.adapters.wrappers import unclear, unwrapped
from samfast.models.hugging_face import is_high_quality

# What one mask reads in the decoder: all but the quality head and, if the head has them, the other
# masks' hypernetworks. Entries for ``attach(..., train=TRAINED_DECODER)``.
TRAINED_DECODER = (
    "mask_decoder.transformer",
    "mask_decoder.iou_token",
    "mask_decoder.mask_tokens",
    "mask_decoder.output_upscaling",
    "mask_decoder.output_hypernetworks_mlps.0",
)
MULTI_TASK = "multi-task"
_ATTRIBUTE = "samfast_taken"
_TOKENS = "mask_decoder.mask_tokens.weight"
_NETWORKS = "mask_decoder.output_hypernetworks_mlps"


@dataclass
class _Taken:
    """The mask tokens [masks - 1, 256] and hypernetworks that a binary head does not use."""

    tokens: Tensor
    networks: tuple[nn.Module, ...]


def head_of(model: nn.Module) -> str:
    """Return the name of the model's head; "sam" if it was given none."""
    model = unwrapped(model)
    if hasattr(model, "samfast_head"):
        return str(model.samfast_head)
    return "sam" if _taken(model) is None else "binary"


def binary_head(sam: Model) -> Model:
    """Reduce the mask decoder to SAM's mask token 0 and its hypernetwork, in place.

    Use it for one class without prompts. ``segment`` then predicts what a ``MaskDecoder`` of one
    mask predicts with these weights. This differs from mask 0 of the full decoder, where token 0
    also attends to the other three mask tokens. The quality head stays but is never read, so freeze
    it: ``train=TRAINED_DECODER`` trains all the rest, 3,505,536 elements.
    ``multimask_output=True`` raises ValueError.

    A model that already has the head stays as it is. ``restore_head`` puts the removed parts back.
    Raises ValueError for a model without SAM's mask decoder, or with that of a SamHQModel.
    """
    if _taken(sam) is not None:
        return sam
    if is_high_quality(unwrapped(sam)):
        raise ValueError(
            f"a binary head would remove the high-quality mask of this {type(sam).__name__}; "
            "train its mask_decoder as it is"
        )
    decoder: Foreign = getattr(unwrapped(sam), "mask_decoder", None)
    parts = ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")
    if not all(isinstance(getattr(decoder, part, None), nn.Module) for part in parts):
        raise ValueError(f"this {type(sam).__name__} has no mask decoder of SAM{unclear(sam)}")
    _refuse_copies(decoder, "binary_head")
    tokens, networks = decoder.mask_tokens, decoder.output_hypernetworks_mlps
    weight = tokens.weight
    setattr(decoder, _ATTRIBUTE, _Taken(weight.detach()[1:].clone(), tuple(networks[1:])))
    _set_tokens(decoder, weight.detach()[:1].clone(), weight.requires_grad)
    decoder.output_hypernetworks_mlps = networks[:1].train(networks.training)
    decoder.register_forward_pre_hook(_refuse_multimask, with_kwargs=True)
    return sam


def restore_head(sam: Model) -> Model:
    """Undo ``binary_head``, in place. A model without a binary head stays as it is.

    Token 0 and hypernetwork 0 keep their present values; the others are restored. The decoder has
    SAM's form again, but its mask 0 is not what the binary head predicted (see ``binary_head``).
    Calling ``binary_head`` again gives the former predictions, bit for bit.
    """
    taken = _taken(sam)
    if taken is None:
        return sam
    decoder: Foreign = unwrapped(sam).mask_decoder
    _refuse_copies(decoder, "restore_head")
    weight = decoder.mask_tokens.weight
    tokens = torch.cat([weight.detach(), taken.tokens.to(weight)])
    _set_tokens(decoder, tokens, weight.requires_grad)
    first = decoder.output_hypernetworks_mlps[0]
    others = [network.to(weight.device, weight.dtype) for network in taken.networks]
    networks = nn.ModuleList([first, *others]).train(first.training)
    # Frozen like the quality head, which a single mask never reads either.
    quality = decoder.iou_prediction_head.parameters()
    networks[1:].requires_grad_(any(parameter.requires_grad for parameter in quality))
    decoder.output_hypernetworks_mlps = networks
    for key, hook in list(decoder._forward_pre_hooks.items()):
        if hook is _refuse_multimask:
            del decoder._forward_pre_hooks[key]
            decoder._forward_pre_hooks_with_kwargs.pop(key, None)
    delattr(decoder, _ATTRIBUTE)
    return sam


def stock_state_dict(
    sam: nn.Module, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return ``state`` (default: sam's state dict) with the tensors that a stock SAM loads.

    The parts that a binary head removed are put back; other models need none. The model stays as it
    is. A stock SAM that loads the result needs ``binary_head`` to predict the same.
    """
    sam = unwrapped(sam)
    state = dict(sam.state_dict() if state is None else state)
    taken = _taken(sam)
    if taken is None:
        return state
    first = state[_TOKENS]
    state[_TOKENS] = torch.cat([first, taken.tokens.to(first)])
    for i, network in enumerate(taken.networks, start=1):
        for name, value in network.state_dict().items():
            state[f"{_NETWORKS}.{i}.{name}"] = value.to(first)
    return state


_PARTS = ("mask_tokens", "output_hypernetworks_mlps", "num_mask_tokens", "num_multimask_outputs")

# How a model gets a head, by the head's name in adapter files.
HEADS: dict[str, Callable[[nn.Module], nn.Module]] = {"sam": restore_head, "binary": binary_head}


@contextmanager
def given_head(model: nn.Module, name: str) -> Iterator[None]:
    """Give the model a head of HEADS; restore the old one if the block raises."""
    if name == MULTI_TASK:  # the model was made with it
        yield
        return
    before, done = head_of(model), False
    decoder = getattr(model, "mask_decoder", None)
    parts = {part: getattr(decoder, part) for part in _PARTS if hasattr(decoder, part)}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    HEADS[name](model)
    try:
        yield
        done = True
    finally:
        if not done:
            HEADS[before](model)
            for part, value in parts.items():  # the same modules, for code that holds them
                setattr(decoder, part, value)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _taken(model: nn.Module) -> _Taken | None:
    return getattr(getattr(unwrapped(model), "mask_decoder", None), _ATTRIBUTE, None)


def _refuse_copies(decoder: Foreign, action: str) -> None:
    """Raise ValueError if PEFT holds copies of the decoder, which a change would not reach."""
    if "modules_to_save" in decoder._modules:
        raise ValueError(
            f"the mask decoder is in PEFT's modules_to_save, and {action} would miss its copies; "
            f"call {action} before peft.get_peft_model"
        )


def _set_tokens(decoder: Foreign, weight: Tensor, trained: bool) -> None:
    """Give the decoder these mask tokens [masks, 256] and the matching counts."""
    masks, width = weight.shape
    tokens = nn.Embedding(masks, width, _weight=weight)
    decoder.mask_tokens = tokens.train(decoder.mask_tokens.training).requires_grad_(trained)
    decoder.num_mask_tokens = len(weight)
    decoder.num_multimask_outputs = len(weight) - 1


def _refuse_multimask(decoder: Foreign, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse ``multimask_output``, for which ``MaskDecoder.forward`` would return no mask."""
    if kwargs.get("multimask_output", len(args) > 4 and args[4]):
        raise ValueError(
            "this mask decoder has one mask (binary head); pass multimask_output=False"
        )
