# SPDX-License-Identifier: Apache-2.0
"""What SAM's mask decoder predicts: its own masks, or one mask of one class.

"sam"      the decoder as it is: four mask tokens, each with a hypernetwork
"binary"   token 0 and hypernetwork 0 alone (Conv-LoRA, ICLR 2024)
"multi-task"   a decoder for each of several tasks; samfast.models.MultiTaskSam is made with it

The decoder carries what a head took away from it, so copies and pickles do too.
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

# What one mask reads of the decoder: all but the quality head, and the other masks' hypernetworks
# where the head has them. Entries for ``attach(..., train=TRAINED_DECODER)``.
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
    """The mask tokens [masks - 1, 256] and hypernetworks that a binary head does without."""

    tokens: Tensor
    networks: tuple[nn.Module, ...]


def head_of(model: nn.Module) -> str:
    """The name of the model's head; "sam" for any model that no head was given to."""
    model = unwrapped(model)
    if hasattr(model, "samfast_head"):
        return str(model.samfast_head)
    return "sam" if _taken(model) is None else "binary"


def binary_head(sam: Model) -> Model:
    """Leave the mask decoder one mask token, SAM's token 0, and its hypernetwork. In place.

    For one class without prompts. ``segment`` then gives what a ``MaskDecoder`` of one mask gives
    with these weights; that is not mask 0 of the decoder before, for there token 0 attends to the
    other three mask tokens as well. The quality head stays and is used by no one, so freeze it:
    ``train=TRAINED_DECODER`` trains all the rest, 3,505,536 elements. ``multimask_output=True``
    has nothing to choose from and raises ValueError.

    A model that has the head stays as it is. ``restore_head`` puts back what was taken away.
    Raises ValueError for a model without SAM's mask decoder, or with that of a SamHQModel.
    """
    if _taken(sam) is not None:
        return sam
    if is_high_quality(unwrapped(sam)):
        raise ValueError(
            f"a binary head would leave out the high-quality mask of this {type(sam).__name__}; "
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
    """Undo ``binary_head``, in place: token 0 and hypernetwork 0 as they are now, the others as
    they were. A model without a binary head stays as it is.

    The decoder has SAM's form again, but its mask 0 is not what the binary head predicted (see
    ``binary_head``); a binary head made of it again predicts that, bit for bit.
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
    # As frozen as the quality head, the other part that a single mask never reads.
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
    """``state`` (sam's state dict if not given) with the tensors that a stock SAM loads.

    What a binary head took away is put back; for other models nothing changes. The model stays
    as it is. A stock SAM that loads it needs ``binary_head`` to predict what this one does.
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

# How a model gets a head, by the name that adapter files hold.
HEADS: dict[str, Callable[[nn.Module], nn.Module]] = {"sam": restore_head, "binary": binary_head}


@contextmanager
def given_head(model: nn.Module, name: str) -> Iterator[None]:
    """Give the model a head of HEADS; when the block raises, it gets back the one it had."""
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
            for part, value in parts.items():  # the very same modules, for whoever holds them
                setattr(decoder, part, value)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _taken(model: nn.Module) -> _Taken | None:
    return getattr(getattr(unwrapped(model), "mask_decoder", None), _ATTRIBUTE, None)


def _refuse_copies(decoder: Foreign, action: str) -> None:
    """Raise ValueError where PEFT keeps copies of the decoder, which a change would not reach."""
    if "modules_to_save" in decoder._modules:
        raise ValueError(
            f"the mask decoder is in PEFT's modules_to_save, and {action} would miss its copies; "
            f"call {action} before peft.get_peft_model"
        )


def _set_tokens(decoder: Foreign, weight: Tensor, trained: bool) -> None:
    """Give the decoder these mask tokens [masks, 256] and the counts that go with them."""
    masks, width = weight.shape
    tokens = nn.Embedding(masks, width, _weight=weight)
    decoder.mask_tokens = tokens.train(decoder.mask_tokens.training).requires_grad_(trained)
    decoder.num_mask_tokens = len(weight)
    decoder.num_multimask_outputs = len(weight) - 1


def _refuse_multimask(decoder: Foreign, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before ``MaskDecoder.forward``, which would return no mask at all."""
    if kwargs.get("multimask_output", len(args) > 4 and args[4]):
        raise ValueError("this mask decoder has one mask (a binary head): multimask_output=False")
