# SPDX-License-Identifier: Apache-2.0
"""What segment_anything's automatic mask generator scores on a validation set of objects.

Its objects are matched with those of the files as a run's own are, see ``object_scores``, so that
both ways stand side by side. It sees whole images.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import nn

from samfast.adapters.adapter import adapters
from samfast.models import MultiTaskSam
from samfast.models.sam3_folder import NAME as SAM3
from samfast.training.adapter_settings import EvaluateSettings
from samfast.training.automatic import automatic_objects, grid_of
from samfast.training.foreground import Above
from samfast.training.images import read_image
from samfast.training.instances import are_instances
from samfast.training.object_scores import matched, object_scores
from samfast.training.panels import titled
from samfast.training.pictures import objects_over
from samfast.training.progress import Progress
from samfast.training.remembered import Remembered
from samfast.training.task_scores import listed

NAME = "automatic"


class Found(NamedTuple):
    """What is found in one image. counts: as ``matched`` gives them"""

    item: Any
    image: np.ndarray
    truth: np.ndarray
    objects: np.ndarray
    counts: tuple[int, int, int, float]

    def row(self) -> dict[str, Any]:
        """As ``Scored.images`` has it."""
        found, added, missed, _ = self.counts
        own = {"found": found, "added": added, "missed": missed, **object_scores(*self.counts)}
        return {"image": self.item.stem, "task": NAME, **own}

    def panel(self) -> tuple[str, Image.Image]:
        """(file name, titled image | true objects | those found)"""
        scores = listed(object_scores(*self.counts)) or "no object"
        drawn = (objects_over(self.image, labels) for labels in (self.truth, self.objects))
        title = f"{self.item.image.name}  {NAME}  {scores}"
        return f"{self.item.stem}-{NAME}", titled(title, [self.image, *drawn])


def check_automatic(
    settings: EvaluateSettings, kept: Remembered, rule: Any, base: str | None
) -> None:
    """Raise ValueError if there are no objects to score, or if points cannot prompt the model.

    rule: what is foreground   base: the name of the model
    """
    if not settings.automatic:
        return
    if base == SAM3:
        raise ValueError(f"--automatic needs a segment_anything model, got {SAM3}; leave it out")
    labelled = isinstance(rule, Above) and rule.any
    if kept.specs and not are_instances(kept.specs):
        raise ValueError(
            f"adapter {settings.adapter} was not trained on objects, or --task names another "
            "task; leave out --automatic, or train with --masks instances"
        )
    if not (kept.specs or kept.by_object or labelled):
        raise ValueError(
            f"adapter {settings.adapter} was trained on masks that may not tell objects apart; "
            "leave out --automatic, or train with --masks instances or --foreground any"
        )


def with_prompts(sam: nn.Module, base_of: Callable[[], nn.Module]) -> nn.Module:
    """Return a model that points can prompt, for the generator.

    With several tasks, combine the adapted encoder with the original prompt encoder and mask
    decoder (see ``base_of``), because task decoders take no points. Raises ValueError if the
    encoder depends on the task.
    """
    if not isinstance(sam, MultiTaskSam):
        return sam
    if any(getattr(layer, "depends_on_task", False) for layer in adapters(sam).values()):
        raise ValueError(
            "the adapter's encoder needs a task, and --automatic has none; leave out --automatic"
        )
    base = base_of()
    base.image_encoder = sam.image_encoder
    return base.eval()


def automatic_found(sam: nn.Module, goal: Any, settings: EvaluateSettings) -> Iterator[Found]:
    """What the generator finds in each validation image. goal: one that has ``labels``"""
    items = goal.split.val
    with Progress("evaluation, automatic", len(items), main=True) as progress:
        for item in items:
            image, truth = read_image(item.image, goal.options), goal.labels(item)
            batch = settings.decoder_chunk or 64
            objects = automatic_objects(sam, image, points_per_batch=batch, **grid_of(settings))
            yield Found(item, image, truth, objects, matched(objects, truth))
            progress.advance(1)


def text(scores: dict[str, float]) -> str:
    """A line of the table of scores."""
    return f"{NAME}  AP50 {scores['ap50']:.4f} PQ {scores['pq']:.4f}"
