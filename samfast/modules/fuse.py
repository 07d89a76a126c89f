# SPDX-License-Identifier: Apache-2.0
"""Fused attention in a model and out again, in place."""

import sys

from torch import nn

_STOCK = "segment_anything.modeling.image_encoder"


def fuse(model: nn.Module) -> nn.Module:
    """Let the attention of every SAM encoder in ``model`` run fused, in place; returns the model.

    segment_anything's Attention and Block become RelPosAttention and SamBlock: the same module
    objects with the same Parameters, submodules, hooks and state dict, so adapters, optimizers
    and files know no difference. Before or after ``attach``; twice is once. Modules of classes
    derived from these, or with a forward of their own, stay as they are; ``report`` says so.

    Raises ValueError when there is nothing to fuse.
    """
    kinds = _kinds()
    modules = list(_checked(model).modules())
    chosen = [m for m in modules if type(m) in kinds and "forward" not in m.__dict__]
    if not chosen and not any(type(m) in kinds.values() for m in modules):
        raise ValueError(_nothing(model))
    for module in chosen:
        module.__class__ = kinds[type(module)]
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo ``fuse``: segment_anything's own classes again, the same Parameters; in place.

    Modules that are not fused stay as they are. Raises ValueError for a model without SAM's
    attention, and RuntimeError, before anything is changed, when the forward of a fused module was
    wrapped since: the wrapper holds the fused forward.
    """
    stock = {fused: kind for kind, fused in _kinds().items()}
    if not attention_states(_checked(model)):
        raise ValueError(_nothing(model))
    fused = {name: m for name, m in model.named_modules() if type(m) in stock}
    for name, module in fused.items():
        if "forward" in module.__dict__:
            raise RuntimeError(
                f"the forward of {name or 'the model'}, a {type(module).__name__}, was replaced "
                "after fuse; undo that before unfuse"
            )
    for module in fused.values():
        module.__dict__.pop("backend", None)
        module.__class__ = stock[type(module)]
    return model


def attention_states(model: nn.Module) -> dict[str, str]:
    """How every attention of segment_anything's runs, by full name.

    "fused", or "fused, windows cut first: …" or "not fused: …" with the reason
    """
    kinds = _kinds()
    stock, block_kind = tuple(kinds) or (None, None)
    states, blocks = {}, {}
    for block in model.modules() if kinds else ():
        if isinstance(block, block_kind):  # several may share an attention
            blocks.setdefault(id(getattr(block, "attn", None)), []).append(block)
    for name, module in model.named_modules() if kinds else ():
        if not isinstance(module, stock):
            continue
        if type(module) not in kinds.values():
            states[name] = f"not fused: {_why_not(module, stock)}"
            continue
        around = [b for b in blocks.get(id(module), []) if b.window_size > 0]
        reasons = [_cut_first(block, block_kind, kinds[block_kind]) for block in around]
        reason = next((r for r in reasons if r is not None), None)
        states[name] = "fused" if reason is None else f"fused, windows cut first: {reason}"
    return states


def _cut_first(block: nn.Module, stock: type[nn.Module], fused: type[nn.Module]) -> str | None:
    """Why the windows of a block are cut before its attention, None when they are not."""
    if type(block) is fused:
        return block.window_order()
    return f"its block is {_why_not(block, stock)}"


def _kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """What replaces segment_anything's Attention and Block; {} while no model can have them."""
    encoder = sys.modules.get(_STOCK)
    if encoder is None:
        return {}
    from samfast.modules.rel_pos_attention import RelPosAttention
    from samfast.modules.sam_block import SamBlock

    return {encoder.Attention: RelPosAttention, encoder.Block: SamBlock}


def _why_not(module: nn.Module, stock: type[nn.Module]) -> str:
    kind = type(module).__name__
    if type(module) is not stock:
        return f"a {kind}, a class derived from segment_anything's {stock.__name__}"
    if "forward" in module.__dict__:
        return f"{kind} with a forward that was replaced"
    return "still segment_anything's own"


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, not a torch.nn.Module")
    return model


def _nothing(model: nn.Module) -> str:
    kind = type(model).__name__
    for name, state in attention_states(model).items():
        return f"this {kind} has nothing to fuse; {name or 'it'} is {state}"
    return f"this {kind} has no attention of the segment_anything package, which fuse is for"
