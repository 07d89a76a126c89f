# SPDX-License-Identifier: Apache-2.0
"""Find the model inside the wrappers of other libraries.

Known wrappers are torch.compile, data parallelism, torch's AveragedModel and PEFT's PeftModel. Any
module without parameters of its own and with one child that holds a SAM also counts.
"""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from samfast.adapters.foreign import Foreign

ENCODER = "image_encoder"  # segment_anything's name
ENCODER_OF_HF = "vision_encoder"  # Hugging Face's name; models of other kinds use it too
ATTACHMENT = "samfast_attachment"
ENCODER_OF_META = "backbone.vision_backbone.trunk"  # the name in the SAM 3 authors' package
_PARTS_OF_HF = (("patch_embed", "layers", "neck"), ("backbone.layers", "neck"))  # of SAM, of SAM 3
_PARTS_OF_META = ("patch_embed", "blocks")


def encoder_name(model: nn.Module) -> str:
    """Return the model's name for SAM's image encoder; "" if it has none."""
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
    """True if the model has a module at this path."""
    part: nn.Module | None = model
    for name in path.split("."):
        part = getattr(part, "_modules", {}).get(name)
    return part is not None


def encoder_of(model: nn.Module) -> Foreign:
    """Return SAM's image encoder in the model; the model itself if it has none."""
    return model.get_submodule(encoder_name(model))


def unwrapped(model: nn.Module) -> Foreign:
    """Return the model inside its wrappers; the model itself if none is known or several fit."""
    return levels(model)[-1]


def levels(model: nn.Module) -> list[nn.Module]:
    """List the model, what it wraps, what that wraps, and so on; the last wraps nothing."""
    found = [model]
    while (leaf := _wrapped(found[-1])) is not None:
        inner: Foreign = found[-1]._modules[leaf]
        found.append(inner)
    return found


def prefix_of(model: nn.Module) -> str:
    """Return the prefix that wrappers add to names of ``unwrapped(model)``, such as "module." """
    return "".join(f"{_wrapped(level)}." for level in levels(model)[:-1])


def unclear(model: nn.Module) -> str:
    """Say why ``unwrapped`` stops at the model although a part of it holds a SAM; else "".

    The text ends a sentence about the model and says what to pass instead.
    """
    model = unwrapped(model)
    held = [] if _is_model(model) else _parts_with_sam(model)
    if not held:
        return ""
    if len(held) > 1:
        return f"; its parts {' and '.join(held)} hold a SAM each: pass one of them"
    return f"; it has parameters in addition to those of its {held[0]}: pass model.{held[0]}"


def _wrapped(model: nn.Module) -> str | None:
    """Return the name of the child that the model wraps; None if it is not a wrapper."""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return "module"
    if not isinstance(model, nn.Module):
        return None
    if "_orig_mod" in model._modules:  # torch.compile's
        return "_orig_mod"
    # FullyShardedDataParallel flattens parameters, so that no layer's names fit them.
    if _is_model(model) or "_fsdp_wrapped_module" in model._modules:
        return None
    held = _parts_with_sam(model)
    if not held:
        return None
    own: Foreign = model._modules[held[0]]
    inside = {id(parameter) for parameter in own.parameters()}
    return held[0] if all(id(p) in inside for p in model.parameters()) else None


def _is_model(model: nn.Module) -> bool:
    """True for a SAM, and for a model that ``attach`` has changed."""
    return encoder_name(model) != "" or hasattr(model, ATTACHMENT)


def _parts_with_sam(model: nn.Module) -> list[str]:
    return [n for n, child in model.named_children() if any(map(_is_model, child.modules()))]


def refuse_new_parameters(model: nn.Module) -> None:
    """Raise ValueError for a wrapper that would miss parameters added inside it."""
    for level in levels(model):
        if isinstance(level, (DistributedDataParallel, AveragedModel)):
            kind = type(level).__name__
            raise ValueError(
                f"the model is inside a {kind}, which would miss new parameters; attach "
                f"first, then make the {kind}"
            )
