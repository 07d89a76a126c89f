# SPDX-License-Identifier: Apache-2.0
"""What training takes where the settings leave it open, and the method that they name."""

import dataclasses
from collections.abc import Sequence

import samfast
from samfast.models import Task
from samfast.models.architectures import architecture
from samfast.modules.methods import METHODS as KINDS
from samfast.modules.methods import Method
from samfast.training.settings import FinetuneSettings

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
OPTIONS = {
    "lora": ("rank", "alpha", "dropout", "target", "slices"),
    "conv-lora": ("rank", "alpha", "dropout", "target", "experts", "depthwise"),
    "cobot-lora": ("rank", "zero_start"),
    "adaptformer": ("bottleneck", "dropout", "target"),
    "cobot-adaptformer": ("bottleneck", "dropout", "target"),
    "kronecker": ("rank", "alpha", "dropout", "target", "kron_n"),
    "ta-lora": ("rank", "dropout", "orthogonality"),
    "decoder": (),
}
LACKS = {  # in place of "has none"
    ("conv-lora", "slices"): "adapts whole layers",
    ("cobot-lora", "target"): "adapts q and v of every block",
    ("ta-lora", "target"): "adapts q, k and v of every block",
}
RELATED = ("cobot-lora", "cobot-adaptformer", "ta-lora")
_CORE_SHARE = 0.05  # TA-LoRA's core beside the rest; see TaskLoraLinear.relation_parameters
BOX_JITTER_SHARE = 50  # of the image's side: 20 pixels of 1024, as many as in SAM's own training


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


def method_of(settings: FinetuneSettings, tasks: Sequence[Task] | None = None) -> Method:
    """What the settings attach; ValueError when an option of it is wrong."""
    settings = with_recipe(settings)
    if settings.method == "decoder":
        return samfast.DecoderOnly()
    options = {name: getattr(settings, name) for name in OPTIONS[settings.method]}
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
