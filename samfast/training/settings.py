# SPDX-License-Identifier: Apache-2.0
"""The settings of fine-tuning, which are the command line's options.

Importing this does not load torch, so ``--help`` is quick.
"""

import dataclasses
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samfast.adapters.options import Option, option
from samfast.methods.registry import VARIANTS
from samfast.training.adapter_settings import EvaluateSettings as EvaluateSettings  # as before
from samfast.training.adapter_settings import PredictSettings as PredictSettings
from samfast.training.data_settings import DataSettings
from samfast.training.shared_options import BACKEND, CHUNK, FUSE, PRECISION, THREADS
from samfast.training.shared_options import BACKENDS as BACKENDS
from samfast.training.shared_options import PRECISIONS as PRECISIONS

METHODS = tuple(VARIANTS)
MODELS = ("vit_b", "vit_l", "vit_h", "vit_tiny", "sam3")
PROMPTS = ("none", "box", "point", "mixed")
OBJECTS = 8  # of each image and pass
GRAPH = ("off", "on")
AUGMENT = ("none", "light", "strong")
SCHEDULES = ("cosine", "polynomial", "constant")
MEMORY = ("fast", "balanced", "minimal")
BASE_DTYPES = ("auto", "float32", "bfloat16", "float16")
LOSSES = ("bce-dice", "structure", "structure-weighted", "balanced-bce")
TASK_LOSSES = {  # of each kind of task, the first unless told otherwise
    "binary": LOSSES,
    "semantic": ("cross-entropy",),
    "regression": ("l1", "cosine"),
}
RANDOM_LR = 1e-3  # from random weights, whatever the method
STEPS_PER_EPOCH = 50  # the least, where the settings leave the number of repeats open


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
    precision: str = option("auto", PRECISION, choices=PRECISIONS)
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
        f"{CHUNK} (without object prompts, one per image); backward recomputes each chunk",
        least=1,
        hint="default: all",
    )
    cache: bool = option(
        True,
        "Compute each image's embedding once and keep it in main memory. Only with --method "
        "decoder and without --tasks; for training images also needs --no-flips and --augment none",
    )
    fuse: bool = option(True, FUSE)
    graph: str = option(
        "off",
        "Replay the fused encoder's training steps as CUDA graphs (torch.compile); needs one CUDA "
        "device. Untested on a GPU",
        choices=GRAPH,
    )
    backend: str = option("auto", BACKEND, choices=BACKENDS)
    threads: int | None = option(None, THREADS, least=1, most=4096, hint="default: torch's choice")

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
