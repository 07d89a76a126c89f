# SPDX-License-Identifier: Apache-2.0
"""Masks for new photographs from a saved adapter."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import samfast
from samfast.files.format import CONFIG, read_adapter
from samfast.files.placing import write_whole
from samfast.files.temporary import remove_dead
from samfast.models import build_sam, image_size
from samfast.models.architectures import ARCHITECTURES
from samfast.training.boxes import check_box, parsed_box, resized_box
from samfast.training.checks import check_prediction
from samfast.training.data import Collate, Sample, resize_image
from samfast.training.evaluate import predicted_masks
from samfast.training.image_options import ImageOptions
from samfast.training.images import SUFFIXES, read_image
from samfast.training.object_prompts import Prompts, object_prompts
from samfast.training.pictures import PREDICTION_COLOUR, png_bytes, task_picture, tinted
from samfast.training.points import check_point, parsed_point, resized_point
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.prompted_predict import predicted_objects, write_objects
from samfast.training.prompted_scores import kinds_of
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.remembered import remembered
from samfast.training.run_folder import SETTINGS, check_folder
from samfast.training.segmenters import Segmenter, TaskSegmenter
from samfast.training.settings import PredictSettings
from samfast.training.task_scores import predicted_tasks
from samfast.training.tasks import TaskSpec
from samfast.training.try_out import backend_asked_for


def predict(settings: PredictSettings) -> dict:
    """Write one mask and one overlay for each image; returns what was written.

    Every image is decoded before anything is written: a bad one is a ValueError with one sentence.
    """
    check_prediction(settings)
    if not settings.images:
        raise ValueError("no image is named; give files or folders of them")
    paths = find_images(settings.images)
    names = _output_names(paths)
    check_folder(settings.output)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype(settings.precision, device)
    adapter = read_adapter(adapter_folder(settings.adapter))
    kept = remembered(adapter, settings.task, settings.bands, settings.range)
    options, specs = kept.options, kept.specs
    shapes = {path: read_image(path, options).shape[:2] for path in paths}
    _check_files(names, specs)
    objects, boxes = None, []
    if kept.by_object:
        objects = object_prompts(settings, kinds_of(kept.prompt), shapes)
    else:
        _refuse_files(settings)
        boxes = boxes_for(settings, kept.prompt, shapes)
    with backend_asked_for(settings.backend, adapter.method, settings.fuse, device, dtype):
        sam = load_adapted(
            settings.adapter,
            settings.checkpoint,
            base_dtype("auto", dtype, device),
            fuse=settings.fuse,
        )
        kind = TaskSegmenter if specs else Segmenter
        kind = PromptedSegmenter if kept.by_object else kind
        model = kind(sam, dtype, settings.decoder_chunk).to(device)
        loader = DataLoader(
            _Photographs(paths, image_size(sam), boxes, options),
            batch_size=settings.batch_size,
            collate_fn=Collate(image_size(sam), truths=True),
        )
        settings.output.mkdir(parents=True, exist_ok=True)
        remove_dead(settings.output)
        written = []
        if objects is not None:
            return _predict_objects(settings, model, objects, shapes, names, options)
        if specs:
            found = predicted_tasks(model, loader, specs)
            for path, name, maps in zip(paths, names, found, strict=True):
                image = read_image(path, options)
                written.append(_write_tasks(settings.output, name, path, image, maps))
                if not settings.json:
                    masks = (task["mask"] for task in written[-1]["tasks"].values())
                    print(f"{path}: {', '.join(masks)}", flush=True)
            return {"output": str(settings.output), "images": written}
        masks = (mask.cpu().numpy() for mask, _ in predicted_masks(model, loader))
        for path, name, mask in zip(paths, names, masks, strict=True):
            written.append(_write(settings.output, name, path, read_image(path, options), mask))
            if not settings.json:
                print(
                    f"{path}: {written[-1]['foreground']:.1%} foreground, {written[-1]['mask']}",
                    flush=True,
                )
    return {"output": str(settings.output), "images": written}


def _refuse_files(settings: PredictSettings) -> None:
    """Raise ValueError for files of prompts, which are for adapters of single objects."""
    for name in ("boxes", "points"):
        if getattr(settings, name) is not None:
            raise ValueError(
                f"{name} is {getattr(settings, name)}, but adapter {settings.adapter} was not "
                f"trained on single objects; leave out --{name}"
            )


def _predict_objects(
    settings: PredictSettings,
    model: nn.Module,
    prompts: Prompts,
    shapes: dict[Path, tuple[int, int]],
    names: Sequence[str],
    options: ImageOptions,
) -> dict:
    """Write the objects of each image, in the prompts' order of images; as ``predict``."""
    side, written = image_size(model.sam), []
    found = predicted_objects(model, prompts, shapes, side, options, settings.batch_size)
    for (path, own), name, labels in zip(prompts.items(), names, found, strict=True):
        image = read_image(path, options)
        written.append(write_objects(settings.output, name, path, image, labels, len(own)))
        if not settings.json:
            print(f"{path}: {len(own)} objects, {written[-1]['labels']}", flush=True)
    return {"output": str(settings.output), "images": written}


def find_images(given: Sequence[Path]) -> list[Path]:
    """Files as named, folders as the images in them (not below), sorted."""
    paths = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            inside = [p for p in inside if not p.name.startswith(".")]
            if not inside:
                raise ValueError(f"folder {path} holds no image ({', '.join(SUFFIXES)})")
            paths += inside
        elif path.exists():
            paths.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    return paths


def boxes_for(
    settings: PredictSettings, prompt: str, sizes: dict[Path, tuple[int, int]]
) -> list[np.ndarray]:
    """The box, or the point, of each image; none where the adapter's prompt is none.

    sizes: (height, width) of each image. Raises ValueError when prompts and adapter, prompts and
    number of images, or a prompt and its image do not fit.
    """
    given = {
        "box": [parsed_box(text) for text in settings.box],
        "point": [parsed_point(text) for text in settings.point],
    }
    for kind, those in given.items():
        if those and prompt != kind:
            trained = "out prompts" if prompt == "none" else f" a {prompt} for each image"
            raise ValueError(
                f"adapter {settings.adapter} was trained with{trained}; leave out --{kind}"
            )
    if prompt == "none":
        return []
    prompts = given[prompt]
    if not prompts:
        form = {"box": "x0,y0,x1,y1", "point": "x,y"}[prompt]
        raise ValueError(
            f"adapter {settings.adapter} was trained with a {prompt} for each image; give it with "
            f"--{prompt} {form}, in pixels of the image"
        )
    if len(prompts) not in (1, len(sizes)):
        many = {"box": "boxes", "point": "points"}[prompt]
        raise ValueError(
            f"there are {len(prompts)} {many} for {len(sizes)} images; give one for all, or one "
            "each"
        )
    prompts = prompts * len(sizes) if len(prompts) == 1 else prompts
    check = {"box": check_box, "point": check_point}[prompt]
    for one, (path, size) in zip(prompts, sizes.items(), strict=True):
        check(one, size, str(path))
    return prompts


def load_adapted(
    adapter: Path,
    checkpoint: Path | None = None,
    base_dtype: torch.dtype | None = None,
    fuse: bool = True,
) -> nn.Module:
    """The SAM that an adapter folder was trained on, with the adapter, in eval mode, on the CPU;
    a MultiTaskSam for an adapter of several tasks.

    fuse: whether attention runs fused, as ``finetune`` trains it unless told otherwise
    adapter may also be a run's folder, or one with ``best/`` in it. Random bases are drawn again
    from the recorded seed; others need ``checkpoint``, and a wrong one is noticed by its digest.
    """
    adapter = adapter_folder(adapter)
    base = read_adapter(adapter).record["base"]
    if base.get("name") is None:
        raise ValueError(f"adapter {adapter} does not say which model it was trained on")
    if base.get("checkpoint") is not None and checkpoint is None:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']} from {base['checkpoint']}; say where "
            "that file is with --checkpoint"
        )
    if base.get("checkpoint") is None and checkpoint is not None:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']} with random weights, so checkpoint "
            f"{checkpoint} is not its base"
        )
    if checkpoint is None and base.get("seed") is None:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']} with random weights of no known "
            "seed, which cannot be drawn again"
        )
    if base["name"] not in ARCHITECTURES:
        raise ValueError(
            f"adapter {adapter} was trained on {base['name']}; known are {', '.join(ARCHITECTURES)}"
        )
    sam = build_sam(
        base["name"],
        checkpoint=checkpoint,
        image_size=base.get("image_size"),
        random_init=checkpoint is None,
        seed=base.get("seed"),
    )
    sam = samfast.load_adapter(sam, adapter, base_dtype=base_dtype).eval()
    return samfast.fuse(sam) if fuse else sam


def adapter_folder(given: Path) -> Path:
    """The adapter's folder itself, or the best adapter's of a run's folder."""
    if (given / CONFIG).exists():
        return given
    for inside in (given / "best", given / "adapter" / "best"):
        if inside.is_dir():
            return inside
    if (given / "adapter" / "last").is_dir():
        raise FileNotFoundError(
            f"run folder {given} has no adapter/best; name {given}/adapter/last"
        )
    if (given / SETTINGS).is_file():
        raise FileNotFoundError(f"run folder {given} has no adapter yet: nothing was saved")
    return given


class _Photographs(Dataset):
    """``boxes`` are one of each image, in its file's pixels, or points, or none."""

    def __init__(
        self,
        paths: Sequence[Path],
        side: int,
        boxes: Sequence[np.ndarray],
        options: ImageOptions,
    ):
        self.paths = paths
        self.side = side
        self.boxes = boxes
        self.options = options

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.paths[index], self.options)
        resized = resize_image(image, self.side)
        size, resized_size = image.shape[:2], resized.shape[:2]
        box = resized_prompt(self.boxes[index], size, resized_size) if self.boxes else None
        # No truth: only the sizes of these two count.
        return Sample(resized, np.zeros(resized_size, bool), np.zeros(size, bool), box)


def resized_prompt(prompt: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """A box or a point of an image of size ``before`` resized to ``after``."""
    return (resized_box if len(prompt) == 4 else resized_point)(prompt, before, after)


def _output_names(paths: Sequence[Path]) -> list[str]:
    """Stems; where two images share one, their whole names."""
    stems = [path.stem for path in paths]
    names = [p.name if stems.count(p.stem) > 1 else p.stem for p in paths]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two of the images are called {name}; predict them separately")
    return names


def _check_files(names: Sequence[str], specs: Sequence[TaskSpec]) -> None:
    """Raise ValueError where images and tasks have such names that two files would have one."""
    files: dict[str, str] = {}
    for name in names:
        for spec in specs:
            for file in (f"{name}_{spec.name}", f"{name}_{spec.name}_overlay"):
                what = f"image {name} and task {spec.name}"
                if file in files:
                    raise ValueError(
                        f"{files[file]}, and {what}, would both write a file called {file}; "
                        "predict them separately, with --task"
                    )
                files[file] = what


def _write(folder: Path, name: str, path: Path, image: np.ndarray, mask: np.ndarray) -> dict:
    mask_path, overlay_path = folder / f"{name}_mask.png", folder / f"{name}_overlay.png"
    overlay = tinted(image, mask, PREDICTION_COLOUR)
    write_whole(mask_path, png_bytes(mask.astype(np.uint8) * 255), durable=False)
    write_whole(overlay_path, png_bytes(overlay), durable=False)
    return {
        "image": str(path),
        "mask": str(mask_path),
        "overlay": str(overlay_path),
        "foreground": float(mask.mean()),
    }


def _write_tasks(
    folder: Path,
    name: str,
    path: Path,
    image: np.ndarray,
    maps: list[tuple[TaskSpec, np.ndarray]],
) -> dict:
    """A file of each task with its classes or values, and a picture of it."""
    tasks = {}
    for spec, values in maps:
        suffix, data = _file_of(spec, values)
        mask_path = folder / f"{name}_{spec.name}{suffix}"
        overlay_path = folder / f"{name}_{spec.name}_overlay.png"
        write_whole(mask_path, data, durable=False)
        write_whole(overlay_path, png_bytes(task_picture(spec)(image, values)), durable=False)
        tasks[spec.name] = {"mask": str(mask_path), "overlay": str(overlay_path)}
    return {"image": str(path), "tasks": tasks}


def _file_of(spec: TaskSpec, values: np.ndarray) -> tuple[str, bytes]:
    """Suffix and content of the file that holds a task's prediction."""
    if spec.kind == "binary":
        return ".png", png_bytes(values.astype(np.uint8) * 255)
    if spec.kind == "semantic":
        dtype = np.uint8 if spec.channels <= 256 else np.uint16
        return ".png", png_bytes(values.astype(dtype))
    buffer = io.BytesIO()
    if spec.channels == 1:
        Image.fromarray(values[0].astype(np.float32)).save(buffer, format="TIFF")
        return ".tif", buffer.getvalue()
    np.save(buffer, values.astype(np.float32).transpose(1, 2, 0), allow_pickle=False)
    return ".npy", buffer.getvalue()
