# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its folder beside the adapters: table, curves, overlays, settings."""

import csv
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from samfast.methods.registry import VARIANTS
from samfast.training.pictures import png_bytes
from samfast.training.settings import FinetuneSettings

COLUMNS_BEFORE = ("epoch", "step", "train_loss")
COLUMNS_AFTER = ("images_per_second", "peak_memory_mib", "lr")
COLUMNS = (*COLUMNS_BEFORE, "val_dice", "val_iou", *COLUMNS_AFTER)  # of one mask
_SECONDS_BETWEEN_DRAWINGS = 30  # a drawing costs about as much as a short epoch
_FOLDERS = ("adapter", "overlays", "tensorboard")
_FILES = ("metrics.csv", "curves.png", "settings.json", "summary.json")


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in place in one step: a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def clear_results(folder: Path) -> None:
    """Remove an earlier run's results from a folder, and nothing else that may be in it."""
    for name in _FOLDERS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def output_folder(settings: FinetuneSettings) -> Path:
    """Where the results go; ValueError when something is there already."""
    options = VARIANTS[settings.method].options()
    flags = [o.name for o in options if o.in_folder and getattr(settings, o.name)]
    method = "-".join([settings.method, *flags])
    prompt = "" if settings.prompt == "none" else f"-{settings.prompt}"
    prompt = prompt if settings.tasks is None else f"-{settings.tasks.stem}"
    name = f"{settings.data.resolve().name}-{settings.model}-{method}{prompt}"
    output = settings.output if settings.output is not None else Path("runs") / name
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file, not a folder")
    if output.is_dir() and any(output.iterdir()) and not settings.overwrite:
        raise ValueError(
            f"output folder {output} is not empty; choose another --output, or --overwrite to "
            "replace an earlier run's results"
        )
    return output


class RunFolder:
    """The output folder of one run. Nothing is created before the first result is there.

    scores: the table's columns of scores   draw: the rows so far as a picture of curves
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        scores: Sequence[str],
        draw: Callable[[list[dict]], bytes],
    ):
        self.folder = folder
        self.settings = settings
        self.columns = (*COLUMNS_BEFORE, *scores, *COLUMNS_AFTER)
        self.draw = draw
        self.rows: list[dict] = []
        self._board = None
        self._drawn = time.perf_counter()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        clear_results(self.folder)
        self.write_json("settings.json", self.settings)
        self._board = SummaryWriter(str(self.folder / "tensorboard"))

    def add_epoch(self, row: dict) -> None:
        """Append one row (the keys are the columns) to table, curves and TensorBoard."""
        if self._board is None:
            self._open()
        self.rows.append(row)
        table = io.StringIO()
        writer = csv.DictWriter(table, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder / "metrics.csv", table.getvalue().encode())
        if time.perf_counter() - self._drawn > _SECONDS_BETWEEN_DRAWINGS:
            self._draw()
        for name in self.columns[2:]:
            self._board.add_scalar(name, row[name], row["epoch"])
        self._board.flush()

    def add_overlay(self, name: str, panel: Image.Image) -> None:
        """Write or replace ``overlays/<name>.png``."""
        folder = self.folder / "overlays"
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"{name}.png", png_bytes(panel))

    def write_json(self, name: str, content: dict) -> None:
        text = json.dumps(content, indent=2, default=str) + "\n"
        write_whole(self.folder / name, text.encode())

    def close(self) -> None:
        """Finish the curves and TensorBoard; does nothing when no result came."""
        if self._board is not None:
            self._draw()
            self._board.close()

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        write_whole(self.folder / "curves.png", self.draw(self.rows))
