# SPDX-License-Identifier: Apache-2.0
"""Find the SAM that ``segment`` reads, and the parameters that it never reads."""

import re

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from samfast.adapters.foreign import Foreign
from samfast.adapters.wrappers import encoder_name, levels, unclear, unwrapped
from samfast.models.hugging_face import HuggingFaceSam, is_hugging_face
from samfast.models.sam3 import TrackerSam, is_tracker, unread_maps

# PEFT's modules_to_save puts a copy next to the original module.
_COPIES = re.compile(r"(?<=\.)(original_module|modules_to_save\.[^.]+)\.")
SAM_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


def unused_by_segment(sam: nn.Module) -> list[str]:
    """Return names of sam's parameters that segment never reads; training leaves them alone.

    They predict mask quality and the three masks of an ambiguous prompt, or embed mask prompts.
    """
    more = unread_maps(sam) if is_tracker(sam) else ()
    names = {name: _COPIES.sub("", name) for name, _ in sam.named_parameters()}
    return [name for name, own in names.items() if _never_read(own) or own.startswith(tuple(more))]


def _never_read(name: str) -> bool:
    return (
        "mask_decoder.iou_prediction_head." in name
        or "mask_decoder.pred_obj_score_head." in name  # of SAM 3
        or "prompt_encoder.mask_downscaling." in name
        or "prompt_encoder.mask_embed." in name  # Hugging Face's name of it
        or (
            "mask_decoder.output_hypernetworks_mlps." in name
            and "mask_decoder.output_hypernetworks_mlps.0." not in name
        )
    )


def sam_within(model: nn.Module, parts: tuple[str, ...] = SAM_PARTS) -> Foreign:
    """Return the SAM inside a wrapper, or the model itself.

    Hugging Face's models get segment_anything's names for their parts. Raises TypeError if a part
    is missing. Raises RuntimeError if DistributedDataParallel would not average the gradients.
    """
    sam: Foreign = model if encoder_name(model) else _looked_for(model)
    if is_hugging_face(sam):
        return HuggingFaceSam(sam)
    if is_tracker(sam):
        return TrackerSam(sam)
    absent = [part for part in (*parts, "pixel_mean") if not hasattr(sam, part)]
    if not absent:
        return sam
    sentence = f"expected a Sam of segment_anything, got {type(sam).__name__}"
    if reason := unclear(model) if isinstance(model, nn.Module) else "":
        raise TypeError(sentence + reason)
    if hasattr(sam, "mask_decoders"):
        raise TypeError(f"{sentence}; call it with the images instead")
    if hasattr(sam, "vision_encoder"):
        raise TypeError(
            f"{sentence}; of Hugging Face's models it may be SamModel, SamHQModel or "
            "Sam3TrackerModel"
        )
    raise TypeError(f"{sentence}, which has no {absent[0]}")


def _looked_for(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        return model
    for level in levels(model):
        if not isinstance(level, DistributedDataParallel) or not torch.is_grad_enabled():
            continue
        if any(p.requires_grad for p in level.parameters()):
            raise RuntimeError(
                "segment bypasses DistributedDataParallel's forward, so gradients would not be "
                "averaged; call segment in the forward of a module and wrap that module"
            )
    return unwrapped(model)


def unread_by_segment(sam: nn.Module) -> list[str]:
    """Return names of trained parameters that segment never reads."""
    unused = set(unused_by_segment(sam))
    return [name for name, p in sam.named_parameters() if p.requires_grad and name in unused]


def check_all_read(sam: nn.Module) -> None:
    """Raise RuntimeError for trained parameters that segment never reads.

    It does so in the forward of DistributedDataParallel, which waits for every gradient.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    parallel = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if parallel is None or parallel.find_unused_parameters or parallel.static_graph:
        return
    unread = unread_by_segment(sam)
    if not unread:
        return
    ignored = set(parallel.parameters_to_ignore)
    waited = {id(p) for name, p in parallel.module.named_parameters() if name not in ignored}
    parameters = dict(sam.named_parameters())
    unread = [name for name in unread if id(parameters[name]) in waited]
    if unread:
        raise RuntimeError(
            f"DistributedDataParallel waits for the gradients of {len(unread)} parameters that "
            f"segment does not read ({', '.join(modules_of(unread))}); attach with "
            "train=samfast.models.TRAINED_DECODER, or wrap with find_unused_parameters=True"
        )


def modules_of(names: list[str], limit: int = 3) -> list[str]:
    """Name a few of the modules that hold these parameters; count an MLP as one module."""
    found = list(dict.fromkeys(_module_of(name) for name in names))
    return found[:limit] + ([f"{len(found) - limit} more"] if len(found) > limit else [])


def _module_of(name: str) -> str:
    head, networks, tail = name.partition(".output_hypernetworks_mlps.")
    if networks:
        return head + networks + tail.partition(".")[0]
    module = ".".join(name.split(".")[:-1]).partition(".layers.")[0]
    return module.removesuffix(".proj_in").removesuffix(".proj_out")
