# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its folder next to the adapters: table, curves, overlays, settings."""

import csv
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from samfast.files.placing import write_whole
from samfast.methods.registry import VARIANTS
from samfast.training.board import Board
from samfast.training.pictures import png_bytes
from samfast.training.run_folder import ClaimedFolder, check_free
from samfast.training.settings import FinetuneSettings

COLUMNS_BEFORE = ("epoch", "step", "train_loss")
COLUMNS_AFTER = ("images_per_second", "peak_memory_mib", "lr")
COLUMNS = (*COLUMNS_BEFORE, "val_dice", "val_iou", *COLUMNS_AFTER)  # of one mask
_SECONDS_BETWEEN_DRAWINGS = 30  # a drawing costs about as much as a short epoch


def output_folder(settings: FinetuneSettings) -> Path:
    """Where the results go; ValueError when something is there already."""
    options = VARIANTS[settings.method].options()
    flags = [o.name for o in options if o.in_folder and getattr(settings, o.name)]
    method = "-".join([settings.method, *flags])
    prompt = "" if settings.prompt == "none" else f"-{settings.prompt}"
    prompt = prompt if settings.tasks is None else f"-{settings.tasks.stem}"
    data = Path(os.path.realpath(settings.data)).name
    name = f"{data}-{settings.model}-{method}{prompt}"
    output = settings.output if settings.output is not None else Path("runs") / name
    check_free(output, settings.overwrite)
    return output


class RunFolder:
    """The results of one run in its output folder, which is the run's own inside a ``with``.

    settings: for settings.json   overwrite: whether an earlier run's results may be replaced
    scores: the table's columns of scores   draw: the rows so far as a picture of curves
    decoders: how many are trained   main: False in a process that writes nothing
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        scores: Sequence[str],
        draw: Callable[[list[dict]], bytes],
        *,
        overwrite: bool = False,
        decoders: int = 1,
        main: bool = True,
    ):
        self.folder = folder
        self.settings = settings
        self.columns = (*COLUMNS_BEFORE, *scores, *COLUMNS_AFTER)
        self.draw = draw
        self.rows: list[dict] = []
        self.decoders = decoders
        self._claimed = ClaimedFolder(folder, overwrite) if main else None
        self._board: Board | None = None
        self._drawn = time.perf_counter()

    def __enter__(self) -> "RunFolder":
        if self._claimed is not None:
            self._claimed.open(_json(self.settings), self.decoders)
        return self

    def __exit__(self, kind, error, _) -> None:
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
        """Make way for the first result, which is an adapter."""
        self._claimed.begin()

    def add_epoch(self, row: dict) -> None:
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
        self._claimed.keep()

    def add_overlay(self, name: str, panel: Image.Image) -> None:
        """Write or replace ``overlays/<name>.png``."""
        folder = self.folder / "overlays"
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"{name}.png", png_bytes(panel))

    def write_json(self, name: str, content: dict) -> None:
        write_whole(self.folder / name, _json(content))

    def _add_to_board(self, row: dict) -> None:
        if self._board is None:
            self._board = Board(self.folder / "tensorboard")
        self._board.add({name: row[name] for name in self.columns[2:]}, int(row["epoch"]))

    def _finish(self) -> None:
        if self.rows:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        write_whole(self.folder / "curves.png", self.draw(self.rows))


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, default=str) + "\n").encode()
