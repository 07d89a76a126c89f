# SPDX-License-Identifier: Apache-2.0
"""The step of ``samfast profile --model``: built as ``samfast finetune`` does, on random data."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import samfast
from samfast.counters import counting
from samfast.methods.registry import VARIANTS
from samfast.models import build_sam, image_size
from samfast.models.sam3_folder import NAME as SAM3
from samfast.profiling.replay import BY_VALUES, torch_path
from samfast.profiling.settings import ProfileSettings
from samfast.training.build import attach_method, build_base
from samfast.training.losses import LOSSES
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.recipe import method_of, with_recipe
from samfast.training.sam3_layers import check_for_model
from samfast.training.segmenters import Segmenter
from samfast.training.settings import FinetuneSettings
from samfast.training.try_out import backend_asked_for
from samfast.training.watch import clip_gradients

MODEL = "vit_tiny"
_PRECISION = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Workload:
    """A segmenter, its optimizer and one batch of random images and masks.

    own_adapters: whether samfast attached them, so that they may add to the loss
    """

    def __init__(
        self,
        sam: nn.Module,
        training: FinetuneSettings,
        device: torch.device,
        dtype: torch.dtype,
        own_adapters: bool = True,
    ):
        assert training.lr is not None and training.loss is not None  # the recipe fills them in
        self.loss_name = training.loss
        self.own_adapters = own_adapters
        self.training, self.device, self.dtype = training, device, dtype
        self.model = Segmenter(sam, dtype).to(device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            samfast.parameter_groups(
                sam, training.lr, training.weight_decay, relation_lr=training.relation_lr
            ),
            lr=training.lr,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.batch = random_batch(training.batch_size, image_size(sam), device)

    def loss(self) -> Tensor:
        """The loss of the batch, and what the adapters add to it."""
        images, masks, sizes = self.batch
        logits, valid = self.model(images, sizes)
        loss = LOSSES[self.loss_name](logits, masks, valid)
        return loss + samfast.aux_loss(self.model.sam) if self.own_adapters else loss

    def step(self) -> None:
        """Forward, backward, clip, optimizer."""
        self.scaler.scale(self.loss()).backward()
        self.scaler.unscale_(self.optimizer)
        clip_gradients(self.parameters, self.training.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def timed(self) -> float:
        """Seconds that a step takes without a profiler."""
        began = time.perf_counter()
        self.step()
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def random_batch(count: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """images, masks, sizes; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    masks = torch.rand(count, side, side, generator=generator) < 0.3
    sizes = torch.full((count, 2), side)
    return images.to(device), masks.to(device), sizes.to(device)


def training_settings(settings: ProfileSettings, fuse: bool = True) -> FinetuneSettings:
    """What ``samfast finetune`` would be told; ValueError for what it cannot build."""
    if VARIANTS[settings.method].needs_tasks:
        raise ValueError(
            f"method {settings.method} is for several tasks, which samfast profile cannot build; "
            "profile your training program with --script"
        )
    training = with_recipe(
        FinetuneSettings(
            model=settings.model or MODEL,
            method=settings.method,
            image_size=settings.image_size,
            checkpoint=settings.checkpoint,
            random_init=settings.checkpoint is None,
            batch_size=settings.batch,
            precision=_PRECISION[settings.dtype],
            memory=settings.memory if fuse else None,
            fuse=fuse,
            backend=settings.backend,
        )
    )
    check_for_model(training)
    return training


def device_of(settings: ProfileSettings) -> torch.device:
    """The device that the settings mean; ValueError where it is not there."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU; use --device cpu")
    return torch.device(settings.device)


def dtype_of(settings: ProfileSettings, device: torch.device) -> torch.dtype:
    """The dtype of products; ValueError for float16 without a GPU."""
    if settings.dtype == "float16" and device.type != "cuda":
        raise ValueError(f"dtype float16 needs a GPU, but the device is {device.type}")
    return autocast_dtype(_PRECISION[settings.dtype], device)


def build(settings: ProfileSettings, fuse: bool = True) -> Workload:
    """The model with its method, on its device."""
    training = training_settings(settings, fuse)
    device = device_of(settings)
    dtype = dtype_of(settings, device)
    sam = build_base(training)
    torch.manual_seed(0)
    attach_method(sam, training, base_dtype(training.base_dtype, dtype, device))
    return Workload(sam, training, device, dtype)


@contextmanager
def backend_of(settings: ProfileSettings) -> Iterator[None]:
    """Everything inside runs on the backend asked for; ValueError where it cannot."""
    training = training_settings(settings)
    device = device_of(settings)
    method, dtype = method_of(training), dtype_of(settings, device)
    with backend_asked_for(settings.backend, method, True, device, dtype):
        yield


def model_flop(settings: ProfileSettings) -> int:
    """FLOP of forward and backward of the model that is not fused, which computes nothing twice.

    Counted on tensors without memory, so without Conv-LoRA's experts, whose choice needs values.
    """
    device = device_of(settings)
    training = training_settings(dataclasses.replace(settings, backend="torch"), fuse=False)
    own = training.model == SAM3 and training.checkpoint is not None  # reads its configuration
    sam = build_sam(
        training.model,
        checkpoint=training.checkpoint if own else None,
        image_size=training.image_size,
        random_init=not own,
        device="meta",
    )
    assert training.loss is not None  # the recipe fills it in
    count, side = settings.batch, image_size(sam)
    with torch_path(), FakeTensorMode():
        for module in sam.modules():
            _stand_in(module._parameters, device)
            _stand_in(module._buffers, device)
        attach_method(sam, training)
        model = Segmenter(sam).train()
        images = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
        masks = torch.zeros(count, side, side, dtype=torch.bool, device=device)
        sizes = torch.zeros(count, 2, dtype=torch.int64, device=device)
        with counting(BY_VALUES) as counts:
            logits, valid = model(images, sizes)
            loss = LOSSES[training.loss](logits, masks, valid) + samfast.aux_loss(sam)
            loss.backward()
    return counts.flops


def _stand_in(own: dict[str, Any], device: torch.device) -> None:
    """Put tensors that say they are on ``device`` in place of those on meta."""
    for name, t in own.items():
        if t is not None:
            made = torch.empty(t.shape, dtype=t.dtype, device=device)
            own[name] = nn.Parameter(made) if isinstance(t, nn.Parameter) else made
