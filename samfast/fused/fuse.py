# SPDX-License-Identifier: Apache-2.0
"""Fuse the blocks and attention of a model in place, and undo it."""

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
_ATTENTIONS = {"attn", "attention"}  # names of a block's attention in the libraries


def fuse(model: Model, memory: Memory | None = None) -> Model:
    """Fuse SAM's blocks and other libraries' adapters in ``model``, in place; return the model.

    It knows the blocks of segment_anything and its copies under other names. It also knows those of
    transformers' SamModel, SamHQModel and SAM 3, the package sam3, and timm's samvit models.
    segment_anything's Attention and Block become RelPosAttention and SamBlock; other classes become
    subclasses of their own. Module objects, Parameters, submodules, hooks and the state dict stay
    the same, so adapters, optimizers and files notice nothing. Call it before or after ``attach``.

    A class is proved before it is trusted, on a CPU, in about a second for ViT-H. Runs with random
    weights must give the result and gradients of a SAM block, with the same children. The forward
    of segment_anything's class or a copy may use only its module, torch and numbers. All methods of
    a transformers or timm class must be that library's. A block that fails stays as it is, with its
    attention; a warning and ``report`` say why. A class that was patched, or got another part, is
    checked again at every forward. The proof runs what a library's forward calls outside its
    classes, such as transformers' attention functions, but does not check it again.

    Modules of derived classes, or with a forward of their own, stay as they are too; the attention
    of a derived block is fused. A transformers or timm block with a part that a fused block leaves
    out (dropout in training, layer scale) runs its own forward. Hooks that torch registers for all
    modules see a fused block as one module.

    PEFT's ``lora.Linear`` becomes a subclass of itself anywhere in the model, which may be a
    PeftModel. So do ``_LoRA_qkv`` of SAMed and Sam_LoRA, and micro-sam's ``AttentionLoRA``,
    ``MLPLoRA`` and ``AdaptFormer``. So do AutoGluon's ``ConvLoRALinear`` and the layers of
    SAM-COBOT and MTSAM. Parameters, files and their owner's calls stay as they are. A layer that
    PEFT's ``add_adapter`` makes later needs ``fuse`` again. See ``samfast.integrations``.

    memory: what every block saves for its backward, see SamBlock. "fast" saves all that is costly
        to compute, "balanced" recomputes two of four layers, "minimal" the whole block. Gradients
        are the same. None means "fast" and keeps the mode of blocks that are fused already; a name
        changes their mode too.

    Raises ValueError if there is nothing to fuse, or if memory is not one of the three.

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
    """True for a block or attention whose class has a fused class."""
    if "forward" in vars(module) or not (is_block(module) or is_attention(module)):
        return False
    return fused_class(type(module)) is not None


def _objections(asked: dict[str, nn.Module]) -> dict[str, str]:
    """Map names of modules of a library's classes to why they are left alone."""
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
    """Name a user's attribute that a fused module needs itself."""
    taken = [name for name in _OPTIONS if name in vars(module)]
    return f"it has an attribute {taken[0]}, which a fused module needs itself" if taken else None


def _left_alone(objections: dict[str, str], asked: dict[str, nn.Module]) -> str:
    """Warn of the modules left alone, with a reason that a run found, or else the first."""
    reasons = {name: reason for name, reason in objections.items() if reason != _INSIDE}
    name, reason = min(reasons.items(), key=lambda pair: "its forward" not in pair[1])
    return (
        f"fuse leaves {len(objections)} of {len(asked)} modules as they are, because they differ "
        f"from segment_anything's; {name or type(asked[name]).__name__}: {reason}"
    )


def unfuse(model: Model) -> Model:
    """Undo ``fuse``, in place: restore the stock classes and keep the Parameters.

    Modules that are not fused stay as they are. Raises ValueError if nothing is fused. Raises
    RuntimeError, before anything changes, if a fused module's forward was wrapped since or its
    class changed, because the wrapper holds the fused forward.
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
    """Map full names to the fused blocks."""
    modules: Iterable[tuple[str, Foreign]] = model.named_modules()
    return {name: m for name, m in modules if is_fused_block(m)}


def block_states(model: nn.Module) -> dict[str, str]:
    """Say how every transformer block runs, by full name, also blocks that fuse does not know.

    Values are "fused", or "fused in parts: …" or "not fused: …" with the reason.
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
    """Say how a fused block runs."""
    problem = block.block_problem()
    if problem is None:
        return "fused"
    in_parts = isinstance(block, BlockInParts) and objection(block) is None
    return f"fused in parts: {problem}" if in_parts else f"not fused: {problem}"


def attention_states(model: nn.Module) -> dict[str, str]:
    """Say how the attention of every block that fuse knows runs, by full name.

    Values are "fused", or "fused, windows cut first: …" or "not fused: …" with the reason.
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
    """Say how an attention runs; around: the blocks that have it."""
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
    """Say why a block's windows are cut before its attention; None if they are not."""
    if is_fused_block(block):
        return block.window_order()
    return f"its block is {_why_not(block)}"


def _own(family: Family) -> str:
    return f"still {whose(family.package)} own"


def _why_not(module: nn.Module) -> str:
    """Say why a block or an attention is not fused."""
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
