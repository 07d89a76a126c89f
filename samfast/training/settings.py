# SPDX-License-Identifier: Apache-2.0
"""The settings of fine-tuning, evaluation and prediction, which are the command line's options.

Importing this does not load torch, so ``--help`` is quick.
"""

import dataclasses
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samfast.adapters.options import Option, option
from samfast.methods.registry import VARIANTS
from samfast.training.data_settings import DataSettings

METHODS = tuple(VARIANTS)
MODELS = ("vit_b", "vit_l", "vit_h", "vit_tiny", "sam3")
PROMPTS = ("none", "box", "point", "mixed")
OBJECTS = 8  # of each image and pass
GRAPH = ("off", "on")
AUGMENT = ("none", "light", "strong")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
SCHEDULES = ("cosine", "polynomial", "constant")
MEMORY = ("fast", "balanced", "minimal")
BASE_DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("auto", "reference", "torch", "cpu", "triton", "cuda")
LOSSES = ("bce-dice", "structure", "structure-weighted", "balanced-bce")
TASK_LOSSES = {  # of each kind of task, the first unless told otherwise
    "binary": LOSSES,
    "semantic": ("cross-entropy",),
    "regression": ("l1", "cosine"),
}
RANDOM_LR = 1e-3  # from random weights, whatever the method
STEPS_PER_EPOCH = 50  # the least, where the settings leave the number of repeats open
_PRECISION = (
    "Dtype of matrix products (auto: fp32 on a CPU, bf16 on a GPU, fp16 on a GPU without bf16)"
)
_BACKEND = "Kernels to run"
_FUSE = "Run the fused encoder; --no-fuse runs segment_anything's encoder, for comparison"
_CHUNK = "Objects that the mask decoder processes at once"
_THREADS = "Number of torch's CPU threads"
CHECKPOINT = "The SAM weights that the adapter was trained on"
NOT_RANDOM = "required, unless the weights were random"
ADAPTER = "Folder that finetune wrote: a run, or an adapter such as runs/NAME/adapter/last"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model and its prompts."""

    model: str = option(
        "vit_b",
        "Image encoder; all except vit_tiny need --checkpoint or --random-init",
        metavar=f"{{{','.join(MODELS)}}}",
    )
    checkpoint: Path | None = option(
        None,
        "SAM weights: a .pth or .safetensors file, or a Hugging Face SamModel folder (for sam3: "
        "Sam3TrackerModel)",
        hint="default: random weights for vit_tiny",
    )
    random_init: bool = option(
        False, "Start from random weights (see --seed) instead of a checkpoint"
    )
    image_size: int | None = option(
        None,
        "Resize images so that their longest side has this many pixels",
        hint="default: 1024; vit_tiny: 256; sam3: as in its folder",
    )
    prompt: str = option(
        "none",
        "Prompt the mask decoder with nothing (none), a box around all foreground (box) or a "
        "point on it (point). With --masks instances, prompt each object; mixed draws a box or a "
        "point. Prediction needs the same kind of prompt",
        choices=PROMPTS,
    )
    prompt_rounds: int | None = option(
        None,
        "Predict each object this many times per step; each time, add a click on a wrong pixel "
        "and the previous mask. Only with prompts and --masks instances",
        least=1,
        hint="default: 1",
    )
    objects: int | None = option(
        None,
        "Draw at most this many objects per image and pass; only with prompts and --masks "
        "instances",
        least=1,
        hint=f"default: {OBJECTS}",
    )
    box_jitter: float | None = option(
        None,
        "Random shift of each box edge in training, in model-input pixels; only with --prompt box "
        "or mixed",
        least=0,
        hint="default: image size / 50",
    )


def _method_fields() -> list[tuple[str, Any, Any]]:
    """The options of all methods, each once; None where a setting is left to the method."""
    told: dict[str, Option] = {}
    for method in VARIANTS.values():
        for own in method.options():
            told.setdefault(own.name, own)
    return [
        (
            own.name,
            bool if own.type is bool else own.type | None,
            option(
                False if own.type is bool else None,
                own.help,
                choices=own.choices,
                metavar=own.metavar,
                least=own.least,
            ),
        )
        for own in told.values()
    ]


if TYPE_CHECKING:
    # For readers of types, who do not run what makes the fields; a test compares the two.
    @dataclass(frozen=True, kw_only=True)
    class MethodSettings:
        """The adapters that are trained, and their options."""

        method: str = "lora"
        rank: int | None = None
        alpha: float | None = None
        dropout: float | None = None
        target: tuple[str, ...] | None = None
        slices: tuple[str, ...] | None = None
        experts: int | None = None
        depthwise: bool = False
        zero_start: bool = False
        relation_lr: float | None = None
        bottleneck: int | None = None
        kron_n: int | None = None
        orthogonality: float | None = None

else:
    MethodSettings = make_dataclass(
        "MethodSettings",
        [
            (
                "method",
                str,
                option("lora", "Train this in addition to the mask decoder", choices=METHODS),
            ),
            *_method_fields(),
        ],
        namespace={
            "__doc__": "The adapters that are trained, and their options.",
            "__module__": __name__,
        },
        frozen=True,
        kw_only=True,
    )


def _recipes(name: str) -> dict[str, Any]:
    return {variant: method.recipe[name] for variant, method in VARIANTS.items()}


def _by_method(values: dict[str, Any]) -> str:
    """The most frequent value, then the methods that have others."""
    usual = max(values.values(), key=list(values.values()).count)
    others = [f"with {name} {value}" for name, value in values.items() if value != usual]
    return ", ".join([str(usual), *others])


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Length, learning rate, precision and memory of training."""

    epochs: int = option(20, "Train for this many epochs; validate and save after each", least=1)
    patience: int | None = option(
        None,
        "Stop after this many epochs without a better validation score",
        least=1,
        hint="default: never",
    )
    repeats: int | None = option(
        None,
        "Show each training image this many times per epoch",
        least=1,
        hint=f"default: enough for {STEPS_PER_EPOCH} optimizer steps",
    )
    batch_size: int = option(2, "Images per forward pass", least=1)
    accumulate: int = option(
        1, "Accumulate gradients over this many batches per optimizer step", least=1
    )
    lr: float | None = option(
        None,
        "Peak learning rate of AdamW",
        hint=f"default: {RANDOM_LR:g} from random weights; from a checkpoint "
        + _by_method({name: f"{m.checkpoint_lr:g}" for name, m in VARIANTS.items()}),
    )
    schedule: str | None = option(
        None,
        "Learning-rate schedule. cosine and constant follow a short warm-up; polynomial falls "
        "linearly to 0 without one. Or a torch scheduler, stepped every optimizer step, such as "
        "'StepLR(step_size=100)' (ReduceLROnPlateau: every epoch, by the score)",
        metavar=f"{{{','.join(SCHEDULES)}}} | NAME(KEY=VALUE)",
        hint=f"default: {_by_method(_recipes('schedule'))}",
    )
    loss: str | None = option(
        None,
        "Training loss: cross-entropy + Dice (bce-dice); cross-entropy + edge-weighted IoU "
        "(structure); both weighted at edges (structure-weighted); or class-balanced "
        "cross-entropy (balanced-bce)",
        choices=LOSSES,
        hint=f"default: {_by_method(_recipes('loss'))}",
    )
    weight_decay: float = option(1e-4, "Decoupled weight decay of AdamW", least=0)
    clip: float = option(1.0, "Clip the gradient to this norm; 0 turns clipping off", least=0)
    flips: bool = option(True, "Flip training images at random, left-right and top-bottom")
    augment: str = option(
        "none",
        "Augment training images, in addition to --flips. light: brightness and contrast by up to "
        "10%. strong: brightness, contrast and saturation by up to 25%, hue by 2%, rotation by 30 "
        "degrees, scale 0.8 to 1.25, shift by 10% of each side; blur (radius up to 1 pixel) and "
        "noise (up to 8 of 255) in half of the images each",
        choices=AUGMENT,
    )
    seed: int = option(
        0,
        "Random seed for the split, order, flips, augmentation, box jitter and random weights",
        least=0,
        most=2**32 - 1,
    )
    precision: str = option("auto", _PRECISION, choices=PRECISIONS)
    base_dtype: str = option(
        "auto",
        "Dtype of the frozen encoder and its residual stream (auto: bfloat16 on a GPU that trains "
        "in bfloat16, else float32); float16 needs --precision fp16. Adapters and mask decoder "
        "stay float32",
        choices=BASE_DTYPES,
    )
    memory: str | None = option(
        None,
        "What the fused encoder saves for backward: everything (fast), about a third (balanced), "
        "or only block inputs (minimal). It recomputes the rest, with the same results. auto: the "
        "fastest mode that fits this GPU; fast on a CPU",
        choices=(*MEMORY, "auto"),
        hint="default: fast",
    )
    fit: str | None = option(
        None,
        "Choose the fastest settings that fit a GPU of this size (GB is 10^9 bytes) or this GPU "
        "(auto). It sets --memory and --decoder-chunk unless given, and splits --batch-size times "
        "--accumulate images into forward passes. With --dry-run, print the plan; no GPU is needed",
        metavar="{12GB,16GiB,…} | auto",
        hint="default: off",
    )
    decoder_chunk: int | None = option(
        None,
        f"{_CHUNK} (without object prompts, one per image); backward recomputes each chunk",
        least=1,
        hint="default: all",
    )
    cache: bool = option(
        True,
        "Compute each image's embedding once and keep it in main memory. Only with --method "
        "decoder and without --tasks; for training images also needs --no-flips and --augment none",
    )
    fuse: bool = option(True, _FUSE)
    graph: str = option(
        "off",
        "Replay the fused encoder's training steps as CUDA graphs (torch.compile); needs one CUDA "
        "device. Untested on a GPU",
        choices=GRAPH,
    )
    backend: str = option("auto", _BACKEND, choices=BACKENDS)
    threads: int | None = option(None, _THREADS, least=1, most=4096, hint="default: torch's choice")

    @property
    def changes_images(self) -> bool:
        """True if a training image may differ from one pass to the next."""
        return self.flips or self.augment != "none"


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is written and printed."""

    output: Path | None = option(
        None,
        "Write the results to this folder",
        hint="default: runs/DATA-MODEL-METHOD, plus -box or -TASKS",
    )
    overwrite: bool = option(False, "Replace an earlier run's results in the output folder")
    resume: str | None = option(
        None,
        "Resume from the newest complete state in the output folder, or start if there is none. "
        "With PATH, resume that run folder or state; its settings apply unless given again",
        metavar="[PATH]",
        alone="newest",
        hint="default: start a new run",
    )
    save_every: int | None = option(
        None,
        "Also save a state after this many optimizer steps; --resume loses the steps since the "
        "last state",
        least=1,
        hint="default: only after each epoch",
    )
    keep: int = option(1, "Number of states to keep; with 0, the run cannot be resumed", least=0)
    license: str | None = option(
        None,
        "License of the adapter in its model card (README.md), as the Hugging Face Hub calls it, "
        "such as apache-2.0",
        hint="default: unknown",
    )
    overlays: int = option(
        4, "Number of validation images to draw with truth and prediction", least=0
    )
    dry_run: bool = option(
        False,
        "Do not train: print the trained parameters, memory and FLOP of one step. Reads only the "
        "file of --tasks, writes nothing",
    )
    json: bool = option(False, "Print a summary as JSON to stdout, and progress to stderr")


# The groups of fine-tuning's options in the help, in this order.
GROUPS = {
    "data": DataSettings,
    "model": ModelSettings,
    "method": MethodSettings,
    "training": TrainingSettings,
    "output": OutputSettings,
}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(
    OutputSettings, TrainingSettings, MethodSettings, ModelSettings, DataSettings
):
    """Fine-tune a SAM on a folder of images and masks.

    The data folder holds images/ and masks/, with files matched by name, or train/ and val/, each
    with both. With --mask-suffix, masks may be next to their images. Masks hold 0 and one other
    value for foreground; otherwise give --foreground or --threshold. The output folder gets
    adapter/best, adapter/last, metrics.csv, scores.csv, curves.png, overlays/, tensorboard/ and
    settings.json. Each adapter has a README.md for the Hugging Face Hub.
    """


def _of_finetune(name: str) -> tuple[str, Any, Any]:
    """A field for the same option as finetune's."""
    field = FinetuneSettings.__dataclass_fields__[name]
    return name, field.type, dataclasses.field(default=field.default, metadata=field.metadata)


if TYPE_CHECKING:
    # As MethodSettings above.
    @dataclass(frozen=True, kw_only=True)
    class WarmupSettings(MethodSettings):
        """Compile the kernels of a training run before it begins."""

        model: str = "vit_b"
        image_size: int | None = None
        tasks: Path | None = None
        masks: str | None = None
        classes: int | None = None
        batch_size: int = 2
        accumulate: int = 1
        precision: str = "auto"
        base_dtype: str = "auto"
        memory: str | None = None
        fit: str | None = None
        decoder_chunk: int | None = None
        fuse: bool = True
        json: bool = False

else:
    WarmupSettings = make_dataclass(
        "WarmupSettings",
        [
            (
                "model",
                str,
                option(
                    "vit_b",
                    "Image encoder, with random weights: kernels depend only on its sizes",
                    metavar=f"{{{','.join(MODELS)}}}",
                ),
            ),
            *map(_of_finetune, ("image_size", "tasks", "masks", "classes")),
            *map(_of_finetune, MethodSettings.__dataclass_fields__),
            *map(_of_finetune, ("batch_size", "accumulate", "precision", "base_dtype")),
            *map(_of_finetune, ("memory", "fit", "decoder_chunk", "fuse")),
            ("json", bool, option(False, "Print a summary as JSON to stdout")),
        ],
        namespace={
            "__doc__": """Compile the kernels of a training run before it begins.

    Pass the options that you will pass to finetune. This finds the kernels of a training step and
    compiles them in parallel into Triton's cache on disk. Later runs at these sizes on this GPU
    then start at once. Needs a GPU with as much memory as the training, but no files.
                       """,
            "__module__": __name__,
        },
        frozen=True,
        kw_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Segment images with a fine-tuned adapter; write a mask and an overlay for each.

    Masks hold 0 and 255. An adapter with several tasks writes a file for each task: 0 and 255
    (binary), the class of each pixel (semantic), or values (regression) as a float32 TIFF, with
    several channels as a .npy file. An adapter of prompted objects writes NAME_labels.tif, which
    numbers objects from 1 in the order of their prompts.
    """

    images: tuple[Path, ...] = option(
        ...,
        "Image files, or folders of them",
        positional=True,
        metavar="IMAGE ...",
        hint="required",
    )
    adapter: Path = option(..., ADAPTER)
    output: Path = option(
        Path("predictions"),
        "Write NAME_mask.png and NAME_overlay.png to this folder, replacing existing files. With "
        "several tasks: NAME_TASK.png and NAME_TASK_overlay.png",
    )
    stacks: bool = option(
        False,
        "Treat each page of a TIFF and each slice of a .npy array as an image. Write masks and "
        "labels of a stack to one TIFF with a page per slice. Tables and pictures get one file "
        "per slice, such as NAME.tif[0]_overlay.png. Objects are not linked across slices",
    )
    task: str | None = option(None, "Predict only this task", metavar="NAME", hint="default: all")
    checkpoint: Path | None = option(None, CHECKPOINT, hint=NOT_RANDOM)
    bands: str | None = option(
        None,
        "Bands of the image files to use, such as 4,3,2 or 1",
        metavar="N | R,G,B",
        hint="default: as in training",
    )
    range: str | None = option(
        None,
        "Values that become black and white in images with more than 8 bits",
        metavar="{auto,full} | LOW,HIGH",
        hint="default: as in training",
    )
    box: tuple[str, ...] = option(
        (),
        "Prompt with this box, in image pixels; for adapters trained with boxes. Give one for all "
        "images, or one per image in their order. An adapter of prompted objects takes one per "
        "object of a single image",
        metavar="X0,Y0,X1,Y1",
        repeatable=True,
        hint="repeatable",
    )
    point: tuple[str, ...] = option(
        (),
        "Prompt with this point on the object, in image pixels; for adapters trained with points. "
        "Repeat it as --box",
        metavar="X,Y",
        repeatable=True,
        hint="repeatable",
    )
    boxes: Path | None = option(
        None,
        "Read boxes from a CSV or JSON file, one per object; for adapters of prompted objects. "
        "CSV lines: image,x0,y0,x1,y1. JSON: {image: [[x0, y0, x1, y1], ...]}",
        hint="default: none",
    )
    points: Path | None = option(
        None,
        "Read points from a CSV or JSON file: image,x,y[,label[,object]]. Label 1 is on the "
        "object, 0 is off it. Points with the same object number prompt one object",
        hint="default: none",
    )
    tile: int | None = option(
        None,
        "Predict larger images in tiles of this side, in image pixels; each tile is resized to "
        "the model's size. 0 predicts whole images",
        least=0,
        most=65535,
        hint="default: as in training",
    )
    overlap: int | None = option(
        None,
        "Minimum overlap of tiles in pixels; predictions are blended there",
        least=0,
        hint="default: as in training, or tile / 4",
    )
    instances: bool = option(
        False,
        "Number the objects: the connected parts of a mask. An adapter trained with --masks "
        "instances always numbers its objects",
    )
    automatic: bool = option(
        False,
        "Find and number objects with segment_anything's automatic mask generator; for adapters "
        "trained with points",
    )
    points_per_side: int | None = option(
        None,
        "Grid points along each side; only with --automatic",
        least=1,
        most=256,
        hint="default: 32",
    )
    pred_iou_thresh: float | None = option(
        None,
        "Keep masks with at least this predicted IoU; only with --automatic",
        hint="default: 0.88",
    )
    stability_score_thresh: float | None = option(
        None,
        "Keep masks with at least this stability score; only with --automatic",
        hint="default: 0.95",
    )
    formats: tuple[str, ...] = option(
        ("labels",),
        "Files to write for numbered objects: a label image (labels), a table of positions and "
        "areas (csv), outlines for QuPath and GIS (geojson), or one COCO file for all images "
        "(coco)",
        choices=("labels", "csv", "geojson", "coco"),
    )
    probabilities: bool = option(
        False,
        "Also write NAME_probability.tif, the sigmoid of the foreground logits in float32; the "
        "mask is above 0.5. For classes, write NAME_TASK_probability.tif, the softmax with a page "
        "per class. Probabilities are not calibrated",
    )
    min_size: int = option(0, "Leave out objects with fewer pixels", least=0)
    batch_size: int = option(4, "Images per forward pass", least=1)
    precision: str = option("auto", _PRECISION, choices=PRECISIONS)
    decoder_chunk: int | None = option(
        None, f"{_CHUNK} (without object prompts, one per image)", least=1, hint="default: all"
    )
    fuse: bool = option(True, _FUSE)
    backend: str = option("auto", _BACKEND, choices=BACKENDS)
    threads: int | None = option(None, _THREADS, least=1, most=4096, hint="default: torch's choice")
    json: bool = option(False, "Print a summary as JSON to stdout")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Score a fine-tuned adapter on images with masks."""

    adapter: Path = option(..., ADAPTER)
    data: Path = option(
        ...,
        "Folder to score: images/ with masks/ (or the tasks' folders), or train/ and val/, of "
        "which only val/ is scored",
    )
    mask_suffix: str | None = option(
        None,
        "Suffix of mask names after the image's stem, such as _mask; as in finetune",
        metavar="TEXT",
        hint="default: same names as images",
    )
    stacks: bool = option(
        False,
        "Score each page of a TIFF and each slice of a .npy array as an image; as in finetune",
    )
    task: str | None = option(None, "Score only this task", metavar="NAME", hint="default: all")
    checkpoint: Path | None = option(None, CHECKPOINT, hint=NOT_RANDOM)
    automatic: bool = option(
        False,
        "Also score segment_anything's automatic mask generator, on whole images; for masks that "
        "number objects",
    )
    points_per_side: int | None = option(
        None,
        "Grid points along each side; only with --automatic",
        least=1,
        most=256,
        hint="default: 32",
    )
    pred_iou_thresh: float | None = option(
        None,
        "Keep masks with at least this predicted IoU; only with --automatic",
        hint="default: 0.88",
    )
    stability_score_thresh: float | None = option(
        None,
        "Keep masks with at least this stability score; only with --automatic",
        hint="default: 0.95",
    )
    tile: int | None = option(
        None,
        "Predict larger images in tiles of this side, in image pixels, and score the reassembled "
        "images. 0 predicts whole images",
        least=0,
        most=65535,
        hint="default: as in training",
    )
    overlap: int | None = option(
        None,
        "Minimum overlap of tiles in pixels; predictions are blended there",
        least=0,
        hint="default: as in training, or tile / 4",
    )
    output: Path | None = option(
        None,
        "Write an overlay of each image, scores.csv and (for classes) classes.csv to this folder",
        hint="default: write nothing",
    )
    batch_size: int = option(4, "Images per forward pass", least=1)
    precision: str = option("auto", _PRECISION, choices=PRECISIONS)
    decoder_chunk: int | None = option(
        None, f"{_CHUNK} (without object prompts, one per image)", least=1, hint="default: all"
    )
    fuse: bool = option(True, _FUSE)
    backend: str = option("auto", _BACKEND, choices=BACKENDS)
    threads: int | None = option(None, _THREADS, least=1, most=4096, hint="default: torch's choice")
    json: bool = option(False, "Print the scores as JSON to stdout")
