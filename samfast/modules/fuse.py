# SPDX-License-Identifier: Apache-2.0
"""Fused blocks and attention in a model and out again, in place."""

import sys

from torch import nn

from samfast.kernels.sam_block.plan import check_memory
from samfast.modules.stand_in import kind_of

_STOCK = "segment_anything.modeling.image_encoder"
_PARTS = ("norm1", "attn", "norm2", "mlp")  # of a transformer block, whoever wrote it


def fuse(model: nn.Module, memory: str | None = None) -> nn.Module:
    """Let the blocks of every SAM encoder in ``model`` run fused, in place; returns the model.

    segment_anything's Attention and Block become RelPosAttention and SamBlock: the same module
    objects with the same Parameters, submodules, hooks and state dict, so adapters, optimizers
    and files know no difference. Before or after ``attach``. Modules of classes derived from
    these, of other packages, or with a forward of their own, stay as they are; ``report`` says so.

    memory: what every block saves for its backward, see SamBlock: "fast" saves all that is dear
        to compute, "balanced" computes two of four layers again, "minimal" the whole block. The
        gradients are the same. None means "fast", and leaves blocks that are fused already as
        they are; another mode is theirs too, so fusing twice changes the mode or nothing.

    Raises ValueError when there is nothing to fuse, or memory is none of the three.
    """
    if memory is not None:
        check_memory(memory)
    kinds = _kinds()
    modules = list(_checked(model).modules())
    chosen = [m for m in modules if type(m) in kinds and "forward" not in m.__dict__]
    if not chosen and not any(type(m) in kinds.values() for m in modules):
        raise ValueError(_nothing(model, "fuse"))
    for module in chosen:
        module.__class__ = kinds[type(module)]
    for block in fused_blocks(model).values() if memory is not None else ():
        block.memory = memory
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo ``fuse``: segment_anything's own classes again, the same Parameters; in place.

    Modules that are not fused stay as they are. Raises ValueError for a model in which nothing is
    fused, and RuntimeError, before anything is changed, when the forward of a fused module was
    wrapped since: the wrapper holds the fused forward.
    """
    stock = {fused: kind for kind, fused in _kinds().items()}
    fused = {name: m for name, m in _checked(model).named_modules() if type(m) in stock}
    if not fused:
        raise ValueError(_nothing(model, "unfuse"))
    for name, module in fused.items():
        if "forward" in module.__dict__:
            raise RuntimeError(
                f"the forward of {name or 'the model'}, a {type(module).__name__}, was replaced "
                "after fuse; undo that before unfuse"
            )
    for module in fused.values():
        for option in ("backend", "memory"):
            module.__dict__.pop(option, None)
        module.__class__ = stock[type(module)]
    return model


def fused_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Every SamBlock by its full name."""
    _, fused = _block_kinds()
    return {name: m for name, m in model.named_modules() if type(m) is fused}


def block_states(model: nn.Module) -> dict[str, str]:
    """How every transformer block runs, by full name: segment_anything's, and any with its parts.

    "fused", or "fused in parts: …" or "not fused: …" with the reason
    """
    stock, fused = _block_kinds()
    states = {}
    for name, module in model.named_modules():
        if type(module) is fused:
            problem = module.block_problem()
            states[name] = "fused" if problem is None else f"fused in parts: {problem}"
        elif stock is not None and isinstance(module, stock):
            states[name] = f"not fused: {_why_not(module, stock)}"
        elif all(module._modules.get(part) is not None for part in _PARTS):
            states[name] = f"not fused: {kind_of(module)}, which is not segment_anything's"
    return states


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


def _block_kinds() -> tuple[type[nn.Module] | None, type[nn.Module] | None]:
    """segment_anything's Block and what replaces it, None while no model can have them."""
    kinds = _kinds()
    return list(kinds.items())[1] if kinds else (None, None)


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


def _nothing(model: nn.Module, action: str) -> str:
    kind = type(model).__name__
    for name, state in attention_states(model).items():
        return f"this {kind} has nothing to {action}; {name or 'it'} is {state}"
    sentence = f"this {kind} has no attention of the segment_anything package, which fuse is for"
    for name, state in block_states(model).items():
        return f"{sentence}; {name or 'it'} is {state}"
    return sentence
