# SPDX-License-Identifier: Apache-2.0
"""Fused blocks and attention in a model and out again, in place."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from samfast.adapters.foreign import Foreign, Model
from samfast.adapters.stand_in import bare, kind_of, whose
from samfast.fused.block import BlockInParts, FusedBlock
from samfast.fused.classes import (
    fused_class,
    is_fused,
    is_fused_attention,
    is_fused_block,
    stock_class,
)
from samfast.fused.families import family_of, is_attention, is_block
from samfast.fused.parts import KEPT, Family
from samfast.fused.proof import objection
from samfast.integrations.libraries import fusable
from samfast.integrations.swap import swap
from samfast.kernels.sam_block.plan import Memory, check_memory

_OPTIONS = ("backend", "left_alone", "memory", KEPT)  # attributes of fused modules
_INSIDE = "its block is left alone"
_BY_BLOCK = "its block runs its own forward"
_ATTENTIONS = {"attn", "attention"}  # what libraries call the attention of a block


def fuse(model: Model, memory: Memory | None = None) -> Model:
    """Let SAM's blocks and others' adapters in ``model`` run fused, in place; returns the model.

    Known are the blocks of segment_anything, of copies of it under other names, of transformers'
    SamModel, SamHQModel and SAM 3, of the package sam3, and of timm's samvit models.
    segment_anything's Attention and Block
    become RelPosAttention and SamBlock, other classes ones derived from them: the same module
    objects with the same Parameters, submodules, hooks and state dict, so adapters, optimizers
    and files know no difference. Before or after ``attach``.

    A class is proved before it is trusted, on a CPU, in about a second for ViT-H: runs with weights
    of its own give the result and gradients of a SAM block, and its children are the same. The
    forward of segment_anything's and copies' classes reaches nothing but its module, torch and
    numbers; all methods of a transformers or timm class are that library's. A block that fails
    stays as it is, its attention too; a warning says why, and ``report``. The question is asked
    again, at every forward, once a class was patched or got another part.
    What a library's forward calls outside its classes, such as transformers' attention functions,
    is run in that proof, but not asked about again.
    Modules of classes derived from these, or with a forward of their own, stay as they are as
    well; the attention of a derived block is fused. A transformers or timm block with something
    that a fused block leaves out (dropout in training, layer scale) runs its own forward. Hooks
    that torch registers for all modules see a fused block as one module.

    PEFT's ``lora.Linear`` becomes a class derived from it, in a block or anywhere else in the
    model, which may be a PeftModel. So do ``_LoRA_qkv`` as SAMed and Sam_LoRA have it, and
    micro-sam's ``AttentionLoRA``, ``MLPLoRA`` and ``AdaptFormer``. Parameters, files and their
    owner's calls stay as they are. A layer that PEFT's ``add_adapter`` makes later needs ``fuse``
    again. See ``samfast.integrations``.

    memory: what every block saves for its backward, see SamBlock: "fast" saves all that is dear
        to compute, "balanced" computes two of four layers again, "minimal" the whole block. The
        gradients are the same. None means "fast", and leaves blocks that are fused already as
        they are; another mode is theirs too, so fusing twice changes the mode or nothing.

    Raises ValueError when there is nothing to fuse, or memory is none of the three.

    >>> import samfast
    >>> from samfast.models import build_sam
    >>> sam = samfast.fuse(build_sam("vit_tiny"), memory="balanced")
    >>> set(samfast.report(sam).blocks.values())
    {'fused'}
    """
    if memory is not None:
        check_memory(memory)
    modules = dict(_checked(model).named_modules())
    asked = {name: m for name, m in modules.items() if _to_fuse(m)}
    layers = {n: kind for n, m in modules.items() if (kind := fusable(m)) is not None}
    if not asked and not layers and not any(is_fused(m) for m in modules.values()):
        raise ValueError(_nothing(model, "fuse"))
    for name, mixin in layers.items():
        swap(modules[name], mixin)
    objections = _objections(asked)
    for name, module in asked.items():
        if name not in objections:
            fused: Any = fused_class(type(module))
            module.__class__ = fused
    if objections:
        warnings.warn(_left_alone(objections, asked), stacklevel=2)
    if memory is not None:
        for block in fused_blocks(model).values():
            block.memory = memory
    return model


def _to_fuse(module: nn.Module) -> bool:
    """Whether it is a block or an attention of a class that there is a fused one for."""
    if "forward" in vars(module) or not (is_block(module) or is_attention(module)):
        return False
    return fused_class(type(module)) is not None


def _objections(asked: dict[str, nn.Module]) -> dict[str, str]:
    """Why modules of a library's classes are left alone, by name."""
    every = {name: _taken_name(module) or objection(module) for name, module in asked.items()}
    found = {name: reason for name, reason in every.items() if reason is not None}
    inside = {id(_attention_in(asked[name])) for name in found if is_block(asked[name])}
    within = {name: _INSIDE for name, module in asked.items() if id(module) in inside}
    return found | within


def _attention_in(block: nn.Module) -> nn.Module | None:
    family = family_of(type(block))
    assert family is not None, type(block)
    return block._modules.get(family.parts.IN_BLOCK[1])


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


def unfuse(model: Model) -> Model:
    """Undo ``fuse``, in place: segment_anything's and PEFT's classes again, the same Parameters.

    Modules that are not fused stay as they are. Raises ValueError for a model in which nothing is
    fused, and RuntimeError, before anything is changed, when the forward of a fused module was
    wrapped since, or its class changed: the wrapper holds the fused forward.
    """
    fused = {n: m for n, m in _checked(model).named_modules() if is_fused(m)}
    if not fused:
        raise ValueError(_nothing(model, "unfuse"))
    for name, module in fused.items():
        if stock_class(type(module)) is None:
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
        if is_fused_block(module) or is_fused_attention(module):
            for option in _OPTIONS:
                module.__dict__.pop(option, None)
        stock: Any = stock_class(type(module))
        module.__class__ = stock
    return model


def fused_blocks(model: nn.Module) -> dict[str, FusedBlock]:
    """Every fused block by its full name."""
    modules: Iterable[tuple[str, Foreign]] = model.named_modules()
    return {name: m for name, m in modules if is_fused_block(m)}


def block_states(model: nn.Module) -> dict[str, str]:
    """How every transformer block runs, by full name: those that fuse knows, and any alike.

    "fused", or "fused in parts: …" or "not fused: …" with the reason
    """
    states = {}
    for name, module in model.named_modules():
        if is_fused_block(module):
            states[name] = _state(module)
        elif is_block(module):
            states[name] = f"not fused: {_why_not(module)}"
        elif "mlp" in module._modules and not _ATTENTIONS.isdisjoint(module._modules):
            states[name] = f"not fused: {kind_of(module)}, which fuse does not know"
    return states


def _state(block: Foreign) -> str:
    """How a fused block runs."""
    problem = block.block_problem()
    if problem is None:
        return "fused"
    in_parts = isinstance(block, BlockInParts) and objection(block) is None
    return f"fused in parts: {problem}" if in_parts else f"not fused: {problem}"


def attention_states(model: nn.Module) -> dict[str, str]:
    """How the attention of every block that fuse knows runs, by full name.

    "fused", or "fused, windows cut first: …" or "not fused: …" with the reason
    """
    blocks: dict[int, list[nn.Module]] = {}
    for block in model.modules():
        if is_block(block):  # several may share an attention
            blocks.setdefault(id(_attention_in(block)), []).append(block)
    states = {}
    for name, module in model.named_modules():
        if is_attention(module):
            states[name] = _attention_state(module, blocks.get(id(module), []))
    return states


def _attention_state(attn: nn.Module, around: list[Foreign]) -> str:
    """How an attention runs; around: the blocks that have it."""
    family = family_of(type(attn))
    assert family is not None, type(attn)
    if family.published:
        fused = [is_fused_block(block) and block.block_problem() is None for block in around]
        return "fused" if fused and all(fused) else f"not fused: {_BY_BLOCK}"
    if not is_fused_attention(attn):
        reason = _why_not(attn)
        left = [b for b in around if type(b) is family.block and _why_not(b) != _own(family)]
        return f"not fused: {_INSIDE if left and reason == _own(family) else reason}"
    if (problem := objection(attn)) is not None:
        return f"not fused: {problem}"
    if around and all(is_fused_block(b) and objection(b) is not None for b in around):
        return f"not fused: {_INSIDE}"
    reasons = [_cut_first(b) for b in around if family.parts.window(b) > 0]
    first = next((r for r in reasons if r is not None), None)
    return "fused" if first is None else f"fused, windows cut first: {first}"


def _cut_first(block: Foreign) -> str | None:
    """Why the windows of a block are cut before its attention, None when they are not."""
    if is_fused_block(block):
        return block.window_order()
    return f"its block is {_why_not(block)}"


def _own(family: Family) -> str:
    return f"still {whose(family.package)} own"


def _why_not(module: nn.Module) -> str:
    """Why a block or an attention is not fused."""
    family, kind = family_of(type(module)), type(module).__name__
    assert family is not None, type(module)
    stock = family.block if isinstance(module, family.block) else family.attention
    original = f"{whose(family.package)} {stock.__name__}"
    if type(module) is not stock and bare(type(module).forward) is bare(stock.forward):
        return f"a {kind}, which a wrapper made of {original}; fuse first"
    if type(module) is not stock:
        return f"a {kind}, a class derived from {original}"
    if "forward" in module.__dict__:
        return f"{kind} with a forward that was replaced"
    return _taken_name(module) or objection(module, ask=False) or _own(family)


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, not a torch.nn.Module")
    return model


def _nothing(model: nn.Module, action: str) -> str:
    kind = type(model).__name__
    for name, state in attention_states(model).items():
        if _BY_BLOCK not in state:
            return f"this {kind} has nothing to {action}; {name or 'it'} is {state}"
    sentence = f"this {kind} has no block or attention that fuse knows"
    for name, state in block_states(model).items():
        return f"{sentence}; {name or 'it'} is {state}"
    return sentence
