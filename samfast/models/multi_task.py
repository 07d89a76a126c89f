# SPDX-License-Identifier: Apache-2.0
"""One SAM encoder, several tasks: a mask decoder and no-mask embeddings for each.

There is no prompt encoder. A task of N channels runs its decoder as if each image had N empty
prompts. Each prompt has its own no-mask embedding, and mask token 0 predicts its channel.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samfast.adapters.adapter import adapters
from samfast.adapters.attachment import attachment
from samfast.adapters.foreign import Foreign
from samfast.adapters.wrappers import unwrapped
from samfast.models.heads import MULTI_TASK, TRAINED_DECODER, head_of
from samfast.models.segment import (
    check_decoder_chunk,
    decode_objects,
    encode,
    encode_grid,
    upscale,
)

KINDS = ("binary", "semantic", "regression")
TaskName = str | int
Chosen = dict[int, list[int] | None]  # task number -> its images, None for all


@dataclass(frozen=True)
class Task:
    """What one decoder predicts.

    name: its name in dictionaries, files and on the command line
    kind: "binary": one logit, of the foreground; "semantic": one logit per class; "regression":
        values
    channels: 1 for binary, the number of classes for semantic, values per pixel for regression
    """

    name: str
    kind: str = "binary"
    channels: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(
                f"task name {self.name!r} must consist of letters, digits and underscores"
            )
        taken = (nn.ModuleDict(), nn.ParameterDict())
        if any(hasattr(known, self.name) for known in taken) or self.name == "all":
            raise ValueError(f"task name {self.name!r} is reserved; choose another")
        if self.kind not in KINDS:
            raise ValueError(
                f"task {self.name} has kind {self.kind!r}; known are {', '.join(KINDS)}"
            )
        if isinstance(self.channels, bool) or not isinstance(self.channels, int):
            raise TypeError(f"task {self.name} has channels {self.channels!r}, not a whole number")
        least, most = {"binary": (1, 1), "semantic": (2, None), "regression": (1, None)}[self.kind]
        if self.channels < least or (most is not None and self.channels > most):
            wanted = f"{least}" if most is not None else f"at least {least}"
            raise ValueError(
                f"task {self.name} has {self.channels} channels; {self.kind} has {wanted}"
            )

    def config(self) -> dict[str, Any]:
        """Return the task as JSON values."""
        return asdict(self)


class MultiTaskSam(nn.Module):
    """SAM for several tasks without prompts.

    sam: segment_anything's Sam; its image encoder is shared, its mask decoder copied for each task
    tasks: different names

    images: [B, 3, H, W] as for ``segment`` -> logits of a task [B, channels, H, W], float32, or
    float64 if sam is. ``attach`` and ``fuse`` work as on a Sam. ``train=model.trained_parts()``
    trains decoders, no-mask embeddings and the encoder's norms.

    ``torch.compile(model, fullgraph=True)`` makes a graph for each way to name tasks. In that
    graph, patch embedding and blocks that do not depend on the task run once per task too.

    Raises ValueError if two tasks share a name, or if sam has adapters or a binary head.
    """

    def __init__(self, sam: nn.Module, tasks: Iterable[Task]):
        super().__init__()
        self.tasks, model = tuple(tasks), unwrapped(sam)
        _check(model, self.tasks)
        self.image_encoder: Foreign = model.image_encoder
        self.pe_layer = deepcopy(model.prompt_encoder.pe_layer)
        row = model.prompt_encoder.no_mask_embed.weight.detach()  # [1, 256]
        self.no_mask_embeds = nn.ParameterDict(
            {task.name: nn.Parameter(row.repeat(task.channels, 1)) for task in self.tasks}
        )
        self.mask_decoders = nn.ModuleDict(
            {task.name: deepcopy(model.mask_decoder) for task in self.tasks}
        )
        self.register_buffer("pixel_mean", model.pixel_mean.clone(), persistent=False)
        self.register_buffer("pixel_std", model.pixel_std.clone(), persistent=False)
        base = getattr(model, "samfast_base", None)
        if base is not None:
            self.samfast_base = base
        self.train(model.training)

    samfast_head = MULTI_TASK

    def trained_parts(self) -> tuple[str, ...]:
        """Return what to train in addition to adapters, for ``attach(train=...)``.

        Decoders come without the heads for quality and other masks, which are never read.
        """
        norms = [
            f"image_encoder.{name}"
            for name, module in self.image_encoder.named_modules()
            if isinstance(module, nn.LayerNorm) or type(module).__name__ == "LayerNorm2d"
        ]
        decoders = [
            part.replace("mask_decoder", f"mask_decoders.{task.name}", 1)
            for task in self.tasks
            for part in TRAINED_DECODER
        ]
        return ("no_mask_embeds", *decoders, *norms)

    def index_of(self, task: TaskName) -> int:
        """Return the number of a task; raise ValueError for an unknown name or number."""
        names = [known.name for known in self.tasks]
        if isinstance(task, str) and task in names:
            return names.index(task)
        if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(names):
            return task
        known = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise ValueError(f"task {task!r} does not exist; known are {known}")

    def forward(
        self,
        images: Tensor,
        task: TaskName | Sequence[TaskName] | Mapping[TaskName, Sequence[int]] | None = None,
        *,
        decoder_chunk: int | None = None,
    ) -> dict[str, Tensor] | Tensor | list[Tensor]:
        """Predict logits of images [B, 3, H, W].

        task: None: every task, {name: [B, channels, H, W]}
            a name or number: that task, [B, channels, H, W]
            B of them: each image's own task, [B, channels, H, W] if all have equally many channels,
                else a list of B [channels, H, W]
            {name or number: indices of images}: {name: [indices, channels, H, W]}
        decoder_chunk: number of images * channels that a decoder takes at a time, see ``segment``

        If nothing in the encoder depends on the task, it runs once. Otherwise the blocks before the
        first that does run once. The rest runs in one batch of all tasks' images.
        """
        check_decoder_chunk(decoder_chunk)
        count = len(images) if images.dim() else 0
        chosen, form = self._chosen(task, count)
        embeddings = self.encode_for(images, chosen)
        logits = {
            i: self._decode(i, own, (images.shape[2], images.shape[3]), decoder_chunk)
            for i, own in embeddings.items()
        }
        if form == "one":
            return next(iter(logits.values()))
        if form == "each":
            found: dict[int, Tensor] = {}
            for i, own in logits.items():
                found.update(zip(chosen[i] or (), own, strict=True))
            rows = [found[image] for image in range(count)]
            alike = len({self.tasks[i].channels for i in logits}) == 1
            return torch.stack(rows) if alike else rows
        return {self.tasks[i].name: own for i, own in logits.items()}

    def _chosen(self, task: Any, count: int) -> tuple[Chosen, str]:
        """Map task numbers to their images, None for all; also return the form of the result."""
        if task is None:
            return dict.fromkeys(range(len(self.tasks))), "dict"
        if isinstance(task, Mapping) and not task:
            raise ValueError("expected at least one task, got none")
        if isinstance(task, Tensor):
            task = task.tolist()
        if isinstance(task, Mapping):
            asked = {self.index_of(name): list(images) for name, images in task.items()}
            for i, images in asked.items():
                for image in images:
                    if not 0 <= image < count:
                        raise ValueError(
                            f"task {self.tasks[i].name} asks for image {image} of {count}"
                        )
            whole = list(range(count))
            return {i: None if own == whole else own for i, own in asked.items()}, "dict"
        if isinstance(task, str) or not isinstance(task, Sequence):
            return {self.index_of(task): None}, "one"
        if len(task) != count or count == 0:
            raise ValueError(f"there are {len(task)} tasks for {count} images")
        each: Chosen = {}
        for image, own in enumerate(task):
            i = self.index_of(own)
            each[i] = [*(each.get(i) or ()), image]
        return each, "each"

    def encode_for(self, images: Tensor, chosen: Chosen) -> dict[int, Tensor]:
        """Encode each task's images to embeddings [images, 256, n, n]."""
        block = _first_dependent_block(self.image_encoder)
        if block is None:
            self._check_merged(chosen)
            embeddings = encode(self, images)
            return {i: _rows(embeddings, own) for i, own in chosen.items()}
        count = len(images)
        sizes = [count if own is None else len(own) for own in chosen.values()]
        numbers = [i for i, size in zip(chosen, sizes, strict=True) for _ in range(size)]
        if not numbers:
            pass  # no image, no task
        elif len(chosen) == 1:
            self._set_tasks(next(iter(chosen)), numbers[:1])
        elif list(chosen.items()) == [(i, None) for i in range(len(self.tasks))]:
            self._set_tasks("all", list(chosen))
        else:
            self._set_tasks(torch.tensor(numbers), numbers)

        def split(x: Tensor) -> Tensor:
            """Return the rows of all tasks, task-major."""
            if all(own is None for own in chosen.values()):
                return x.expand(len(chosen), *x.shape).flatten(0, 1) if len(chosen) > 1 else x
            return torch.cat([_rows(x, own) for own in chosen.values()])

        if count == 0 or not numbers:
            embeddings = encode(self, images[:0])
        elif torch.compiler.is_compiling():  # tracing cannot set a hook
            embeddings = encode(self, split(images))
        else:
            with _before(block, split):
                embeddings = encode(self, images)
        return dict(zip(chosen, embeddings.split(sizes), strict=True))

    def decode_task(self, embeddings: Tensor, task: TaskName, size: tuple[int, int]) -> Tensor:
        """Decode ``encode_for``'s embeddings of a task to logits [B, channels, *size]."""
        return self._decode(self.index_of(task), embeddings, size, None)

    def _set_tasks(self, task: int | str | Tensor, numbers: list[int]) -> None:
        """Set the task. task: as for samfast.set_task   numbers: the same, as the layers keep it"""
        if not torch.compiler.is_compiling():
            import samfast

            samfast.set_task(self, task, repeated=True)
            return
        # Reading what was set before would tie a graph to it.
        layer: Foreign
        for layer in adapters(self).values():
            if getattr(layer, "depends_on_task", False):
                layer.choose(tuple(numbers))
                layer.repeated = True

    def _check_merged(self, chosen: Iterable[int]) -> None:
        """Raise ValueError if one task's update is merged and another task is requested."""
        for name, layer in adapters(self).items():
            entries = getattr(layer, "entries", None)  # TA-LoRA has it
            if layer.merged and entries is not None and set(chosen) != {own := int(entries[0])}:
                raise ValueError(
                    f"{name} has the update of task {self.tasks[own].name} merged, so no other can "
                    "run; call unmerge() first"
                )

    def _decode(
        self, index: int, embeddings: Tensor, size: tuple[int, int], chunk: int | None
    ) -> Tensor:
        """Decode embeddings [B, 256, n, n] to a task's logits [B, channels, H, W]."""
        task = self.tasks[index]
        dense = self.no_mask_embeds[task.name]
        objects = len(embeddings) * task.channels
        masks = decode_objects(
            self.mask_decoders[task.name],
            embeddings,
            encode_grid(self.pe_layer, (embeddings.shape[2], embeddings.shape[3])),
            dense.new_empty((objects, 0, dense.shape[1])),
            dense,
            task.channels,
            chunk,
        )
        masks = upscale(masks, size, self.image_encoder.img_size)
        return masks.view(len(embeddings), task.channels, *size)

    def extra_repr(self) -> str:
        return ", ".join(f"{task.name}: {task.kind} {task.channels}" for task in self.tasks)


def tasks_from_config(config: Any) -> tuple[Task, ...]:
    """Build the tasks that ``Task.config`` describes; raise ValueError if there are none."""
    if not isinstance(config, list) or not all(isinstance(task, dict) for task in config):
        raise ValueError(f"{config!r} does not describe tasks")
    known = set(Task.__dataclass_fields__)
    for task in config:
        if not set(task) <= known or "name" not in task:
            raise ValueError(f"{task!r} does not describe a task")
    return tuple(Task(**task) for task in config)


def _check(sam: nn.Module, tasks: tuple[Task, ...]) -> None:
    if not tasks or not all(isinstance(task, Task) for task in tasks):
        raise ValueError(f"tasks are {tasks!r}; give at least one samfast.models.Task")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tasks are called {name}")
    parts = ("image_encoder", "prompt_encoder", "mask_decoder")
    if not all(isinstance(getattr(sam, part, None), nn.Module) for part in parts):
        raise ValueError(f"expected segment_anything's Sam, got {type(sam).__name__}")
    if head_of(sam) != "sam":
        raise ValueError(
            f"expected SAM's own head, but the model has head {head_of(sam)!r}; call "
            "samfast.models.restore_head first"
        )
    if adapters(sam) or attachment(sam) is not None:
        raise ValueError("the model has adapters; attach them to the MultiTaskSam instead")


def _first_dependent_block(encoder: Foreign) -> nn.Module | None:
    """Return the first block that depends on the task; None if none does."""
    block: nn.Module
    for block in encoder.blocks:
        if any(getattr(module, "depends_on_task", False) for module in block.modules()):
            return block
    return None


@contextmanager
def _before(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change a block's input with a pre-hook."""
    handle = block.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _rows(x: Tensor, rows: Sequence[int] | None) -> Tensor:
    """Return x[rows], all for None. Indexing would add with atomics in backward on a GPU."""
    if rows is None:
        return x
    return torch.stack([x[i] for i in rows]) if len(rows) else x[:0]
