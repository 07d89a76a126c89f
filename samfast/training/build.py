# SPDX-License-Identifier: Apache-2.0
"""From settings to a model that can be trained: base model, adapters, fused blocks."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

import samfast
from samfast.models import TRAINED_DECODER, MultiTaskSam, Task, binary_head, build_sam
from samfast.modules.attach import find_layers
from samfast.modules.methods import Kronecker
from samfast.training.recipe import method_of
from samfast.training.settings import MEMORY, FinetuneSettings


def build_base(settings: FinetuneSettings, tasks: Sequence[Task] | None = None) -> nn.Module:
    """The SAM the settings name, on the CPU; of several tasks a MultiTaskSam."""
    sam = build_sam(
        settings.model,
        checkpoint=settings.checkpoint,
        image_size=settings.image_size,
        random_init=settings.random_init,
        seed=settings.seed,
    )
    return for_tasks(sam, tasks)


def for_tasks(sam: nn.Module, tasks: Sequence[Task] | None) -> nn.Module:
    """The sam itself where no tasks are named."""
    return sam if tasks is None else MultiTaskSam(sam, tasks)


def attach_method(
    sam: nn.Module, settings: FinetuneSettings, base_dtype: torch.dtype | None = None
) -> nn.Module:
    """Freeze the model, add the settings' adapters, leave the mask decoder to be trained; fuse."""
    method = method_of(settings, getattr(sam, "tasks", None))
    train = TRAINED_DECODER
    if isinstance(sam, MultiTaskSam):
        train = sam.trained_parts()
    elif settings.method == "conv-lora":
        binary_head(sam)
    if isinstance(method, Kronecker):
        _check_kron_n(sam, method)
    samfast.attach(sam, method, train=train, base_dtype=base_dtype)
    return samfast.fuse(sam, memory=settings.memory or MEMORY[0]) if settings.fuse else sam


def _check_kron_n(sam: nn.Module, method: Kronecker) -> None:
    """Raise ValueError, by the option's name, for a layer that has no n · n equal parts."""
    for name, layer in find_layers(sam, dataclasses.replace(method, n=1)).items():
        for size, what in ((layer.in_features, "inputs"), (layer.out_features, "outputs")):
            if size % method.n:
                raise ValueError(
                    f"kron_n is {method.n}, which does not divide the {size} {what} of {name}"
                )
