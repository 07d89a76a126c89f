# SPDX-License-Identifier: Apache-2.0
"""The model inside what other libraries put around it.

Looked through are torch.compile, data parallelism, torch's AveragedModel, PEFT's PeftModel, and any
module (Lightning's, a user's own) with one child that holds a SAM and no parameters of its own.
"""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from samfast.adapters.foreign import Foreign

ENCODER = "image_encoder"  # segment_anything's name
ENCODER_OF_HF = "vision_encoder"  # Hugging Face's, which models of other kinds use as well
ATTACHMENT = "samfast_attachment"
ENCODER_OF_META = "backbone.vision_backbone.trunk"  # SAM 3's in its authors' package
_PARTS_OF_HF = (("patch_embed", "layers", "neck"), ("backbone.layers", "neck"))  # of SAM, of SAM 3
_PARTS_OF_META = ("patch_embed", "blocks")


def encoder_name(model: nn.Module) -> str:
    """What the model calls its image encoder of SAM; "" where it has none."""
    parts = model._modules if isinstance(model, nn.Module) else {}
    if isinstance(parts.get(ENCODER), nn.Module):
        return ENCODER
    encoder = parts.get(ENCODER_OF_HF)
    if encoder is not None and any(all(_has(encoder, p) for p in of) for of in _PARTS_OF_HF):
        return ENCODER_OF_HF
    known = "backbone" in parts and all(
        _has(model, f"{ENCODER_OF_META}.{p}") for p in _PARTS_OF_META
    )
    return ENCODER_OF_META if known else ""


def _has(model: nn.Module, path: str) -> bool:
    """Whether the model has a module at the end of this path."""
    part: nn.Module | None = model
    for name in path.split("."):
        part = getattr(part, "_modules", {}).get(name)
    return part is not None


def encoder_of(model: nn.Module) -> Foreign:
    """The image encoder of SAM in the model; the model itself where there is none."""
    return model.get_submodule(encoder_name(model))


def unwrapped(model: nn.Module) -> Foreign:
    """The model inside its wrappers; the model itself where none is known or it is not clear."""
    return levels(model)[-1]


def levels(model: nn.Module) -> list[nn.Module]:
    """The model, what it wraps, what that wraps, …; the last one wraps nothing."""
    found = [model]
    while (leaf := _wrapped(found[-1])) is not None:
        inner: Foreign = found[-1]._modules[leaf]
        found.append(inner)
    return found


def prefix_of(model: nn.Module) -> str:
    """What names of the model have before those of ``unwrapped(model)``, such as "module." """
    return "".join(f"{_wrapped(level)}." for level in levels(model)[:-1])


def unclear(model: nn.Module) -> str:
    """Why ``unwrapped`` stops at the model although a part of it holds a SAM; "" otherwise.

    The end of a sentence about the model, with what to pass instead.
    """
    model = unwrapped(model)
    held = [] if _is_model(model) else _parts_with_sam(model)
    if not held:
        return ""
    if len(held) > 1:
        return f"; its parts {' and '.join(held)} hold a SAM each: pass one of them"
    return f"; it has parameters in addition to those of its {held[0]}: pass model.{held[0]}"


def _wrapped(model: nn.Module) -> str | None:
    """The name of the child that the model wraps, None for a model that is not a wrapper."""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return "module"
    if not isinstance(model, nn.Module):
        return None
    if "_orig_mod" in model._modules:  # torch.compile's
        return "_orig_mod"
    # FullyShardedDataParallel's parameters are flat pieces, which no layer's names belong to.
    if _is_model(model) or "_fsdp_wrapped_module" in model._modules:
        return None
    held = _parts_with_sam(model)
    if not held:
        return None
    own: Foreign = model._modules[held[0]]
    inside = {id(parameter) for parameter in own.parameters()}
    return held[0] if all(id(p) in inside for p in model.parameters()) else None


def _is_model(model: nn.Module) -> bool:
    """Whether it is what attach and segment work on: a SAM, or a model that was attached to."""
    return encoder_name(model) != "" or hasattr(model, ATTACHMENT)


def _parts_with_sam(model: nn.Module) -> list[str]:
    return [n for n, child in model.named_children() if any(map(_is_model, child.modules()))]


def refuse_new_parameters(model: nn.Module) -> None:
    """Raise ValueError for a wrapper that would not know of parameters that are added inside it."""
    for level in levels(model):
        if isinstance(level, (DistributedDataParallel, AveragedModel)):
            kind = type(level).__name__
            raise ValueError(
                f"the model is inside a {kind}, which would leave new parameters out; attach "
                f"first, then make the {kind}"
            )
