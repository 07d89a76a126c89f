# SPDX-License-Identifier: Apache-2.0
"""Pictures a person looks at: masks over images, and the curves of a run."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

TRUTH_COLOUR = (0, 158, 115)  # green and orange that colour-blind readers tell apart
PREDICTION_COLOUR = (230, 120, 0)
_GAP = 4


def tinted(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """uint8 (H, W, 3) with ``mask``, bool (H, W), tinted and its border drawn."""
    colour = np.asarray(colour, np.float32)
    out = image.astype(np.float32)
    out[mask] = 0.6 * out[mask] + 0.4 * colour
    width = max(1, round(max(mask.shape) / 400))
    out[_border(mask, width)] = colour
    return out.round().astype(np.uint8)


def _border(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask's pixels within ``width`` steps of a pixel outside it."""
    inner = mask
    for _ in range(width):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def overlay_panel(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> Image.Image:
    """image | truth | prediction side by side, each at the image's own size."""
    gap = np.full((image.shape[0], _GAP, 3), 255, np.uint8)
    parts = (
        image,
        gap,
        tinted(image, truth, TRUTH_COLOUR),
        gap,
        tinted(image, predicted, PREDICTION_COLOUR),
    )
    return Image.fromarray(np.concatenate(parts, axis=1))


def png_bytes(image: Image.Image | np.ndarray) -> bytes:
    """The PNG file of a PIL image or a uint8 array."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def curves_png(rows: Sequence[dict], all_foreground: float, loss: str) -> bytes:
    """Training loss (``loss`` is its name), validation Dice and IoU, over metrics.csv's epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.5))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.16, top=0.95, wspace=0.22)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["train_loss"] for row in rows], marker="o", color="C0")
    left.set(xlabel="epoch", ylabel=f"training loss ({loss})")
    right.plot(epochs, [row["val_dice"] for row in rows], marker="o", color="C1", label="Dice")
    right.plot(epochs, [row["val_iou"] for row in rows], marker="s", color="C2", label="IoU")
    right.axhline(all_foreground, color="grey", ls="--", label="Dice of all foreground")
    right.set(xlabel="epoch", ylabel="validation", ylim=(0, 1.02))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
