# SPDX-License-Identifier: Apache-2.0
"""The model card of a run's adapter: data, scores, settings and versions, as the run has them."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samfast.files.format import CONFIG
from samfast.files.model_card import (
    CARD,
    NO_LICENSE,
    UNKNOWN,
    base_model,
    card,
    section,
    table,
    text_of,
)
from samfast.models.sam3_folder import NAME as SAM3
from samfast.training.goal import Goal
from samfast.training.recipe import with_recipe
from samfast.training.resume import OF_NO_EFFECT
from samfast.training.run_record import versions
from samfast.training.settings import FinetuneSettings

DATA = "Data"  # from this section on, a card is about the training, whatever the file it is in
_SAID = {"data", "model", "checkpoint", "random_init", "seed", "license", "method"}  # elsewhere
_PROMPTS = {
    "box": ("a box", " --box 40,25,310,200"),
    "point": ("a point", " --point 175,112"),
    "mixed": ("a box or a point", " --box 40,25,310,200"),
}


def files_with_card(
    settings: FinetuneSettings,
    goal: Goal,
    row: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    trained: int,
    classes: Sequence[Mapping[str, Any]] = (),
) -> dict[str, bytes]:
    """The files of an epoch's adapter and its README.md, as a folder for the Hub.

    row: the epoch's line of the table   trained: parameters   classes: as in ``Scored``
    """
    config = json.loads(files[CONFIG])
    in_peft = "peft_type" in config
    base = (config["auto_mapping"]["samfast"] if in_peft else config)["base"]
    named = base_model(settings.checkpoint)
    front = {
        "library_name": "peft" if in_peft else "samfast",
        "base_model": named,
        "base_model_relation": named and "adapter",
        "license": settings.license or UNKNOWN,
        "pipeline_tag": _pipeline_tag(settings.prompt, goal),
        "tags": ["samfast", family(settings.model), settings.method],
    }
    text = card(
        front,
        f"{settings.method} for {settings.model} on {_data_name(settings)}",
        [
            _about(settings, base, trained),
            _use(settings, base, in_peft),
            section(DATA, *_data(goal)),
            section("Scores on the validation images", *_scores(goal, row, classes)),
            section("Training", *_training(settings, row)),
            section("Versions", ", ".join(f"{k} {v}" for k, v in versions().items() if v)),
        ],
    )
    return {CARD: text, **files}


def family(model: str) -> str:
    """The tag of a model's family."""
    return "sam3" if model == SAM3 else "segment-anything"


def _pipeline_tag(prompt: str, goal: Goal) -> str | None:
    """The Hub's name of what the model does; None for values, which are no segmentation."""
    if prompt != "none":
        return "mask-generation"
    kinds = {task.kind for task in goal.tasks or ()}
    return None if kinds == {"regression"} else "image-segmentation"


def _data_name(settings: FinetuneSettings) -> str:
    """The data folder's name without its place."""
    return "a dataset" if settings.data is None else Path(settings.data).resolve().name


def weights_text(base: Mapping[str, Any]) -> str:
    """Where the frozen weights come from."""
    if base.get("checkpoint") is not None:
        return f"the weights of {text_of(base['checkpoint'])}"
    return f"random weights (seed {base.get('seed')})"


def _about(settings: FinetuneSettings, base: Mapping[str, Any], trained: int) -> str:
    about = (
        f"Adapter for the Segment Anything model {settings.model} with {weights_text(base)}, "
        f"trained by samfast: {trained:,} trained parameters, images of {base['image_size']} "
        "pixels on the longest side."
    )
    return about if settings.license else f"{about}\n\n{NO_LICENSE}"


def _use(settings: FinetuneSettings, base: Mapping[str, Any], in_peft: bool) -> str:
    weights = base.get("checkpoint")
    checkpoint = "" if weights is None else f" --checkpoint {shlex.quote(weights)}"
    prompt, example = _PROMPTS.get(settings.prompt, (None, ""))
    needs = f"It was trained with prompts, and needs {prompt} to predict." if prompt else ""
    peft = "PEFT reads this folder too, as LoRA." if in_peft else ""
    code = f"```sh\nsamfast predict --adapter FOLDER{checkpoint}{example} photo.png\n```"
    given = "" if weights is None else f", {json.dumps(weights)}"
    python = f'```python\nimport samfast\n\nmodel = samfast.load_adapted("FOLDER"{given})\n```'
    return section("Use", "`FOLDER` is a copy of this folder.", code, python, needs, peft)


def _data(goal: Goal) -> list[str]:
    facts = goal.facts()
    parts = ("train", "val")
    rows = [("images", *(len(getattr(goal.split, part)) for part in parts))]
    views = [len(goal.views(part)) for part in parts]
    if views != list(rows[0][1:]):
        rows.append(("tiles", *views))
    if facts.objects is not None:
        rows.append(("objects", *facts.objects))
    return [table(("", "training", "validation"), rows)]


def _scores(goal: Goal, row: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> list[str]:
    facts = goal.facts()
    columns = ("score", "adapter", *([facts.baseline] if facts.baselines else []))
    rows = [
        (name, row[name], *([facts.baselines.get(name)] if facts.baselines else []))
        for name in goal.columns
    ]
    parts = [
        f"Epoch {row['epoch']}. The best epoch is the one with the largest `{goal.score}` on these "
        "same images, so the scores are not those of unseen data.",
        table(columns, rows),
    ]
    if classes:
        own = [(c["task"], c["class"], c["name"], c["pixels"], c["iou"]) for c in classes]
        parts.append(table(("task", "class", "name", "pixels in the masks", "IoU"), own))
    return parts


def _training(settings: FinetuneSettings, row: Mapping[str, Any]) -> list[str]:
    seed = f"Seed {settings.seed}; {row['step']} optimizer steps up to this epoch."
    rows = list(_changed(settings).items())
    if not rows:
        return [seed, "All other settings are the defaults."]
    return [seed, "Settings that differ from the defaults:", table(("setting", "value"), rows)]


def _changed(settings: FinetuneSettings) -> dict[str, Any]:
    """The settings that training depends on and that are not the method's own defaults.

    Of paths only the last part, for a card may be published.
    """
    told = FinetuneSettings(
        model=settings.model, method=settings.method, checkpoint=settings.checkpoint
    )
    usual = dataclasses.asdict(with_recipe(told))
    found = {}
    for name, value in dataclasses.asdict(settings).items():
        if name in OF_NO_EFFECT | _SAID or value == usual[name]:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        found[name] = ", ".join(v.name if isinstance(v, Path) else str(v) for v in values)
    return found
