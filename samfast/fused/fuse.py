# SPDX-License-Identifier: Apache-2.0
"""Fused blocks and attention in a model and out again, in place."""

import warnings

from torch import nn

from samfast.adapters.stand_in import kind_of, runs_as
from samfast.fused import parts
from samfast.integrations.libraries import fusable
from samfast.integrations.swap import is_swapped, swap, swap_back, swapped
from samfast.kernels.sam_block.plan import check_memory

_OWN = "still segment_anything's own"
_OPTIONS = ("backend", "left_alone", "memory")  # attributes of fused modules
_INSIDE = "its block is left alone"


def fuse(model: nn.Module, memory: str | None = None) -> nn.Module:
    """Let SAM's encoders and PEFT's layers in ``model`` run fused, in place; returns the model.

    segment_anything's Attention and Block become RelPosAttention and SamBlock: the same module
    objects with the same Parameters, submodules, hooks and state dict, so adapters, optimizers
    and files know no difference. Before or after ``attach``.

    A class is proved before it is trusted, on a CPU, in about a second for ViT-H: its forward takes
    what segment_anything's takes and reaches nothing but its module, torch and numbers, its
    children are the same, and runs with weights of its own give the same result and gradients. A
    block that fails stays as it is, its attention too; a warning says why, and ``report``. The
    question is asked again, at every forward, once a class was patched or got another part.
    Modules of classes derived from these, of other packages, or with a forward of their own, stay
    as they are as well; the attention of a derived block is fused. Hooks that torch registers for
    all modules see a fused block as one module.

    PEFT's ``lora.Linear`` becomes a class derived from it, in a block or anywhere else in the
    model, which may be a PeftModel. Parameters, files and PEFT's calls stay as they are. A layer
    that PEFT's ``add_adapter`` makes later needs ``fuse`` again. See
    ``samfast.integrations.peft_layers``.

    memory: what every block saves for its backward, see SamBlock: "fast" saves all that is dear
        to compute, "balanced" computes two of four layers again, "minimal" the whole block. The
        gradients are the same. None means "fast", and leaves blocks that are fused already as
        they are; another mode is theirs too, so fusing twice changes the mode or nothing.

    Raises ValueError when there is nothing to fuse, or memory is none of the three.
    """
    if memory is not None:
        check_memory(memory)
    kinds = _kinds()
    modules = dict(_checked(model).named_modules())
    asked = {n: m for n, m in modules.items() if type(m) in kinds and "forward" not in m.__dict__}
    layers = {n: kind for n, m in modules.items() if (kind := fusable(m)) is not None}
    if not asked and not layers and not any(_is_fused(m, kinds) for m in modules.values()):
        raise ValueError(_nothing(model, "fuse"))
    for name, mixin in layers.items():
        swap(modules[name], mixin)
    objections = _objections(asked)
    for name, module in asked.items():
        if name not in objections:
            module.__class__ = kinds[type(module)]
    if objections:
        warnings.warn(_left_alone(objections, asked), stacklevel=2)
    for block in fused_blocks(model).values() if memory is not None else ():
        block.memory = memory
    return model


def _is_fused(module: nn.Module, kinds: dict[type[nn.Module], type[nn.Module]]) -> bool:
    return swapped(module) is not None or any(runs_as(module, kind) for kind in kinds.values())


def _objections(asked: dict[str, nn.Module]) -> dict[str, str]:
    """Why modules of segment_anything's classes are left alone, by name."""
    from samfast.fused.proof import objection

    found = {name: _taken_name(module) or objection(module) for name, module in asked.items()}
    found = {name: reason for name, reason in found.items() if reason is not None}
    inside = {id(parts.child(asked[name], parts.ATTENTION)) for name in found}
    within = {name: _INSIDE for name, module in asked.items() if id(module) in inside}
    return found | within


def _taken_name(module: nn.Module) -> str | None:
    """An attribute of the user's that a fused module has for itself."""
    taken = [name for name in _OPTIONS if name in vars(module)]
    return f"it has an attribute {taken[0]}, which a fused module needs itself" if taken else None


def _left_alone(objections: dict[str, str], asked: dict[str, nn.Module]) -> str:
    """The nearest miss is one that a run has found out, or else the first."""
    reasons = {name: reason for name, reason in objections.items() if reason != _INSIDE}
    name, reason = min(reasons.items(), key=lambda pair: "its forward" not in pair[1])
    return (
        f"fuse leaves {len(objections)} of {len(asked)} modules as they are, because they differ "
        f"from segment_anything's; {name or type(asked[name]).__name__}: {reason}"
    )


def unfuse(model: nn.Module) -> nn.Module:
    """Undo ``fuse``, in place: segment_anything's and PEFT's classes again, the same Parameters.

    Modules that are not fused stay as they are. Raises ValueError for a model in which nothing is
    fused, and RuntimeError, before anything is changed, when the forward of a fused module was
    wrapped since, or its class changed: the wrapper holds the fused forward.
    """
    kinds = _kinds()
    stock = {fused: kind for kind, fused in kinds.items()}
    fused = {n: m for n, m in _checked(model).named_modules() if _is_fused(m, kinds)}
    if not fused:
        raise ValueError(_nothing(model, "unfuse"))
    for name, module in fused.items():
        if type(module) not in stock and not is_swapped(module):
            raise RuntimeError(
                f"{name or 'the model'} was given the class {type(module).__name__} after fuse; "
                "unfuse before that"
            )
        if "forward" in module.__dict__:
            raise RuntimeError(
                f"the forward of {name or 'the model'}, a {type(module).__name__}, was replaced "
                "after fuse; undo that before unfuse"
            )
    for module in fused.values():
        if is_swapped(module):
            swap_back(module)
            continue
        for option in _OPTIONS:
            module.__dict__.pop(option, None)
        module.__class__ = stock[type(module)]
    return model


def fused_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Every SamBlock by its full name."""
    _, fused = _block_kinds()
    return {name: m for name, m in model.named_modules() if fused and runs_as(m, fused)}


def block_states(model: nn.Module) -> dict[str, str]:
    """How every transformer block runs, by full name: segment_anything's, and any with its parts.

    "fused", or "fused in parts: …" or "not fused: …" with the reason
    """
    stock, fused = _block_kinds()
    states = {}
    for name, module in model.named_modules():
        if fused is not None and runs_as(module, fused):
            states[name] = _state(module, module.block_problem(), "in parts")
        elif stock is not None and isinstance(module, stock):
            states[name] = f"not fused: {_why_not(module, stock)}"
        elif all(parts.child(module, part) is not None for part in parts.IN_BLOCK):
            states[name] = f"not fused: {kind_of(module)}, which is not segment_anything's"
    return states


def _state(module: nn.Module, problem: str | None, otherwise: str) -> str:
    """How a fused module runs, given what stands against it."""
    from samfast.fused.proof import objection

    if problem is None:
        return "fused"
    return f"not fused: {problem}" if objection(module) else f"fused {otherwise}: {problem}"


def attention_states(model: nn.Module) -> dict[str, str]:
    """How every attention of segment_anything's runs, by full name.

    "fused", or "fused, windows cut first: …" or "not fused: …" with the reason
    """
    kinds = _kinds()
    stock, block_kind = tuple(kinds) or (None, None)
    states, blocks = {}, {}
    for block in model.modules() if kinds else ():
        if isinstance(block, block_kind):  # several may share an attention
            attention = parts.child(block, parts.ATTENTION)
            blocks.setdefault(id(attention), []).append(block)
    for name, module in model.named_modules() if kinds else ():
        if not isinstance(module, stock):
            continue
        around = blocks.get(id(module), [])
        if runs_as(module, kinds[stock]):
            states[name] = _attention_state(module, around, block_kind, kinds[block_kind])
        else:
            reason = _why_not(module, stock)
            left = [b for b in around if type(b) is block_kind and _why_not(b, block_kind) != _OWN]
            inside = left and reason == _OWN
            states[name] = f"not fused: {_INSIDE if inside else reason}"
    return states


def _attention_state(attn, around, stock: type[nn.Module], fused: type[nn.Module]) -> str:
    """Of a fused attention, by the blocks around it."""
    from samfast.fused.proof import objection

    if (problem := objection(attn)) is not None:
        return f"not fused: {problem}"
    if around and all(runs_as(b, fused) and objection(b) is not None for b in around):
        return f"not fused: {_INSIDE}"
    reasons = [_cut_first(b, stock, fused) for b in around if parts.window(b) > 0]
    reason = next((r for r in reasons if r is not None), None)
    return "fused" if reason is None else f"fused, windows cut first: {reason}"


def _cut_first(block: nn.Module, stock: type[nn.Module], fused: type[nn.Module]) -> str | None:
    """Why the windows of a block are cut before its attention, None when they are not."""
    if runs_as(block, fused):
        return block.window_order()
    return f"its block is {_why_not(block, stock)}"


def _kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """What replaces segment_anything's Attention and Block; {} while no model can have them."""
    stock = parts.loaded()
    if stock is None:
        return {}
    from samfast.fused.rel_pos_attention import RelPosAttention
    from samfast.fused.sam_block import SamBlock

    return {stock.attention: RelPosAttention, stock.block: SamBlock}


def _block_kinds() -> tuple[type[nn.Module] | None, type[nn.Module] | None]:
    """segment_anything's Block and what replaces it, None while no model can have them."""
    kinds = _kinds()
    return list(kinds.items())[1] if kinds else (None, None)


def _why_not(module: nn.Module, stock: type[nn.Module]) -> str:
    kind = type(module).__name__
    if type(module) is not stock and type(module).forward is stock.forward:
        return f"a {kind}, which a wrapper made of segment_anything's {stock.__name__}; fuse first"
    if type(module) is not stock:
        return f"a {kind}, a class derived from segment_anything's {stock.__name__}"
    if "forward" in module.__dict__:
        return f"{kind} with a forward that was replaced"
    from samfast.fused.proof import objection

    return _taken_name(module) or objection(module, ask=False) or _OWN


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
