# SPDX-License-Identifier: Apache-2.0
"""What one training step would take, counted on tensors without memory.

The model of the settings is built, and one forward and backward run, on torch's fake tensors: meta
tensors that know which device they stand for, so that autocast casts as it will. A batch is
``batch_size`` images padded to the square that the model sees, whatever the files' sizes, each
with the one object that is trained, with a box or without, or with the truth of every task; so no
file is needed but that of the tasks.

Counted is samfast's torch path, which keeps the same tensors as all others, with attention,
Conv-LoRA's experts and the product with TA-LoRA's cores as one kernel each that makes nothing but
its results, as C++ and Triton have them; the FLOP of experts and cores, less than a hundredth, are
left out. Peak memory is

    model       parameters and buffers
    + gradients of the trained parameters, all of them (a batch that is accumulated finds them)
    + optimizer AdamW's two moments of every trained parameter and its step
    + batch     images, masks, sizes, boxes
    + saved     what autograd keeps at the end of the forward, the loss included
    + transient what else is alive at the worst moment of forward, loss and backward: the most bytes
                alive at once, less ``saved`` (of which a part is gone by then, if it is late)

It is exact to the tensor on the torch path (others write some of a block's transient tensors over
one another, and need less there), but blind to what a library takes inside one call, to what an
allocator wastes, to the process itself (Python and torch: some 300 MB on a CPU, CUDA's context on a
GPU), to a loader's processes, and to copies for several GPUs.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import samfast
from samfast import backends
from samfast.counters import Living, counting, saved_bytes
from samfast.kernels.relpos_attention import flops as attention_flops
from samfast.models import build_sam, encode, image_size
from samfast.training.build import attach_method, for_tasks
from samfast.training.checks import check_settings
from samfast.training.data import Batch, padded_images, valid_region
from samfast.training.losses import LOSSES
from samfast.training.many_tasks import tasks_loss
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.recipe import method_of, with_recipe
from samfast.training.segmenters import Segmenter, TaskSegmenter
from samfast.training.settings import MEMORY, FinetuneSettings
from samfast.training.task_data import TaskBatch
from samfast.training.tasks import TaskSpec, read_tasks
from samfast.training.try_out import backend_asked_for

KERNELS = (
    *attention_flops.OPERATORS,
    "samfast::conv_experts_forward",
    "samfast::conv_experts_backward",
    "samfast::task_core_product_forward",
    "samfast::task_core_product_backward",
)


def dry_run(settings: FinetuneSettings) -> dict:
    """The settings that matter, and what a step takes: counts of bytes, parameters and FLOP.

    FLOP are of one batch; ``accumulate`` of these make an optimizer step. Raises ValueError for
    settings that are wrong, as ``finetune`` does, but opens no file but that of the tasks.
    """
    check_settings(settings)
    settings = with_recipe(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype(settings.precision, device)
    base = base_dtype(settings.base_dtype, dtype, device)
    specs = None if settings.tasks is None else read_tasks(settings.tasks)
    tasks = None if specs is None else [spec.task for spec in specs]
    method = method_of(settings, tasks)
    with backend_asked_for(settings.backend, method, settings.fuse, device, dtype):
        pass
    sam = build_sam(settings.model, image_size=settings.image_size, random_init=True, device="meta")
    sam = for_tasks(sam, tasks)  # copies of fake tensors would be of another mode
    with _counted_path(settings.backend), FakeTensorMode():
        _stand_for(sam, device)
        # Either 16-bit dtype stands for the other; a cast to float16 would look at values.
        half = {torch.float16: torch.bfloat16}
        attach_method(sam, settings, half.get(base, base))
        kind = Segmenter if specs is None else TaskSegmenter
        model = kind(sam, half.get(dtype, dtype), settings.decoder_chunk).train()
        count, side = settings.batch_size, image_size(sam)
        if specs is None:
            step = _Step(model, settings, _batch(count, side, device, settings.prompt))
        else:
            step = _TaskStep(model, specs, _task_batch(count, side, device, specs))
        counts = step.counts()
        fused = "fused" in samfast.report(sam).blocks.values()
    return {
        "model": settings.model,
        "image_size": image_size(sam),
        "method": settings.method,
        "prompt": settings.prompt,
        "batch_size": settings.batch_size,
        "tasks": None if tasks is None else {task.name: task.channels for task in tasks},
        "objects_per_image": 1 if tasks is None else sum(task.channels for task in tasks),
        "fuse": fused,
        "memory": (settings.memory or MEMORY[0]) if fused else None,
        "decoder_chunk": settings.decoder_chunk,
        "device": device.type,
        "precision": _name(dtype),
        "base_dtype": _name(base or torch.float32),
        **counts,
    }


class _Counted:
    """One forward and backward of a training step, and its counts.

    given: the tensors of its batch
    """

    def __init__(self, model: Segmenter, batch: Batch | TaskBatch, given: list[Tensor]):
        self.model, self.batch, self.given = model, batch, given
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
            return self.encoded(padded_images(images, valid, sam.pixel_mean))

    def counts(self) -> dict:
        known = [*self.own, *self.given]
        saved = [saved_bytes(call, known, KERNELS) for call in (self.embeddings, self.loss)]
        encoder, step = (max(s.hooks, s.living) for s in saved)
        with Living(known) as living:
            with counting(KERNELS) as forward:
                loss = self.loss()
            with counting(KERNELS) as backward:
                loss.backward()
        gradients = [p.grad for p in self.trained if p.grad is not None]
        peak = {
            "model": _bytes(self.own),
            "gradients": _bytes(gradients),
            "optimizer": 2 * _bytes(self.trained) + 4 * len(self.trained),
            "batch": _bytes(self.given),
            "saved": step,
            "transient": living.peak(but=gradients) - step,
        }
        return {
            "trained_parameters": sum(p.numel() for p in self.trained),
            "saved_bytes": {"encoder": encoder, "step": step},
            "peak_bytes": {**peak, "total": sum(peak.values())},
            "flop": {"forward": forward.flops, "backward": backward.flops},
        }


class _Step(_Counted):
    """Of one mask."""

    def __init__(self, model: Segmenter, settings: FinetuneSettings, batch: Batch):
        boxes = [] if batch.boxes is None else [batch.boxes]
        super().__init__(model, batch, [batch.images, batch.masks, batch.sizes, *boxes])
        self.settings = settings

    def loss(self) -> Tensor:
        logits, valid = self.model(self.batch.images, self.batch.sizes, self.batch.boxes)
        loss = LOSSES[self.settings.loss](logits, self.batch.masks, valid)
        return loss + samfast.aux_loss(self.model.sam)

    def encoded(self, images: Tensor) -> Tensor:
        return encode(self.model.sam, images)


class _TaskStep(_Counted):
    """Of several tasks, which every image has."""

    def __init__(self, model: TaskSegmenter, specs: Sequence[TaskSpec], batch: TaskBatch):
        super().__init__(model, batch, [batch.images, batch.sizes, *batch.targets.values()])
        self.specs = specs

    def loss(self) -> Tensor:
        return tasks_loss(self.model, self.batch, self.specs) + samfast.aux_loss(self.model.sam)

    def encoded(self, images: Tensor) -> dict[int, Tensor]:
        return self.model.sam.encode_for(images, dict.fromkeys(range(len(self.specs))))


def text(result: dict) -> str:
    """``dry_run``'s result for readers."""
    chunk, peak = result["decoder_chunk"], result["peak_bytes"]
    encoder = f"fused, memory {result['memory']}" if result["fuse"] else "not fused"
    objects = f"{result['objects_per_image']} object per image"
    objects += " and its box" if result["prompt"] == "box" else ""
    if result["tasks"] is not None:
        channels = ", ".join(f"{name} {count}" for name, count in result["tasks"].items())
        objects = f"channels of tasks: {channels}"
    head = (
        f"{result['model']} at {result['image_size']} pixels, {result['method']}, batches of "
        f"{result['batch_size']}, {objects}, encoder "
        f"{encoder}, base {result['base_dtype']}, precision {result['precision']} on "
        f"{result['device']}" + (f", decoder in chunks of {chunk}" if chunk else "")
    )
    parts = {name: size for name, size in peak.items() if name != "total"}
    rows = [
        ("trained parameters", f"{result['trained_parameters']:,}"),
        ("saved by the encoder", _readable(result["saved_bytes"]["encoder"])),
        ("saved by the step", _readable(result["saved_bytes"]["step"])),
        ("peak memory", _readable(peak["total"])),
        *((f"  {name}", _readable(size)) for name, size in parts.items()),
        *((f"FLOP {way}", f"{flop / 1e12:.3f} T") for way, flop in result["flop"].items()),
    ]
    return "\n".join([head, *(f"  {name:<22}{value:>16}" for name, value in rows)])


@contextlib.contextmanager
def _counted_path(backend: str) -> Iterator[None]:
    """Let operations run on torch, as fake tensors must, or on the reference where it was named."""
    before = os.environ.get("SAMFAST_BACKEND")
    named = backends.requested(backend)
    os.environ["SAMFAST_BACKEND"] = named if named == "reference" else "torch"
    try:
        yield
    finally:
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
    boxes = torch.zeros(count, 4, device=device) if prompt == "box" else None
    return Batch(images, masks, sizes, [], boxes)


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


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
