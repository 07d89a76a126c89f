# SPDX-License-Identifier: Apache-2.0
"""From settings to a model that can be trained: base model, adapters, fused blocks."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

import samfast
from samfast.methods.attach import find_layers
from samfast.models import TRAINED_DECODER, MultiTaskSam, Task, binary_head, build_sam, sam3
from samfast.models.sam3 import is_tracker
from samfast.training.recipe import method_of
from samfast.training.settings import MEMORY, FinetuneSettings

if TYPE_CHECKING:
    from samfast.kernels.sam_block.plan import Memory


def build_base(settings: FinetuneSettings, tasks: Sequence[Task] | None = None) -> nn.Module:
    """Build the SAM of the settings on the CPU; a MultiTaskSam for several tasks."""
    sam = build_sam(
        settings.model,
        checkpoint=settings.checkpoint,
        image_size=settings.image_size,
        random_init=settings.random_init,
        seed=settings.seed,
    )
    return for_tasks(sam, tasks)


def for_tasks(sam: nn.Module, tasks: Sequence[Task] | None) -> nn.Module:
    """Return a MultiTaskSam for tasks, or the sam itself without tasks."""
    return sam if tasks is None else MultiTaskSam(sam, tasks)


def attach_method(
    sam: nn.Module, settings: FinetuneSettings, base_dtype: torch.dtype | None = None
) -> nn.Module:
    """Freeze the model, add the settings' adapters, leave the mask decoder to be trained; fuse."""
    method = method_of(settings, getattr(sam, "tasks", None))
    train: tuple[str, ...] = TRAINED_DECODER
    if isinstance(sam, MultiTaskSam):
        train = sam.trained_parts()
    elif is_tracker(sam):
        train = sam3.TRAINED_DECODER
    elif method.binary_head:
        binary_head(sam)
    method.check_options(partial(find_layers, sam))
    samfast.attach(sam, method, train=train, base_dtype=base_dtype)
    memory = cast("Memory", settings.memory or MEMORY[0])
    return samfast.fuse(sam, memory=memory) if settings.fuse else sam
