# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the image encoder in training, by torch.compile's graph trees.

Never run on a GPU: only the choice between graph and eager, and the compiled step's numbers, are
tested, on a CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from samfast.adapters.foreign import Foreign
from samfast.models.sam3 import is_tracker
from samfast.training.settings import FinetuneSettings

OPTIONS: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False, "fullgraph": True}


def check_graph(settings: FinetuneSettings, device: torch.device, processes: int) -> None:
    """Raise ValueError if ``graph`` is on and no graph can be had."""
    if settings.graph != "on":
        return
    if device.type != "cuda":
        raise ValueError(
            f"graph is on, which needs a CUDA device, but the device is {device.type}; leave out "
            "--graph"
        )
    if processes > 1:
        raise ValueError(
            f"graph is on, which works in one process only, but there are {processes}; leave out "
            "--graph"
        )


def graphed(
    sam: nn.Module, settings: FinetuneSettings, say: Callable[[str], None]
) -> "GraphedEncoder | None":
    """The graphs of a model's encoder as the settings ask for them; None for none.

    Works in place: the encoder keeps its names, its hooks and its parameters.
    """
    if settings.graph != "on":
        return None
    encoder: Foreign = sam.vision_encoder if is_tracker(sam) else sam.image_encoder
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        say("graph is on, but the encoder is frozen, so it runs without CUDA graphs")
        return None
    say("the encoder trains in CUDA graphs (never run on a GPU); the first step compiles it")
    return GraphedEncoder(encoder, settings.batch_size, settings.accumulate > 1, say)


class GraphedEncoder:
    """Stands in for an encoder's call: a whole batch of training runs compiled, all else eagerly.

    images: in a whole batch, with all tasks where the encoder depends on them; the first other one
        is told
    accumulates: whether gradients of several batches are summed

    What cannot be traced into one graph is told, and runs eagerly from then on.
    """

    def __init__(
        self, encoder: nn.Module, images: int, accumulates: bool, say: Callable[[str], None]
    ):
        self.encoder, self.images, self.accumulates, self.say = encoder, images, accumulates, say
        layers = (m for m in encoder.modules() if getattr(m, "depends_on_task", False))
        self.by_task: Foreign = next(layers, None)
        self.told = self.left_out = False
        self.skips: int | None = None  # before the first compiled step

        # By itself _call_impl would be left out, and each hook compiled.
        def whole(*args: Any, **kwargs: Any) -> Any:
            return encoder._call_impl(*args, **kwargs)

        self.compiled: Callable[..., Any] | None = torch.compile(whole, **OPTIONS)
        encoder._compiled_call_impl = self  # as nn.Module.compile does; no copy or file has it

    def begin_step(self) -> None:
        """Call it before each forward: what the graphs of the batch before made may be replaced.

        Gradients too, which autograd would take over as they are. Where they are summed they get
        memory of their own.
        """
        torch.compiler.cudagraph_mark_step_begin()
        if self.skips is not None:
            self._look_for_graphs(self.skips)
        if self.accumulates:
            for parameter in self.encoder.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def __call__(self, images: Tensor, **options: Any) -> Any:
        encoder = self.encoder
        if self.compiled is None or not (encoder.training and torch.is_grad_enabled()):
            return encoder._call_impl(images, **options)
        if (other := self._other(images)) is not None:
            if not self.told:
                self.say(f"a batch of {other} runs without CUDA graphs, as all like it")
            self.told = True
            return encoder._call_impl(images, **options)
        if self.skips is None:
            self.skips = _skips()
        try:
            return self.compiled(images, **options)
        except _refusal() as error:  # before anything has run
            self.compiled = None
            reason = " ".join(str(error).split("\n\n")[0].split())  # advice follows
            self.say(f"the encoder runs without CUDA graphs: {reason}")
            return encoder._call_impl(images, **options)

    def _look_for_graphs(self, before: int) -> None:
        """torch leaves them out without a word, but counts that."""
        if _skips() > before and not self.left_out:
            self.left_out = True
            self.say(
                "the encoder runs compiled, but torch used no CUDA graphs; set "
                "TORCH_LOGS=cudagraphs to see why"
            )

    def _other(self, images: Tensor) -> str | None:
        """What a batch has in place of all images and tasks, None for a whole one."""
        if len(images) != self.images:
            return f"{len(images)}, not {self.images}, images"
        if self.by_task is not None and self.by_task.chosen != tuple(range(self.by_task.tasks)):
            return "images that lack a task"
        return None


def _skips() -> int:
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]


def _refusal() -> type[Exception]:
    """What torch.compile raises; to import it takes seconds, so only where something was raised."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException
