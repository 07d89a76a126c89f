# SPDX-License-Identifier: Apache-2.0
"""What training and scoring ask of a goal: one mask per image, or several tasks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from samfast.models import Task
from samfast.training.folders import Split
from samfast.training.scored import DataFacts, Scored, Tick
from samfast.training.segmenters import SamSegmenter


class Stemmed(Protocol):
    """What the model sees as one image: a file or a tile of one."""

    @property
    def stem(self) -> str: ...


class Goal(Protocol):
    """Data, loss, scores and pictures of what is learned.

    There are ``OneMask``, ``ManyTasks``, ``DatasetGoal`` and ``PromptedObjects``. Making one finds
    the files and opens no image. ``check`` decodes them all; ``scores`` and the texts need what it
    found.

    score: the column of the table that says which epoch is the best; larger is better
    columns: the columns of scores in the table, ``score`` among them
    curves: (column, name) of each curve to draw
    loss_name: of the loss, as the curves' axis names it
    tasks: the tasks of a MultiTaskSam; None for one mask
    split: the files for training and for validation
    joins_steps: whether the means that ``counts`` counts are over all batches of an optimizer step,
        or over each batch
    """

    @property
    def score(self) -> str: ...
    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def curves(self) -> Sequence[tuple[str, str]]: ...
    @property
    def loss_name(self) -> str | None: ...
    @property
    def tasks(self) -> Sequence[Task] | None: ...
    @property
    def split(self) -> Split[Any]: ...
    @property
    def joins_steps(self) -> bool: ...

    def fingerprints(self) -> dict[str, str]:
        """A digest of each file's content, or of each item's, by part and stem."""

    def check(self) -> None:
        """Decode every file and check it; raise ValueError for the first broken rule."""

    def segmenter(self, sam: nn.Module, dtype: torch.dtype) -> SamSegmenter:
        """The model that is trained: padded images in, logits out, under autocast of ``dtype``."""

    def views(self, part: str) -> Sequence[Stemmed]:
        """Return what the model sees of the "train" or "val" files, each with a ``stem``: the
        files, or their tiles."""

    def training_data(self, side: int) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        """The training views at ``side`` pixels, and the function that makes batches of them.

        The dataset is asked for (index, pass) keys, see ``EpochSampler``; a batch has ``images``.
        """

    def steady(self) -> int:
        """How many training views are the same in every pass."""

    def validation_loader(
        self, items: Sequence[Any], side: int, batch_size: int, workers: int = 0
    ) -> DataLoader:
        """Batches of files of the split in their order, with the truth at its own size."""

    def counts(self, indices: Sequence[int]) -> Sequence[int]:
        """Over how many of these training views each mean in the loss is."""

    def loss(self, model: nn.Module, batch: Any, weights: Sequence[float] | None = None) -> Tensor:
        """The loss of one batch; model: what ``segmenter`` made, wrapped or not.

        weights: by which to multiply each mean that ``counts`` counts, where processes share a
        batch
        """

    def scores(self, model: nn.Module, loader: DataLoader, tick: Tick | None = None) -> Scored:
        """The value of each of ``columns`` over a validation loader, and what each image scores.

        ``val_loss`` is the training loss without the adapters' own: the mean over images; of
        several tasks the weighted sum of the means over the images that have the task.

        tick: called with the number of images after each batch; what it raises ends the scoring
        and leaves the model in the mode it was in
        """

    def overlays(
        self, model: nn.Module, items: Sequence[Any], side: int
    ) -> Iterator[tuple[str, Image.Image]]:
        """(file name without suffix, titled image | truth | prediction) for files."""

    def sentences(self) -> Iterator[str]:
        """Sentences that a run prints before it begins."""

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        """The scores of an epoch as part of a line."""

    def closing(self, best: Mapping[str, Any]) -> str:
        """Sentence that a run prints at its end; best: the row of the best epoch."""

    def table(self, row: Mapping[str, Any]) -> str:
        """The scores as text, next to those of the best constant prediction."""

    def summary(self, best: Mapping[str, Any]) -> dict[str, Any]:
        """The scores as ``summary.json`` has them."""

    def facts(self) -> DataFacts:
        """What the model card says about the data and a baseline, after ``check``."""

    def remembered(self) -> dict[str, Any]:
        """What the adapter's folder keeps for evaluation and prediction."""

    def baseline_line(self) -> tuple[float, str] | None:
        """Height and name of a line in the curves; None for no line."""
