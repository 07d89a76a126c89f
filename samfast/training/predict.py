# SPDX-License-Identifier: Apache-2.0
"""Masks for new photographs from a saved adapter."""

import io
from collections.abc import Iterator, Sequence
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
from samfast.models.sam3_folder import NAME as SAM3
from samfast.training.automatic import automatic_objects
from samfast.training.boxes import check_box, parsed_box, resized_box
from samfast.training.checks import check_prediction
from samfast.training.data import Collate, Sample, resize_image
from samfast.training.evaluate import predicted_masks
from samfast.training.image_options import ImageOptions
from samfast.training.images import SUFFIXES, read_image
from samfast.training.instances import are_instances, objects_of
from samfast.training.object_files import ObjectFiles, parts
from samfast.training.pictures import PREDICTION_COLOUR, png_bytes, task_picture, tinted
from samfast.training.points import check_point, parsed_point, resized_point
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.predict_tiles import predicted_by_tiles
from samfast.training.progress import Progress
from samfast.training.remembered import Remembered, remembered
from samfast.training.run_folder import SETTINGS, check_folder
from samfast.training.segmenters import Segmenter, TaskSegmenter
from samfast.training.settings import PredictSettings
from samfast.training.task_scores import predicted_tasks
from samfast.training.tasks import TaskSpec
from samfast.training.tiles import check_tiles, count_of
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
    if not are_instances(specs):
        _check_files(names, specs)
    boxes = [] if settings.automatic else boxes_for(settings, kept.prompt, shapes)
    _check_kind(settings, kept)
    numbers = settings.instances or settings.automatic or are_instances(specs)
    files = ObjectFiles(settings.output, settings.formats, paths) if numbers else None
    with backend_asked_for(settings.backend, adapter.method, settings.fuse, device, dtype):
        sam = load_adapted(
            settings.adapter,
            settings.checkpoint,
            base_dtype("auto", dtype, device),
            fuse=settings.fuse,
        )
        kind = TaskSegmenter if specs else Segmenter
        model = kind(sam, dtype, settings.decoder_chunk).to(device)
        settings.output.mkdir(parents=True, exist_ok=True)
        remove_dead(settings.output)
        found = _maps(settings, model, paths, boxes, kept, shapes)
        written = []
        for path, name, maps in zip(paths, names, found, strict=True):
            image = read_image(path, options)
            written.append(_written(settings, name, path, image, maps, specs, files))
            if not settings.json:
                print(f"{path}: {_said(written[-1])}", flush=True)
    together = {} if files is None else files.finish()
    return {"output": str(settings.output), "images": written, **together}


def _maps(
    settings: PredictSettings,
    model: nn.Module,
    paths: Sequence[Path],
    boxes: Sequence[np.ndarray],
    kept: Remembered,
    shapes: dict[Path, tuple[int, int]],
) -> Iterator[dict[str, np.ndarray]]:
    """What each image is predicted at its size, by task; of one mask under "", and "objects"."""
    if settings.automatic:
        for path in paths:
            objects = automatic_objects(
                model.sam,
                read_image(path, kept.options),
                points_per_side=settings.points_per_side,
                pred_iou_thresh=settings.pred_iou_thresh,
                stability_score_thresh=settings.stability_score_thresh,
                min_size=settings.min_size,
            )
            yield {"objects": objects}
        return
    if settings.tile is not None:
        overlap = check_tiles(settings.tile, settings.overlap)
        count = sum(count_of(shape, settings.tile, overlap) for shape in shapes.values())
        with Progress("prediction, tiles", count, main=True) as progress:
            for path in paths:
                yield predicted_by_tiles(
                    model,
                    read_image(path, kept.options),
                    kept.specs,
                    settings.tile,
                    overlap,
                    settings.batch_size,
                    progress.advance,
                )
        return
    side = image_size(model.sam)
    loader = DataLoader(
        _Photographs(paths, side, boxes, kept.options),
        batch_size=settings.batch_size,
        collate_fn=Collate(side, truths=True),
    )
    if kept.specs:
        for tasks in predicted_tasks(model, loader, kept.specs):
            yield {spec.name: values for spec, values in tasks}
    else:
        for mask, _ in predicted_masks(model, loader):
            yield {"": mask.cpu().numpy()}


def _written(
    settings: PredictSettings,
    name: str,
    path: Path,
    image: np.ndarray,
    maps: dict[str, np.ndarray],
    specs: Sequence[TaskSpec],
    files: ObjectFiles | None,
) -> dict:
    """Write what one image is predicted; returns the files' names and what they hold."""
    folder = settings.output
    if "objects" in maps:
        return files.write(name, path, image, maps["objects"])
    if specs and are_instances(specs):
        by_map = {spec.derive: maps[spec.name] for spec in specs}
        return files.write(name, path, image, objects_of(by_map, settings.min_size))
    if specs:
        return _write_tasks(folder, name, path, image, [(s, maps[s.name]) for s in specs])
    made = _write(folder, name, path, image, maps[""])
    if settings.instances:
        return made | files.write(name, path, image, parts(maps[""], settings.min_size))
    return made


def _said(made: dict) -> str:
    """What a line of output says of an image."""
    if "tasks" in made:
        return ", ".join(task["mask"] for task in made["tasks"].values())
    if "objects" in made:
        named = [made[kind] for kind in ("labels", "csv", "geojson") if kind in made]
        return ", ".join([f"{made['objects']} objects", *named])
    return f"{made['foreground']:.1%} foreground, {made['mask']}"


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


def _check_kind(settings: PredictSettings, kept: Remembered) -> None:
    """Raise ValueError for options that an adapter of this kind cannot have."""
    check_tiles(settings.tile, settings.overlap)
    if settings.automatic:
        _check_automatic(settings, kept)
    if settings.tile is not None and kept.prompt != "none":
        raise ValueError(
            f"tile is {settings.tile}, but adapter {settings.adapter} is prompted by a "
            f"{kept.prompt} for each image; leave out --tile"
        )
    asked = settings.instances or settings.automatic
    numbered = are_instances(kept.specs) or (asked and not kept.specs)
    if settings.instances and not numbered:
        raise ValueError(
            f"adapter {settings.adapter} does not know objects; leave out --instances, or train "
            "with --masks instances"
        )
    if not numbered and set(settings.formats) != {"labels"}:
        raise ValueError(
            f"formats are {', '.join(settings.formats)}, but no objects are numbered; give "
            "--instances"
        )
    if settings.min_size and not numbered:
        raise ValueError(
            f"min_size is {settings.min_size}, but no objects are numbered; give --instances"
        )


def _check_automatic(settings: PredictSettings, kept: Remembered) -> None:
    """Raise ValueError for what a grid of points cannot be combined with."""
    given = {"--tile": settings.tile, "--box": settings.box, "--point": settings.point}
    for name, value in given.items():
        if value:
            raise ValueError(f"--automatic finds objects by points of its own; leave out {name}")
    if kept.specs:
        raise ValueError(
            f"adapter {settings.adapter} has decoders of tasks, which no point prompts; leave out "
            "--automatic"
        )
    base = read_adapter(adapter_folder(settings.adapter)).record["base"].get("name")
    if base == SAM3:
        raise ValueError(f"--automatic is segment_anything's, which {SAM3} is not")


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
