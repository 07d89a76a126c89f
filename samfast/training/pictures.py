# SPDX-License-Identifier: Apache-2.0
"""Pictures a person looks at: masks over images, and the curves of a run."""

import colorsys
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from samfast.training.panels import Mark
from samfast.training.tasks import TaskSpec

TRUTH_COLOUR = (0, 158, 115)  # green and orange that colour-blind readers tell apart
PREDICTION_COLOUR = (230, 120, 0)
_GAP = 4
_LEGEND = 20  # classes
_SHADES = ((0.75, 1.0), (0.9, 0.55), (0.4, 0.9))  # saturation and value
_AXES = tuple(zip(np.eye(3, dtype=np.float32), ("x (right)", "y (down)", "z"), strict=True))


def tinted(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """uint8 (H, W, 3) with ``mask``, bool (H, W), tinted and its border drawn."""
    rgb = np.asarray(colour, np.float32)
    out = image.astype(np.float32)
    out[mask] = 0.6 * out[mask] + 0.4 * rgb
    width = max(1, round(max(mask.shape) / 400))
    out[_border(mask, width)] = rgb
    return out.round().astype(np.uint8)


def _border(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask's pixels within ``width`` steps of a pixel outside it."""
    inner = mask
    for _ in range(width):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def overlay_pictures(
    image: np.ndarray, truth: np.ndarray, predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, truth and prediction, each at the image's own size."""
    return (
        image,
        tinted(image, truth, TRUTH_COLOUR),
        tinted(image, predicted, PREDICTION_COLOUR),
    )


def overlay_panel(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> Image.Image:
    """image | truth | prediction side by side, each at the image's own size."""
    return side_by_side(*overlay_pictures(image, truth, predicted))


def side_by_side(*images: np.ndarray) -> Image.Image:
    """uint8 (H, W, 3) each, with gaps."""
    gap = np.full((images[0].shape[0], _GAP, 3), 255, np.uint8)
    parts = [part for image in images for part in (gap, image)]
    return Image.fromarray(np.concatenate(parts[1:], axis=1))


def classes_over(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) with a colour for each class of an integer (H, W); none where it is < 0."""
    colours = np.stack([_class_colour(i) for i in range(max(0, int(classes.max(initial=0))) + 1)])
    known = classes >= 0
    out = image.astype(np.float32)
    out[known] = 0.35 * out[known] + 0.65 * colours[classes[known]]
    return out.round().astype(np.uint8)


def objects_over(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) with a colour for each object of a label image; none where it is 0."""
    return classes_over(image, np.where(labels > 0, (labels.astype(np.int64) - 1) % 251, -1))


def _class_colour(index: int) -> np.ndarray:
    """Neighbouring numbers are far apart in hue; those of near hues have other shades."""
    hue = index * 0.618034 % 1.0  # numbers that are 5, 8 or 13 apart have near ones
    return 255 * np.array(colorsys.hsv_to_rgb(hue, *_SHADES[index % 3]), np.float32)


def heat(values: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Colours uint8 (H, W, 3) of float (H, W), grey where there is no value.

    limits: the values of the first and the last colour, the smallest and largest if not given
    """
    from matplotlib import colormaps

    known = np.isfinite(values)
    if limits is None:
        limits = (values[known].min(), values[known].max()) if known.any() else (0.0, 1.0)
    share = (np.where(known, values, limits[0]) - limits[0]) / max(limits[1] - limits[0], 1e-12)
    colours = colormaps["viridis"](share.clip(0, 1), bytes=True)[..., :3]
    return np.where(known[..., None], colours, 128).astype(np.uint8)


def directions(values: np.ndarray) -> np.ndarray:
    """Colours uint8 (H, W, 3) of directions float (3, H, W), grey where there is none."""
    length = np.sqrt((values**2).sum(0, keepdims=True))
    known = np.isfinite(length) & (length > 0)
    unit = np.divide(values, length, out=np.zeros_like(values), where=known)
    return (127.5 * (unit + 1)).round().astype(np.uint8).transpose(1, 2, 0)


def task_picture(
    spec: TaskSpec, limits: tuple[float, float] | None = None
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What draws (image, prediction) of this task; limits: the values of the first and the last
    colour, of the prediction itself if not given."""
    if spec.kind == "binary":
        return lambda image, values: tinted(image, values == 1, PREDICTION_COLOUR)
    if spec.kind == "semantic":
        return classes_over
    if spec.loss == "cosine":
        return lambda image, values: directions(spec.model_units(values))
    return lambda image, values: heat(values[0], limits)


def task_panel(spec: TaskSpec, image: np.ndarray, truth: Tensor, prediction: Tensor) -> Image.Image:
    """image | truth | prediction side by side."""
    return side_by_side(*task_pictures(spec, image, truth, prediction)[0])


def task_pictures(
    spec: TaskSpec, image: np.ndarray, truth: Tensor, prediction: Tensor
) -> tuple[tuple[np.ndarray, ...], list[Mark]]:
    """Image, truth and prediction, and what their colours mean."""
    if spec.kind == "regression":
        truth = spec.stored_units(truth)
    expected, found = truth.cpu().numpy(), prediction.cpu().numpy()
    if spec.kind == "binary":
        return overlay_pictures(image, expected == 1, found), []
    limits: tuple[float, float] | None = None
    legend: list[Mark] = []
    if spec.kind == "semantic":
        legend = class_legend(spec.class_names, expected, found)
    elif spec.loss == "cosine":
        legend = [Mark(directions(axis[:, None, None])[0], name) for axis, name in _AXES]
    else:
        limits = _limits(expected[0] if np.isfinite(expected[0]).any() else found[0])
        legend = [_range_mark(spec, limits)]
    draw = task_picture(spec, limits)
    return (image, draw(image, expected), draw(image, found)), legend


def class_legend(names: Sequence[str], *maps: np.ndarray) -> list[Mark]:
    """The colours of the classes in these maps, integers (H, W); of many only the largest."""
    known = np.concatenate([classes[classes >= 0] for classes in maps])
    pixels = np.bincount(known, minlength=len(names))
    largest = np.argsort(-pixels, kind="stable")[:_LEGEND]
    shown = sorted(i for i in largest.tolist() if pixels[i] > 0)
    marks = [Mark(_class_colour(i)[None].round().astype(np.uint8), names[i]) for i in shown]
    more = int((pixels > 0).sum()) - len(shown)
    return [*marks, Mark(np.empty((0, 3), np.uint8), f"+{more} more")] if more else marks


def _limits(values: np.ndarray) -> tuple[float, float]:
    return tuple(np.nanpercentile(values, (1, 99)).tolist())


def _range_mark(spec: TaskSpec, limits: tuple[float, float]) -> Mark:
    """The colours of heat from the first limit to the last."""
    colours = heat(np.linspace(0, 1, 64, dtype=np.float32)[None], (0, 1))[0]
    which = f", channel 1 of {spec.channels}" if spec.channels > 1 else ""
    return Mark(colours, f"{limits[0]:.4g} to {limits[1]:.4g}{which}")


def png_bytes(image: Image.Image | np.ndarray) -> bytes:
    """The PNG file of a PIL image or a uint8 array."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format="PNG")
    return buffer.getvalue()


_MARKS = "os^vDP*X"
_LOSS_CURVES = (("train_loss", "training", "o", "C0"), ("val_loss", "validation", "s", "C1"))


def curves_png(
    rows: Sequence[Mapping[str, Any]],
    loss: str | None,
    scores: Sequence[tuple[str, str]],
    baseline: tuple[float, str] | None = None,
) -> bytes:
    """Losses (``loss`` is their name) and validation scores over metrics.csv's epochs.

    scores: (column, name) of each   baseline: height and name of a line beside them
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.5))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.16, top=0.95, wspace=0.22)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for column, name, mark, colour in _LOSS_CURVES:
        if all(column in row for row in rows):  # of earlier versions without val_loss
            left.plot(epochs, [row[column] for row in rows], marker=mark, color=colour, label=name)
    left.set(xlabel="epoch", ylabel=f"loss ({loss})")
    left.legend(loc="upper right")
    for i, (column, name) in enumerate(scores):
        style = {"marker": _MARKS[i % len(_MARKS)], "color": f"C{1 + i % 9}"}
        right.plot(epochs, [row[column] for row in rows], label=name, **style)
    if baseline is not None:
        right.axhline(baseline[0], color="grey", ls="--", label=baseline[1])
    right.set(xlabel="epoch", ylabel="validation", ylim=(0, 1.02))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
