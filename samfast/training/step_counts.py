# SPDX-License-Identifier: Apache-2.0
"""One training step on tensors without memory: what it keeps, needs at its worst, and computes.

Used by ``samfast.training.dry_run``, which says what is counted and what is not.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import samfast
from samfast import backends
from samfast.counters import Counts, Living, counting, saved_bytes
from samfast.kernels.relpos_attention import flops as attention_flops
from samfast.kernels.relpos_attention import torch_path
from samfast.kernels.window_attention import flops as plain_flops
from samfast.models import MultiTaskSam, build_sam, encode, image_size, pixel_mean
from samfast.models.prompted import FirstPrompts
from samfast.models.sam3_folder import NAME as SAM3
from samfast.training.build import attach_method, for_tasks
from samfast.training.chosen_tasks import has_prompted_objects, specs_of
from samfast.training.data import Batch, padded_images, valid_region
from samfast.training.embeddings import KeptEmbeddings, keeps_training_images
from samfast.training.gpu_autocast import GpuAutocast, enter_in_decoders
from samfast.training.losses import chosen_loss
from samfast.training.many_tasks import tasks_loss
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.prompted_data import ObjectBatch
from samfast.training.prompted_objects import objects_loss
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.segmenters import SamSegmenter, Segmenter, TaskSegmenter
from samfast.training.settings import FinetuneSettings
from samfast.training.task_data import TaskBatch
from samfast.training.tasks import TaskSpec

_OTHERS = (  # whose path in torch reads values, and is small
    "samfast::conv_experts_forward",
    "samfast::conv_experts_backward",
    "samfast::task_core_product_forward",
    "samfast::task_core_product_backward",
)
KERNELS = (*attention_flops.OPERATORS, *plain_flops.OPERATORS, *_OTHERS)


@contextlib.contextmanager
def counted_step(settings: FinetuneSettings, device: torch.device) -> Iterator["CountedStep[Any]"]:
    """A step of these settings, which have their recipe, on fake tensors of the device.

    A GPU that is not here is stood for by a CPU that computes in its dtypes, autocast's too.
    """
    absent = device.type == "cuda" and not torch.cuda.is_available()
    here = torch.device("cpu") if absent else device
    dtype = autocast_dtype(settings.precision, device)
    base = base_dtype(settings.base_dtype, dtype, device)
    specs = specs_of(settings)
    tasks = None if specs is None else [spec.task for spec in specs]
    closed = closed_operators(settings.backend, device)
    sam = build_sam(
        settings.model,
        checkpoint=settings.checkpoint if settings.model == SAM3 else None,
        image_size=settings.image_size,
        random_init=settings.model != SAM3 or settings.checkpoint is None,
        device="meta",
    )
    sam = for_tasks(sam, tasks)  # copies of fake tensors would be of another mode
    autocast = GpuAutocast() if absent else contextlib.nullcontext()
    with _counted_path(settings.backend, absent), FakeTensorMode(), autocast:
        _stand_for(sam, here)
        # Either 16-bit dtype stands for the other; a cast to float16 would look at values.
        half = {torch.float16: torch.bfloat16}
        attach_method(sam, settings, None if base is None else half.get(base, base))
        if absent:
            enter_in_decoders(sam)
        how = sam, half.get(dtype, dtype), settings.decoder_chunk
        step: CountedStep[Any]
        if has_prompted_objects(settings):
            step = ObjectStep(PromptedSegmenter(*how).train(), settings, here)
        elif specs is None:
            step = MaskStep(Segmenter(*how).train(), settings, here)
        else:
            step = TaskStep(TaskSegmenter(*how).train(), settings, here, specs)
        step.closed = closed
        step.reads_ahead = device.type == "cpu"
        yield step


def closed_operators(backend: str, device: torch.device) -> Sequence[str]:
    """Operators that make nothing but their results on the device.

    On torch's path attention is not one of them. A GPU that is not here is taken to run Triton.
    """
    named = backends.requested(backend)
    if named == "auto" and device.type == "cpu":
        on_torch = backends.native_missing() is not None
    elif named == "auto":
        on_torch = torch.cuda.is_available() and backends.triton_missing(device) is not None
    else:
        on_torch = named == "torch"
    return _OTHERS if on_torch else KERNELS


@dataclass(frozen=True)
class Worst:
    """The moment of a step at which most bytes are alive.

    peak: bytes by what they are of; the sum is the peak   forward, backward: of one batch
    """

    peak: dict[str, int]
    forward: Counts
    backward: Counts

    @property
    def total(self) -> int:
        return sum(self.peak.values())

    @property
    def flops(self) -> int:
        """FLOP of one batch."""
        return self.forward.flops + self.backward.flops

    @property
    def launches(self) -> int:
        """Launches of one batch."""
        return self.forward.total_launches + self.backward.total_launches


AnyBatch = TypeVar("AnyBatch", Batch, ObjectBatch, TaskBatch)


class CountedStep(Generic[AnyBatch]):
    """A training step of a model of fake tensors.

    model: what is trained   given: the tensors of a batch   closed: operators that make nothing but
    their results   reads_ahead: the next batch lies in the same memory as this one
    """

    closed: Sequence[str] = KERNELS
    reads_ahead = False

    def __init__(
        self,
        model: SamSegmenter,
        settings: FinetuneSettings,
        batch: AnyBatch,
        given: list[Tensor],
    ):
        self.model, self.settings, self.given = model, settings, given
        self.batch: AnyBatch = batch
        self.trained = [p for _, p in samfast.trainable_parameters(model.sam)]
        self.own = [*model.parameters(), *model.buffers()]

    def loss(self) -> Tensor:
        """The loss of a training step."""
        raise NotImplementedError

    def encoded(self, images: Tensor) -> Tensor | dict[int, Tensor]:
        """What the encoder makes of padded images."""
        raise NotImplementedError

    def embeddings(self) -> Tensor | dict[int, Tensor]:
        sam, dtype = self.model.sam, self.model.dtype
        images, lower = self.batch.images, dtype != torch.float32
        valid = valid_region(self.batch.sizes, image_size(sam))
        with torch.autocast(images.device.type, dtype=dtype, enabled=lower):
            return self.encoded(padded_images(images, valid, pixel_mean(sam)))

    def saved(self) -> dict[str, int]:
        """Bytes that autograd keeps at the end of the encoder's forward, and of the loss's."""
        known = [*self.own, *self.given]
        found = [saved_bytes(call, known, self.closed) for call in (self.embeddings, self.loss)]
        encoder, step = (max(saved.hooks, saved.living) for saved in found)
        return {"encoder": encoder, "step": step}

    def worst(self, saved: int | None = None) -> Worst:
        """Run a step and look when most is alive. saved: bytes kept for the backward, if known."""
        earlier: list[Tensor] = []
        if self.settings.accumulate > 1:  # gradients of the batches before, which are added to
            for parameter in self.trained:
                earlier.append(torch.zeros_like(parameter))
                parameter.grad = earlier[-1]
        with Living([*self.own, *self.given, *earlier], self.batch.images.device.type) as living:
            with counting(self.closed) as forward:
                loss = self.loss()
            with counting(self.closed) as backward:
                loss.backward()
        made = [p.grad for p in self.trained if p.grad is not None]
        most, of_gradients = living.worst(() if earlier else made)
        gradients, updating = bytes_of(earlier) + of_gradients, bytes_of(made)
        rest = most - of_gradients
        if gradients + rest < updating:  # the optimizer's step is the worst moment
            gradients, rest = updating, 0
        saved = min(rest, rest if saved is None else saved)
        for parameter in self.trained:
            parameter.grad = None
        batch = bytes_of(self.given)
        peak = {
            "model": bytes_of(self.own),
            "gradients": gradients,
            "optimizer": 2 * bytes_of(self.trained) + 4 * len(self.trained),
            "batch": batch,
            "next_batch": batch if self.reads_ahead else 0,
            "saved": saved,
            "transient": rest - saved,
        }
        return Worst(peak, forward, backward)


class MaskStep(CountedStep[Batch]):
    """Count what one mask takes."""

    def __init__(self, model: Segmenter, settings: FinetuneSettings, device: torch.device):
        side = image_size(model.sam)
        batch = _batch(settings.batch_size, side, device, settings.prompt)
        boxes = [] if batch.boxes is None else [batch.boxes]
        given = [batch.images, batch.masks, batch.sizes, *boxes]
        super().__init__(model, settings, batch, given)
        if keeps_training_images(model.sam, settings):
            self.names = tuple(map(str, range(settings.batch_size)))
        else:
            self.names = ()

    def loss(self) -> Tensor:
        self.model.kept = KeptEmbeddings() if self.names else None  # met for the first time
        batch = self.batch
        logits, valid = self.model(batch.images, batch.sizes, batch.boxes, self.names)
        loss = chosen_loss(self.settings.loss)(logits, batch.masks, valid)
        return loss + samfast.aux_loss(self.model.sam)

    def encoded(self, images: Tensor) -> Tensor:
        return encode(self.model.sam, images)


class ObjectStep(CountedStep[ObjectBatch]):
    """Count what single objects take, as many of each image as a pass may have."""

    def __init__(self, model: PromptedSegmenter, settings: FinetuneSettings, device: torch.device):
        batch = _object_batch(settings, image_size(model.sam), device)
        given = [batch.images, batch.sizes, batch.masks, *batch.first, batch.draws]
        super().__init__(model, settings, batch, given)
        keeps = keeps_training_images(model.sam, settings)
        names = tuple(map(str, range(settings.batch_size))) if keeps else ()
        self.batch = batch._replace(names=names)

    def loss(self) -> Tensor:
        self.model.kept = KeptEmbeddings() if self.batch.names else None  # met for the first time
        own = chosen_loss(self.settings.loss)
        return objects_loss(self.model, self.batch, own) + samfast.aux_loss(self.model.sam)

    def encoded(self, images: Tensor) -> Tensor:
        return encode(self.model.sam, images)


class TaskStep(CountedStep[TaskBatch]):
    """Count what the masks of several tasks take, which every image has."""

    def __init__(
        self,
        model: TaskSegmenter,
        settings: FinetuneSettings,
        device: torch.device,
        specs: Sequence[TaskSpec],
    ):
        batch = _task_batch(settings.batch_size, image_size(model.sam), device, specs)
        given = [batch.images, batch.sizes, *batch.targets.values()]
        super().__init__(model, settings, batch, given)
        self.specs = specs

    def loss(self) -> Tensor:
        return tasks_loss(self.model, self.batch, self.specs) + samfast.aux_loss(self.model.sam)

    def encoded(self, images: Tensor) -> dict[int, Tensor]:
        sam = cast("MultiTaskSam", self.model.sam)
        return sam.encode_for(images, dict.fromkeys(range(len(self.specs))))


@contextlib.contextmanager
def _counted_path(backend: str, absent: bool) -> Iterator[None]:
    """Let operations run on torch, as fake tensors must, or on the reference where it was named.

    absent: a CPU stands for a GPU, whose blocks of logits are larger
    """
    before = os.environ.get("SAMFAST_BACKEND")
    named = backends.requested(backend)
    os.environ["SAMFAST_BACKEND"] = named if named == "reference" else "torch"
    blocks = dict(torch_path.BLOCK)
    if absent:
        torch_path.BLOCK.pop("cpu")
    try:
        yield
    finally:
        torch_path.BLOCK.update(blocks)
        if before is None:
            del os.environ["SAMFAST_BACKEND"]
        else:
            os.environ["SAMFAST_BACKEND"] = before


def _stand_for(model: nn.Module, device: torch.device) -> None:
    """Put tensors that say they are on ``device`` in place of the model's."""

    def stand_in(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=device)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(stand_in(parameter))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = stand_in(buffer)


def _batch(count: int, side: int, device: torch.device, prompt: str) -> Batch:
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
    masks = torch.zeros(count, side, side, dtype=torch.bool, device=device)
    sizes = torch.zeros(count, 2, dtype=torch.int64, device=device)
    numbers = {"none": 0, "box": 4, "point": 3}[prompt]
    boxes = torch.zeros(count, numbers, device=device) if numbers else None
    return Batch(images, masks, sizes, [], boxes)


def _object_batch(settings: FinetuneSettings, side: int, device: torch.device) -> ObjectBatch:
    """As ObjectCollate makes it of images that have objects enough."""
    count, objects, rounds = settings.batch_size, settings.objects, settings.prompt_rounds
    assert objects is not None and rounds is not None  # the recipe fills them in
    total = count * objects
    return ObjectBatch(
        torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device),
        torch.zeros(count, 2, dtype=torch.int64, device=device),
        (objects,) * count,
        torch.zeros(total, side, side, dtype=torch.bool, device=device),
        FirstPrompts(
            torch.zeros(total, 4, device=device),
            torch.zeros(total, dtype=torch.bool, device=device),
        ),
        torch.zeros(total, rounds - 1, dtype=torch.float64, device=device),
    )


def _task_batch(
    count: int, side: int, device: torch.device, specs: Sequence[TaskSpec]
) -> TaskBatch:
    """As TaskCollate makes it of images that have every task."""
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
    sizes = torch.zeros(count, 2, dtype=torch.int64, device=device)
    targets = {}
    for spec in specs:
        if spec.kind == "regression":
            targets[spec.name] = torch.zeros(count, spec.channels, side, side, device=device)
        else:
            targets[spec.name] = torch.zeros(count, side, side, dtype=torch.int64, device=device)
    rows = {spec.name: list(range(count)) for spec in specs}
    return TaskBatch(images, sizes, rows, targets, {spec.name: [] for spec in specs})


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages of tensors, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
