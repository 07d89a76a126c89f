# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its folder next to the adapters: table, curves, overlays, settings."""

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from samfast.files.adapter_files import adapter_files
from samfast.files.placing import write_whole
from samfast.methods.registry import VARIANTS
from samfast.training.board import Board
from samfast.training.chosen_tasks import masks_of
from samfast.training.panels import printable
from samfast.training.pictures import png_bytes
from samfast.training.resume import check_resumable, run_of
from samfast.training.run_folder import SETTINGS, STATES, ClaimedFolder, check_free
from samfast.training.score_files import score_files
from samfast.training.settings import FinetuneSettings
from samfast.training.states import save_state

COLUMNS_BEFORE = ("epoch", "step", "train_loss")
COLUMNS_AFTER = ("images_per_second", "peak_memory_mib", "lr")
COLUMNS = (*COLUMNS_BEFORE, "val_loss", "val_dice", "val_iou", *COLUMNS_AFTER)  # of one mask
_LARGEST_SHOWN = 1600  # pixels
_SECONDS_BETWEEN_DRAWINGS = 30  # a drawing costs about as much as a short epoch


def output_folder(settings: FinetuneSettings) -> Path:
    """Where the results go; ValueError when something is there already that is in the way."""
    if (run := run_of(settings)) is not None:
        return run
    output = settings.output if settings.output is not None else Path("runs") / _name(settings)
    if settings.resume is not None:
        check_resumable(output)
    else:
        check_free(output, settings.overwrite)
    return output


def _name(settings: FinetuneSettings) -> str:
    """DATA-MODEL-METHOD, with flags, prompt and tasks."""
    options = VARIANTS[settings.method].options()
    flags = [o.name for o in options if o.in_folder and getattr(settings, o.name)]
    method = "-".join([settings.method, *flags])
    prompt = "" if settings.prompt == "none" else f"-{settings.prompt}"
    masks = masks_of(settings)
    prompt = prompt if masks == "binary" else f"-{masks}{prompt}"
    prompt = prompt if settings.tasks is None else f"-{settings.tasks.stem}"
    data = Path(os.path.realpath(settings.folder)).name
    return f"{data}-{settings.model}-{method}{prompt}"


class RunFolder:
    """The results of one run in its output folder, which is the run's own inside a ``with``.

    settings: for settings.json   overwrite: whether an earlier run's results may be replaced
    scores: the table's columns of scores   draw: the rows so far as a picture of curves
    decoders: how many are trained   main: False in a process that writes nothing
    resume, keep: as in ``ClaimedFolder``
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        scores: Sequence[str],
        draw: Callable[[list[dict[str, Any]]], bytes],
        *,
        overwrite: bool = False,
        decoders: int = 1,
        main: bool = True,
        resume: bool = False,
        keep: int = 0,
    ):
        self.folder = folder
        self.settings = settings
        self.columns = (*COLUMNS_BEFORE, *scores, *COLUMNS_AFTER)
        self.draw = draw
        self.rows: list[dict[str, Any]] = []
        self.decoders = decoders
        self._claimed = ClaimedFolder(folder, overwrite, resume, keep) if main else None
        self.states = folder / STATES
        self._board: Board | None = None
        self._drawn = time.perf_counter()

    def __enter__(self) -> "RunFolder":
        if self._claimed is not None:
            self._claimed.open(_json(self.settings), self.decoders)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """Finish the curves; without a result nothing stays."""
        if self._claimed is None:
            return
        try:
            self._finish()
        except OSError:  # of a full disk, which the error on its way has told already
            if error is None:
                raise
        finally:
            self._claimed.close()

    def check_room(self, size: int) -> None:
        """Raise ValueError when adapters of so many bytes do not fit; before training."""
        if self._claimed is not None:
            self._claimed.check_room(size)

    def begin(self) -> None:
        """Make way for the first result."""
        self._own().begin()

    def save_settings(self) -> None:
        """Write the settings with which a run goes on."""
        if self._claimed is not None:
            self.write_json(SETTINGS, self.settings)

    def save_state(
        self,
        name: str,
        model: nn.Module,
        record: dict[str, Any],
        tensors: dict[str, Tensor],
        keep: int,
    ) -> Path:
        """Put a state of the run in place, see ``samfast.training.states``; returns its folder."""
        self.begin()
        self.states.mkdir(exist_ok=True)
        folder = self.states / name
        folder = save_state(folder, adapter_files(model, folder), record, tensors, keep)
        self._own().keep()
        return folder

    def add_epoch(self, row: dict[str, Any]) -> None:
        """Append one row (the keys are the columns) to table, curves and TensorBoard."""
        self.rows.append(row)
        table = io.StringIO()
        writer = csv.DictWriter(table, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder / "metrics.csv", table.getvalue().encode())
        if time.perf_counter() - self._drawn > _SECONDS_BETWEEN_DRAWINGS:
            self._draw()
        self._add_to_board(row)
        self._own().keep()

    def add_overlay(self, name: str, panel: Image.Image) -> None:
        """Write or replace ``overlays/<name>.png``; TensorBoard gets it at the last epoch.

        There, at most 1600 pixels wide and high: it keeps the panels of every best epoch.
        """
        folder = self.folder / "overlays"
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"{name}.png", png_bytes(panel))
        epoch = self.rows[-1]["epoch"] if self.rows else 0
        shown = _at_most(panel, _LARGEST_SHOWN)
        self._open_board().add_image(f"overlays/{printable(name)}", shown, epoch)

    def write_scores(
        self, images: Iterable[Mapping[str, Any]], classes: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Write or replace ``scores.csv``, and ``classes.csv`` where there are classes.

        images, classes: as in ``Scored``, the images of every process
        """
        for name, data in score_files(images, classes).items():
            write_whole(self.folder / name, data)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_whole(self.folder / name, _json(content))

    def _own(self) -> ClaimedFolder:
        """The folder as this process, which writes, has claimed it."""
        assert self._claimed is not None, self.folder
        return self._claimed

    def _add_to_board(self, row: dict[str, Any]) -> None:
        self._open_board().add({name: row[name] for name in self.columns[2:]}, int(row["epoch"]))

    def _open_board(self) -> Board:
        if self._board is None:
            first = int(self.rows[-1]["epoch"]) if self.rows else 0
            self._board = Board(self.folder / "tensorboard", first)
        return self._board

    def _finish(self) -> None:
        if self.rows:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        write_whole(self.folder / "curves.png", self.draw(self.rows))


def _at_most(image: Image.Image, size: int) -> Image.Image:
    """The image, made smaller until neither side is above ``size``."""
    if max(image.size) <= size:
        return image
    smaller = image.copy()
    smaller.thumbnail((size, size))
    return smaller


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, default=str) + "\n").encode()
