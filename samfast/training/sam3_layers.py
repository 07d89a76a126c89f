# SPDX-License-Identifier: Apache-2.0
"""What fine-tuning's options mean for SAM 3, whose q, k and v are layers of their own."""

import dataclasses

from samfast.adapters.method import Method
from samfast.models.sam3_folder import NAME as SAM3
from samfast.training.chosen_tasks import has_tasks, masks_of
from samfast.training.settings import FinetuneSettings

METHODS = ("lora", "conv-lora", "kronecker", "decoder")
_SLICES = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
_LAYERS = {"qkv": (*_SLICES.values(),), "proj": ("o_proj",), "lin1": ("fc1",), "lin2": ("fc2",)}


def check_for_model(settings: FinetuneSettings) -> None:
    """Raise ValueError for what SAM 3 cannot be trained with."""
    if settings.model != SAM3:
        return
    if settings.method not in METHODS:
        raise ValueError(
            f"method {settings.method} needs segment_anything's layers; for {SAM3} use one of "
            f"{', '.join(METHODS)}"
        )
    if has_tasks(settings) or masks_of(settings) == "instances":
        given = "--tasks" if settings.tasks is not None else f"--masks {masks_of(settings)}"
        raise ValueError(f"{SAM3} learns one mask per image; leave out {given}, or use vit_b")


def for_sam3(method: Method) -> Method:
    """The method by SAM 3's names of layers; slices of qkv are the layers q, k and v."""
    if "target" not in {field.name for field in dataclasses.fields(method)}:
        return method  # which adapts no layer
    target = method.target
    if (slices := getattr(method, "slices", None)) is not None:
        names = tuple(_SLICES[name] for name in slices)
        return dataclasses.replace(method, slices=None, target=names)
    given = (target,) if isinstance(target, str) else target
    names = tuple(new for name in given for new in _LAYERS.get(name, (name,)))
    return dataclasses.replace(method, target=names)
