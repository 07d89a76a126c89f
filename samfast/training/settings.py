# SPDX-License-Identifier: Apache-2.0
"""The settings of fine-tuning, evaluation and prediction, which are the command line's options.

Importing this does not load torch, so ``--help`` is quick.
"""

import dataclasses
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

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
    "Dtype of the products (auto: fp32 on a CPU; on a GPU bf16, or fp16 where that is missing)"
)
_BACKEND = "Which kernels run"
_FUSE = "Run the encoder fused; --no-fuse runs segment_anything's own, to compare"
_CHUNK = "Objects that the mask decoder takes at a time"
_THREADS = "CPU threads of torch"
CHECKPOINT = "The SAM weights that the adapter was trained on"
NOT_RANDOM = "required, except where these were random"
ADAPTER = "What finetune wrote: a run's folder, or an adapter's such as runs/NAME/adapter/last"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model, and what it is given."""

    model: str = option(
        "vit_b",
        "Image encoder; all but vit_tiny need --checkpoint or --random-init",
        metavar=f"{{{','.join(MODELS)}}}",
    )
    checkpoint: Path | None = option(
        None,
        "SAM weights: a .pth or .safetensors file or a Hugging Face SamModel folder; for sam3 a "
        "Sam3TrackerModel folder",
        hint="default: random weights for vit_tiny",
    )
    random_init: bool = option(
        False, "Start from random weights, drawn from --seed, in place of a checkpoint"
    )
    image_size: int | None = option(
        None,
        "Longest side of the images as the model sees them",
        hint="default: 1024, for vit_tiny 256, for sam3 the folder's",
    )
    prompt: str = option(
        "none",
        "Give the mask decoder only the image (none), or also the box around all foreground (box) "
        "or a point on it (point); an adapter trained with prompts needs them to predict. With "
        "--masks instances each object has its own, a box or a point by chance with mixed",
        choices=PROMPTS,
    )
    prompt_rounds: int | None = option(
        None,
        "Predictions for each object in a step: each after the first sees one more click, on a "
        "wrong pixel, and the mask before; only with prompts and --masks instances",
        least=1,
        hint="default: 1",
    )
    objects: int | None = option(
        None,
        "Objects of each image that a pass trains on, drawn anew each time; all where there are "
        "fewer; only with prompts and --masks instances",
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


MethodSettings = make_dataclass(
    "MethodSettings",
    [
        (
            "method",
            str,
            option("lora", "What is trained in addition to the mask decoder", choices=METHODS),
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
    """How long, how fast and in which precision to train."""

    epochs: int = option(20, "Epochs; the model is validated and saved after each", least=1)
    patience: int | None = option(
        None,
        "Stop after so many epochs without a better validation score",
        least=1,
        hint="default: never",
    )
    repeats: int | None = option(
        None,
        "How often an epoch shows each training image, mirrored anew each time",
        least=1,
        hint=f"default: as often as {STEPS_PER_EPOCH} optimizer steps take, at least once",
    )
    batch_size: int = option(2, "Images in one forward pass", least=1)
    accumulate: int = option(1, "Batches summed into one optimizer step", least=1)
    lr: float | None = option(
        None,
        "Peak learning rate of AdamW",
        hint=f"default: {RANDOM_LR:g} from random weights; from a checkpoint "
        + _by_method({name: f"{m.checkpoint_lr:g}" for name, m in VARIANTS.items()}),
    )
    schedule: str | None = option(
        None,
        "Learning rate after a short warm-up: half a cosine to 0, or constant; or without warm-up "
        "in a straight line to 0 (polynomial); or a schedule of torch for each step, such as "
        "'StepLR(step_size=100)' (ReduceLROnPlateau: for each epoch, by the score)",
        metavar=f"{{{','.join(SCHEDULES)}}} | NAME(KEY=VALUE)",
        hint=f"default: {_by_method(_recipes('schedule'))}",
    )
    loss: str | None = option(
        None,
        "Cross-entropy and Dice (bce-dice); cross-entropy and IoU weighted near edges (structure), "
        "in the cross-entropy too (structure-weighted); or cross-entropy in which rare foreground "
        "counts more (balanced-bce)",
        choices=LOSSES,
        hint=f"default: {_by_method(_recipes('loss'))}",
    )
    weight_decay: float = option(1e-4, "Decoupled weight decay of AdamW", least=0)
    clip: float = option(1.0, "Largest norm of the gradient; 0 does not clip", least=0)
    flips: bool = option(True, "Mirror training images at random, left-right and top-bottom")
    augment: str = option(
        "none",
        "Change training images at random, besides --flips: brightness and contrast by up to 10% "
        "(light); or by up to 25%, saturation by 25% and hue by 2%, turned by up to 30 degrees, "
        "scaled by 0.8 to 1.25, shifted by up to 10% of each side, half of them blurred (radius up "
        "to 1 pixel), half with noise (up to 8 of 255) (strong)",
        choices=AUGMENT,
    )
    seed: int = option(
        0,
        "Seed of the split, order, flips, augmentation, box jitter and random weights",
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
        "What the fused encoder keeps for the backward: all it needs (fast), about a third "
        "(balanced) or each block's input (minimal); it computes the rest again, with the same "
        "results. auto: the first of these that fits the GPU at hand, on a CPU fast",
        choices=(*MEMORY, "auto"),
        hint="default: fast",
    )
    fit: str | None = option(
        None,
        "Choose --memory and --decoder-chunk, where they are not given, and how many images of "
        "--batch-size times --accumulate are in one forward pass: the fastest that fits a GPU of "
        "this memory (GB is 10^9 bytes), or the GPU at hand (auto). With --dry-run, print the plan "
        "for a GPU that need not be here",
        metavar="{12GB,16GiB,…} | auto",
        hint="default: as the options say",
    )
    decoder_chunk: int | None = option(
        None,
        f"{_CHUNK} (an image is one object); each chunk is computed again for its gradient",
        least=1,
        hint="default: all",
    )
    cache: bool = option(
        True,
        "With --method decoder and without --tasks, compute each image's embedding once and keep "
        "it in main memory; of training images only with --no-flips and --augment none",
    )
    fuse: bool = option(True, _FUSE)
    graph: str = option(
        "off",
        "Replay the fused encoder's training steps as CUDA graphs, by torch.compile; needs one "
        "CUDA device. Never run on a GPU",
        choices=GRAPH,
    )
    backend: str = option("auto", _BACKEND, choices=BACKENDS)
    threads: int | None = option(None, _THREADS, least=1, most=4096, hint="default: torch's choice")

    @property
    def changes_images(self) -> bool:
        """Whether a training image may differ from one pass to the next."""
        return self.flips or self.augment != "none"


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is written and printed."""

    output: Path | None = option(
        None,
        "Folder for the results",
        hint="default: runs/DATA-MODEL-METHOD, with -box or -TASKS",
    )
    overwrite: bool = option(False, "Replace the results of an earlier run in the output folder")
    resume: str | None = option(
        None,
        "Go on from the newest complete state in the output folder, or begin where there is none; "
        "or from PATH, a run's folder or one of its states, whose settings hold unless given anew",
        metavar="[PATH]",
        alone="newest",
        hint="default: begin anew",
    )
    save_every: int | None = option(
        None,
        "Save a state after so many optimizer steps, too; --resume loses the steps since the last",
        least=1,
        hint="default: after each epoch only",
    )
    keep: int = option(1, "States to keep; 0 saves none, so that nothing can be resumed", least=0)
    license: str | None = option(
        None,
        "License of the adapter in its model card (README.md), as the Hugging Face Hub calls it, "
        "such as apache-2.0",
        hint="default: unknown",
    )
    overlays: int = option(4, "Validation images to draw next to truth and prediction", least=0)
    dry_run: bool = option(
        False,
        "Train nothing: print what one step would take in trained parameters, memory and FLOP. "
        "Reads no file but that of --tasks, writes none",
    )
    json: bool = option(False, "Print a summary as JSON on stdout; the running text goes to stderr")


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

    The data folder holds images/ and masks/, whose files are matched by name; or train/ and val/,
    each with both. With --mask-suffix, masks may lie beside their images. Masks hold 0 and one
    other value, which is foreground; other masks need foreground values or a threshold. The output
    folder gets adapter/best, adapter/last, metrics.csv, scores.csv, curves.png, overlays/,
    tensorboard/ and settings.json. Each adapter has a README.md for the Hugging Face Hub.
    """


def _of_finetune(name: str) -> tuple[str, Any, Any]:
    """A field for the same option as finetune's."""
    field = FinetuneSettings.__dataclass_fields__[name]
    return name, field.type, dataclasses.field(default=field.default, metadata=field.metadata)


WarmupSettings = make_dataclass(
    "WarmupSettings",
    [
        (
            "model",
            str,
            option(
                "vit_b",
                "Image encoder; its weights are random, since kernels depend on its sizes only",
                metavar=f"{{{','.join(MODELS)}}}",
            ),
        ),
        *map(_of_finetune, ("image_size", "tasks", "masks", "classes")),
        *map(_of_finetune, MethodSettings.__dataclass_fields__),
        *map(_of_finetune, ("batch_size", "accumulate", "precision", "base_dtype")),
        *map(_of_finetune, ("memory", "fit", "decoder_chunk", "fuse")),
        ("json", bool, option(False, "Print a summary as JSON on stdout")),
    ],
    namespace={
        "__doc__": """Compile the kernels of a training run before it begins.

    Give it the options that finetune will get. It finds out which kernels their steps launch, and
    compiles them in parallel into Triton's cache on disk. Whatever runs at these sizes on this GPU
    then starts at once. Needs a GPU, no files, and as much GPU memory as the training.
    """,
        "__module__": __name__,
    },
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Segment images with a fine-tuned adapter: one mask and one overlay each.

    A mask is 0 and 255. An adapter of several tasks gives a file for each task: 0 and 255 (binary),
    the class of each pixel (semantic), or the values (regression) in a float32 TIFF, of several
    channels in a .npy file. An adapter of single objects gives NAME_labels.tif, in which each
    object has the number of its prompt, from 1.
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
        "Folder for NAME_mask.png and NAME_overlay.png (several tasks: NAME_TASK.png and "
        "NAME_TASK_overlay.png); replaces files of these names",
    )
    stacks: bool = option(
        False,
        "Take each page of a TIFF, and each slice of a .npy array, as an image of its own. Write "
        "masks and labels of a stack as one TIFF with a page for each slice; tables and pictures "
        "are files of each slice, such as NAME.tif[0]_overlay.png. Objects are numbered in each "
        "slice anew, not linked across slices",
    )
    task: str | None = option(
        None, "Predict only this one of several tasks", metavar="NAME", hint="default: all"
    )
    checkpoint: Path | None = option(None, CHECKPOINT, hint=NOT_RANDOM)
    bands: str | None = option(
        None,
        "Bands of the image files to show, such as 4,3,2 or 1",
        metavar="N | R,G,B",
        hint="default: as in training",
    )
    range: str | None = option(
        None,
        "Values that become black and white in images of more than 8 bits",
        metavar="{auto,full} | LOW,HIGH",
        hint="default: as in training",
    )
    box: tuple[str, ...] = option(
        (),
        "Box in pixels of the image, for an adapter that was trained with boxes: once for all "
        "images, or once for each in their order; with an adapter of single objects and one image, "
        "once for each object",
        metavar="X0,Y0,X1,Y1",
        repeatable=True,
        hint="repeatable",
    )
    point: tuple[str, ...] = option(
        (),
        "Point on the object, in pixels of the image, for an adapter that was trained with points: "
        "as for --box",
        metavar="X,Y",
        repeatable=True,
        hint="repeatable",
    )
    boxes: Path | None = option(
        None,
        "CSV or JSON file of boxes for an adapter of single objects: lines image,x0,y0,x1,y1, or "
        "{image: [[x0, y0, x1, y1], ...]}; each is an object",
        hint="default: none",
    )
    points: Path | None = option(
        None,
        "The same of points: image,x,y[,label[,object]], label 1 on the object and 0 beside it; "
        "points of one object's number belong together",
        hint="default: none",
    )
    tile: int | None = option(
        None,
        "Side of the tiles in which to predict larger images, in their pixels; each becomes as "
        "large as the model's images; 0 for whole images",
        least=0,
        most=65535,
        hint="default: as in training",
    )
    overlap: int | None = option(
        None,
        "Pixels that tiles have in common at least, where their maps are blended",
        least=0,
        hint="default: as in training, or tile / 4",
    )
    instances: bool = option(
        False,
        "Number the objects: of an adapter that was trained with --masks instances, which does "
        "that anyway, or the connected parts of one mask",
    )
    automatic: bool = option(
        False,
        "Number the objects that segment_anything's automatic mask generator finds by a grid of "
        "points; for an adapter that was trained with points",
    )
    points_per_side: int | None = option(
        None,
        "Points of the grid along each side; only with --automatic",
        least=1,
        most=256,
        hint="default: 32",
    )
    pred_iou_thresh: float | None = option(
        None,
        "IoU that the model has to predict of a mask; only with --automatic",
        hint="default: 0.88",
    )
    stability_score_thresh: float | None = option(
        None,
        "Stability that a mask has to have when its cut-off moves; only with --automatic",
        hint="default: 0.95",
    )
    formats: tuple[str, ...] = option(
        ("labels",),
        "Files of numbered objects: a label image (labels), a table of places and areas (csv), "
        "outlines that QuPath and GIS open (geojson), all images in one COCO file (coco)",
        choices=("labels", "csv", "geojson", "coco"),
    )
    probabilities: bool = option(
        False,
        "Also write NAME_probability.tif: float32, the sigmoid of the foreground's logits. Classes "
        "get NAME_TASK_probability.tif: the softmax, a page for each class. Values above 0.5 are "
        "the mask's pixels. They are not calibrated",
    )
    min_size: int = option(0, "Leave out numbered objects of fewer pixels", least=0)
    batch_size: int = option(4, "Images in one forward pass", least=1)
    precision: str = option("auto", _PRECISION, choices=PRECISIONS)
    decoder_chunk: int | None = option(
        None, f"{_CHUNK} (an image is one object)", least=1, hint="default: all"
    )
    fuse: bool = option(True, _FUSE)
    backend: str = option("auto", _BACKEND, choices=BACKENDS)
    threads: int | None = option(None, _THREADS, least=1, most=4096, hint="default: torch's choice")
    json: bool = option(False, "Print a summary as JSON on stdout")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Score a fine-tuned adapter on images with their masks."""

    adapter: Path = option(..., ADAPTER)
    data: Path = option(
        ...,
        "Folder with images/ and masks/ (the tasks' folders), which are all scored; or with train/ "
        "and val/, whose val/ is scored",
    )
    mask_suffix: str | None = option(
        None,
        "Masks have their images' names with this after the stem, such as _mask; as in finetune",
        metavar="TEXT",
        hint="default: names are equal",
    )
    stacks: bool = option(
        False,
        "Score each page of a TIFF, and each slice of a .npy array, by itself; as in finetune",
    )
    task: str | None = option(
        None, "Score only this one of several tasks", metavar="NAME", hint="default: all"
    )
    checkpoint: Path | None = option(None, CHECKPOINT, hint=NOT_RANDOM)
    automatic: bool = option(
        False,
        "Score segment_anything's automatic mask generator, too, on whole images; for masks that "
        "number objects",
    )
    points_per_side: int | None = option(
        None,
        "Points of the grid along each side; only with --automatic",
        least=1,
        most=256,
        hint="default: 32",
    )
    pred_iou_thresh: float | None = option(
        None,
        "IoU that the model has to predict of a mask; only with --automatic",
        hint="default: 0.88",
    )
    stability_score_thresh: float | None = option(
        None,
        "Stability that a mask has to have when its cut-off moves; only with --automatic",
        hint="default: 0.95",
    )
    tile: int | None = option(
        None,
        "Side of the tiles in which to predict larger images, in their pixels; scores are of the "
        "whole images put together; 0 for whole images",
        least=0,
        most=65535,
        hint="default: as in training",
    )
    overlap: int | None = option(
        None,
        "Pixels that tiles have in common at least, where their maps are blended",
        least=0,
        hint="default: as in training, or tile / 4",
    )
    output: Path | None = option(
        None,
        "Folder for an overlay of every image, scores.csv and (of classes) classes.csv",
        hint="default: write none",
    )
    batch_size: int = option(4, "Images in one forward pass", least=1)
    precision: str = option("auto", _PRECISION, choices=PRECISIONS)
    decoder_chunk: int | None = option(
        None, f"{_CHUNK} (an image is one object)", least=1, hint="default: all"
    )
    fuse: bool = option(True, _FUSE)
    backend: str = option("auto", _BACKEND, choices=BACKENDS)
    threads: int | None = option(None, _THREADS, least=1, most=4096, hint="default: torch's choice")
    json: bool = option(False, "Print the scores as JSON on stdout")
