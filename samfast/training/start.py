# SPDX-License-Identifier: Apache-2.0
"""From settings to a model that can be trained: checks, base model, method, precision."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn

import samfast
from samfast import backends
from samfast.adapters.method import Method
from samfast.integrations import segment_anything
from samfast.methods.attach import find_layers
from samfast.methods.kronecker.method import Kronecker
from samfast.methods.registry import METHODS as KINDS
from samfast.models import (
    TRAINED_DECODER,
    MultiTaskSam,
    Task,
    binary_head,
    build_sam,
    image_size,
    segment,
)
from samfast.models.architectures import architecture
from samfast.training.data import padded_images, valid_region
from samfast.training.foreground import chosen_foreground
from samfast.training.image_options import image_options
from samfast.training.settings import (
    BASE_DTYPES,
    LOSSES,
    MEMORY,
    METHODS,
    PRECISIONS,
    PROMPTS,
    SCHEDULES,
    FinetuneSettings,
    PredictSettings,
)

# What each method takes where the settings leave it open. Conv-LoRA's are the authors'.
_TRAINING = {"schedule": "cosine", "loss": "bce-dice"}
_LORA = {**_TRAINING, "rank": 4, "dropout": 0.0, "target": ("qkv",)}
_ADAPTFORMER = {**_TRAINING, "bottleneck": 16, "dropout": 0.1, "target": ("mlp",)}
_RECIPES = {
    "lora": _LORA,
    "conv-lora": {
        **_LORA,
        "rank": 3,
        "alpha": 32.0,
        "experts": 8,
        "schedule": "polynomial",
        "loss": "structure",
    },
    "cobot-lora": {**_TRAINING, "rank": 4},
    "adaptformer": _ADAPTFORMER,
    "cobot-adaptformer": _ADAPTFORMER,
    "kronecker": {**_LORA, "kron_n": 4, "rank": 1, "target": ("qkv", "proj")},
    "ta-lora": {**_TRAINING, "rank": 32, "dropout": 0.1, "orthogonality": 0.0},
    "decoder": _TRAINING,
}
TASK_RANK = 4  # the third of TA-LoRA's ranks, which --rank leaves alone
# The options that are some methods' alone, and which of them a method has.
_OPTIONS = {
    "lora": ("rank", "alpha", "dropout", "target", "slices"),
    "conv-lora": ("rank", "alpha", "dropout", "target", "experts", "depthwise"),
    "cobot-lora": ("rank", "zero_start"),
    "adaptformer": ("bottleneck", "dropout", "target"),
    "cobot-adaptformer": ("bottleneck", "dropout", "target"),
    "kronecker": ("rank", "alpha", "dropout", "target", "kron_n"),
    "ta-lora": ("rank", "dropout", "orthogonality"),
    "decoder": (),
}
_LACKS = {  # in place of "has none"
    ("conv-lora", "slices"): "adapts whole layers",
    ("cobot-lora", "target"): "adapts q and v of every block",
    ("ta-lora", "target"): "adapts q, k and v of every block",
}
_RELATED = ("cobot-lora", "cobot-adaptformer", "ta-lora")
_CORE_SHARE = 0.05  # TA-LoRA's core beside the rest; see TaskLoraLinear.relation_parameters
_PRECISION_OF = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BOX_JITTER_SHARE = 50  # of the image's side: 20 pixels of 1024, as many as in SAM's own training
HEAD_DIM = 64  # of a try-out; SAM's are 64 and 80


class Segmenter(nn.Module):
    """Binary segmentation: padded images in, one map of logits out, prompted by a box or nothing.

    images (B, 3, S, S) uint8, sizes int64 (B, 2), boxes None or float32 (B, 4) -> logits float32
    (B, S, S), valid bool (B, S, S). The map is that of SAM's first mask token, the one for a single
    mask, with boxes and without. Runs under autocast of ``dtype`` unless that is float32;
    decoder_chunk as in ``segment``.
    """

    def __init__(
        self,
        sam: nn.Module,
        dtype: torch.dtype = torch.float32,
        decoder_chunk: int | None = None,
    ):
        super().__init__()
        self.sam = sam
        self.dtype = dtype
        self.decoder_chunk = decoder_chunk

    def forward(
        self, images: Tensor, sizes: Tensor, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        valid = valid_region(sizes, image_size(self.sam))
        images = padded_images(images, valid, self.sam.pixel_mean)
        lower = self.dtype != torch.float32
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=lower):
            logits = segment(self.sam, images, boxes, decoder_chunk=self.decoder_chunk)
        return logits[:, 0].float(), valid


def _check_known(settings: FinetuneSettings | PredictSettings, **known: tuple[str, ...]) -> None:
    for name, names in known.items():
        value = getattr(settings, name)
        if value not in names:
            raise ValueError(f"unknown {name} {value!r}; known are {', '.join(names)}")


def _check_smallest(settings: FinetuneSettings | PredictSettings, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (value >= least and isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_prediction(settings: PredictSettings) -> None:
    """``check_settings`` for prediction."""
    _check_known(settings, precision=PRECISIONS, backend=backends.NAMES)
    _check_smallest(settings, 1, "batch_size", "decoder_chunk", "threads")
    image_options(getattr(settings, "bands", None), getattr(settings, "range", None))


def check_settings(settings: FinetuneSettings) -> None:
    """Raise ValueError for an option that no data or model can make right."""
    architecture(settings.model)
    _check_known(settings, method=METHODS, precision=PRECISIONS, backend=backends.NAMES)
    _check_known(settings, base_dtype=BASE_DTYPES, prompt=PROMPTS)
    for name, known in (("schedule", SCHEDULES), ("loss", LOSSES), ("memory", MEMORY)):
        if getattr(settings, name) is not None:
            _check_known(settings, **{name: known})
    _check_method_options(settings)
    if settings.memory is not None and not settings.fuse:
        raise ValueError(
            f"memory is {settings.memory}, which only the fused encoder has; leave out --no-fuse"
        )
    if settings.prompt != "box" and settings.box_jitter is not None:
        raise ValueError(
            f"box_jitter is {settings.box_jitter}, but prompt {settings.prompt} has no box"
        )
    _check_tasks(settings)
    chosen_foreground(settings.foreground, settings.threshold)
    image_options(settings.bands, settings.range)
    if settings.data is None and not settings.dry_run:
        raise ValueError("no data folder is named; give it with --data")
    _check_smallest(settings, 1, "epochs", "repeats", "batch_size", "accumulate", "threads")
    _check_smallest(settings, 1, "decoder_chunk", "kron_n")
    _check_smallest(settings, 0, "workers", "overlays", "weight_decay", "clip", "seed")
    _check_smallest(settings, 0, "box_jitter")
    side = settings.image_size or architecture(settings.model).image_size
    if settings.box_jitter is not None and settings.box_jitter > side:
        raise ValueError(
            f"box_jitter is {settings.box_jitter}; it must be at most {side}, the image's side"
        )
    for name in ("lr", "relation_lr"):
        rate = getattr(settings, name)
        if rate is not None and not (rate > 0 and isfinite(rate)):
            raise ValueError(f"{name} is {rate}; it must be above 0")
    if not 0.0 < settings.val_fraction < 1.0:
        raise ValueError(f"val_fraction is {settings.val_fraction}; it must lie between 0 and 1")


def _check_tasks(settings: FinetuneSettings) -> None:
    """Raise ValueError for what goes with several tasks only, or not at all."""
    if settings.tasks is None:
        if settings.method == "ta-lora":
            raise ValueError("method ta-lora is for several tasks; name their file with --tasks")
        return
    if settings.prompt != "none":
        raise ValueError(f"prompt is {settings.prompt}, but several tasks have no prompts")
    for name in ("loss", "foreground", "threshold"):
        if getattr(settings, name) is not None:
            raise ValueError(
                f"{name} is an option of one mask; with several tasks it is a key of each task in "
                f"{settings.tasks}"
            )


def _check_method_options(settings: FinetuneSettings) -> None:
    """Raise ValueError for an option of another method."""
    method = settings.method
    has = (*_OPTIONS[method], *(("relation_lr",) if method in _RELATED else ()))
    for name in dict.fromkeys(("relation_lr", *(n for own in _OPTIONS.values() for n in own))):
        value = getattr(settings, name)
        if name in has or value is None or value is False:
            continue
        given = f"{name} is {value}"
        if isinstance(value, tuple):
            given = f"{name} {'are' if name == 'slices' else 'is'} {', '.join(value)}"
        lacks = "has no adapters" if method == "decoder" else "has none"
        raise ValueError(f"{given}, but method {method} {_LACKS.get((method, name), lacks)}")


def with_recipe(settings: FinetuneSettings) -> FinetuneSettings:
    """The settings with what they leave open as their method's recipe has it."""
    recipe = dict(_RECIPES[settings.method])
    trained = settings.checkpoint is not None
    recipe["lr"] = (1e-4 if settings.method == "conv-lora" else 2e-4) if trained else 1e-3
    if settings.method == "ta-lora":
        recipe["relation_lr"] = _CORE_SHARE * (settings.lr or recipe["lr"])
    if settings.prompt == "box":
        side = settings.image_size or architecture(settings.model).image_size
        recipe["box_jitter"] = float(round(side / BOX_JITTER_SHARE))
    open_ = {name: value for name, value in recipe.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, **open_)


def build_base(settings: FinetuneSettings, tasks: Sequence[Task] | None = None) -> nn.Module:
    """The SAM the settings name, on the CPU; of several tasks a MultiTaskSam."""
    sam = build_sam(
        settings.model,
        checkpoint=settings.checkpoint,
        image_size=settings.image_size,
        random_init=settings.random_init,
        seed=settings.seed,
    )
    return for_tasks(sam, tasks)


def for_tasks(sam: nn.Module, tasks: Sequence[Task] | None) -> nn.Module:
    """The sam itself where no tasks are named."""
    return sam if tasks is None else MultiTaskSam(sam, tasks)


def attach_method(
    sam: nn.Module, settings: FinetuneSettings, base_dtype: torch.dtype | None = None
) -> nn.Module:
    """Freeze the model, add the settings' adapters, leave the mask decoder to be trained; fuse."""
    method = method_of(settings, getattr(sam, "tasks", None))
    train = TRAINED_DECODER
    if isinstance(sam, MultiTaskSam):
        train = sam.trained_parts()
    elif settings.method == "conv-lora":
        binary_head(sam)
    if isinstance(method, Kronecker):
        _check_kron_n(sam, method)
    samfast.attach(sam, method, train=train, base_dtype=base_dtype)
    return samfast.fuse(sam, memory=settings.memory or MEMORY[0]) if settings.fuse else sam


def _check_kron_n(sam: nn.Module, method: Kronecker) -> None:
    """Raise ValueError, by the option's name, for a layer that has no n · n equal parts."""
    for name, layer in find_layers(sam, dataclasses.replace(method, n=1)).items():
        for size, what in ((layer.in_features, "inputs"), (layer.out_features, "outputs")):
            if size % method.n:
                raise ValueError(
                    f"kron_n is {method.n}, which does not divide the {size} {what} of {name}"
                )


def method_of(settings: FinetuneSettings, tasks: Sequence[Task] | None = None) -> Method:
    """What the settings attach; ValueError when an option of it is wrong."""
    settings = with_recipe(settings)
    if settings.method == "decoder":
        return samfast.DecoderOnly()
    options = {name: getattr(settings, name) for name in _OPTIONS[settings.method]}
    if len(options.get("target", ())) == 1:
        options["target"] = options["target"][0]
    if settings.method == "cobot-adaptformer":
        return samfast.AdaptFormer(cobot=True, **options)
    if settings.method == "kronecker":
        options["n"] = options.pop("kron_n")
    if settings.method == "ta-lora":
        rank = options.pop("rank")
        options["ranks"] = (rank, rank, TASK_RANK)
        options["tasks"] = tuple(task.name for task in tasks)
    return KINDS[settings.method](**options)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What ``auto``, ``bf16``, ``fp16`` or ``fp32`` means on this device."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
    gpu = device.type == "cuda"
    if precision == "auto" and gpu:
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "fp16" and not gpu:
        raise ValueError(f"precision fp16 needs a CUDA device, but this one is {device.type}")
    names = {name: dtype for dtype, name in _PRECISION_OF.items()}
    return names.get(precision, torch.float32)


def base_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """What the frozen encoder is cast to; None leaves it float32, as it was read.

    name: one of BASE_DTYPES   dtype: what products are computed in   device: that computes them
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else None
    base, precision = getattr(torch, name), _PRECISION_OF[dtype]
    if base == torch.bfloat16 and dtype == torch.float16:
        raise ValueError("base dtype bfloat16 does not go with precision fp16; bf16 and fp32 do")
    if base == torch.float16 and dtype != torch.float16:
        raise ValueError(
            f"base dtype float16 needs precision fp16 and its loss scaling, not {precision}"
        )
    return None if base == torch.float32 else base


@contextmanager
def backend_asked_for(
    backend: str, method: Method, fuse: bool, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """Every operation inside runs on ``backend``; ValueError at once when one of them cannot.

    They are tried on tiny layers, so that it fails before the data is read.
    """
    backend = backends.requested(backend)  # SAMFAST_BACKEND in place of auto
    if backend == "auto":
        yield
        return
    before = os.environ.get("SAMFAST_BACKEND")
    os.environ["SAMFAST_BACKEND"] = backend
    try:
        try:
            _try_out(method, fuse, device, dtype)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        yield
    finally:
        if before is None:
            del os.environ["SAMFAST_BACKEND"]
        else:
            os.environ["SAMFAST_BACKEND"] = before


def _try_out(method: Method, fuse: bool, device: torch.device, dtype: torch.dtype) -> None:
    """One forward and backward of the smallest layers that the method's options fit; their random
    numbers are none of the run's."""
    with torch.random.fork_rng():
        _run_smallest_layers(method, fuse, device, dtype)


def _run_smallest_layers(
    method: Method, fuse: bool, device: torch.device, dtype: torch.dtype
) -> None:
    layers = []
    modules = segment_anything.load().modeling.image_encoder
    if not isinstance(method, samfast.DecoderOnly):
        layer, width = _smallest_layer(method, modules.MLPBlock)
        layers.append((method.build({"layer": layer.to(device)})["layer"], width))
    if fuse:
        block = modules.Block(HEAD_DIM, 1, use_rel_pos=True, input_size=(2, 2))
        layers.append((samfast.fuse(block).to(device), HEAD_DIM))
    for layer, width in layers:
        x = torch.zeros(1, 2, 2, width, device=device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            layer(x).sum().backward()


def _smallest_layer(method: Method, mlp: type[nn.Module]) -> tuple[nn.Module, int]:
    """A layer that the method can adapt, and its number of inputs."""
    if isinstance(method, samfast.AdaptFormer):
        width = max(16, method.bottleneck)
        return mlp(width, width), width
    rank = max(method.ranks) if hasattr(method, "ranks") else method.rank
    width = max(16, rank) * getattr(method, "n", 1)
    return nn.Linear(width, 3 * width), width


def output_folder(settings: FinetuneSettings) -> Path:
    """Where the results go; ValueError when something is there already."""
    method = f"{settings.method}-depthwise" if settings.depthwise else settings.method
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
