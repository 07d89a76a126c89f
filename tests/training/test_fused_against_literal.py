# SPDX-License-Identifier: Apache-2.0
"""Long trainings: fused and literal end as near as two literal ones that round differently.

Fused: as ``finetune`` trains, with the backend that it takes by itself. Literal: the same adapters
on the reference backend, in segment_anything's own blocks.

The control is a literal training in whose encoder operations add up in another order, and round
half of their bfloat16 results up or down by chance (``Reordered``, as in the tests' error budget).
The formulas and their precision are the literal ones at every step, so another library might have
made it. Whatever fusing leaves alone, decoder and loss and optimizer, rounds alike in all of them,
and so do start, batches and the gate's noise. Several controls are drawn and the one that ends
farthest counts: that is what luck in rounding makes of a literal training.
"""

import contextlib
import dataclasses
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import rectangle
from PIL import Image
from segment_anything.modeling.image_encoder import Block
from torch.utils.data import DataLoader

import samfast
from samfast.adapters.trained import trained_tensors
from samfast.kernels._common.reordered import Reordered
from samfast.methods.registry import VARIANTS
from samfast.modules import SamBlock
from samfast.training.build import attach_method, build_base
from samfast.training.data import EpochSampler
from samfast.training.loop import seed_everything
from samfast.training.many_tasks import ManyTasks
from samfast.training.one_mask import OneMask
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.recipe import with_recipe
from samfast.training.settings import FinetuneSettings

STEPS = 64
CONTROLS = 8
CPU = torch.device("cpu")
TASKS = """
tasks:
  - {name: mask, foreground: [1]}
  - {name: depth, kind: regression, folder: depth, scale: 0.1}
"""


class Training(NamedTuple):
    """The losses of all steps, and the trained tensors at the end, one after another."""

    losses: np.ndarray
    tensors: torch.Tensor


class Gap(NamedTuple):
    """How far two trainings end from each other.

    tensors: their distance over the length of one of them   losses: the largest difference
    """

    tensors: float
    losses: float


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six pictures of a rectangle with masks, classes and depths, and their tasks.yaml."""
    folder = tmp_path_factory.mktemp("literal")
    for kind in ("images", "masks", "depth"):
        (folder / kind).mkdir()
    for i in range(6):
        image, mask = rectangle(i, 48 + 4 * i, 64)
        Image.fromarray(image).save(folder / "images" / f"p{i}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"p{i}.png")
        depth = np.where(mask, np.float32(10), np.float32(30))
        Image.fromarray(depth).save(folder / "depth" / f"p{i}.tif")
    (folder / "tasks.yaml").write_text(TASKS)
    return folder


def settings_for(data: Path, method: str, precision: str, base: str) -> FinetuneSettings:
    variant = VARIANTS[method]
    options = {"dropout": 0.0} if "dropout" in {o.name for o in variant.options()} else {}
    tasks = data / "tasks.yaml" if variant.needs_tasks else None
    return with_recipe(
        FinetuneSettings(
            data=data,
            tasks=tasks,
            model="vit_tiny",
            image_size=64,
            method=method,
            precision=precision,
            base_dtype=base,
            **options,
        )
    )


class Cut:
    """Takes a step's graph apart at the image embeddings, and enters ``around`` on their side."""

    def __init__(self, sam: torch.nn.Module, around):
        self.around = contextlib.nullcontext() if around is None else around
        self.forward = sam.image_encoder.forward
        sam.image_encoder.forward = self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with self.around:
            self.made = self.forward(x)
        self.given = self.made.detach().requires_grad_(self.made.requires_grad)
        return self.given

    def backward(self, loss: torch.Tensor, aux: torch.Tensor) -> None:
        """The gradients of loss + aux; aux: what the encoder's adapters add."""
        loss.backward()
        pairs = [(self.made, self.given.grad), (aux, None)]
        pairs = [pair for pair in pairs if pair[0].requires_grad]
        if pairs:
            with self.around:
                torch.autograd.backward(*zip(*pairs, strict=True))


def train(settings: FinetuneSettings, steps: int, around=None) -> Training:
    """That many steps of what ``finetune`` trains; around: a context that the encoder runs in."""
    goal = (OneMask if settings.tasks is None else ManyTasks)(settings)
    dtype = autocast_dtype(settings.precision, CPU)
    sam = build_base(settings, goal.tasks)
    seed_everything(settings.seed)
    attach_method(sam, settings, base_dtype(settings.base_dtype, dtype, CPU))
    kinds = {type(block) for block in sam.image_encoder.blocks}
    assert kinds == {SamBlock if settings.fuse else Block}
    images, collate = goal.training_data(settings.image_size)
    repeats = math.ceil(settings.batch_size * steps / len(images))
    sampler = EpochSampler(len(images), settings.seed, repeats)
    loader = DataLoader(images, settings.batch_size, sampler=sampler, collate_fn=collate)
    groups = samfast.parameter_groups(
        sam, settings.lr, settings.weight_decay, relation_lr=settings.relation_lr
    )
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    parameters = [parameter for _, parameter in samfast.trainable_parameters(sam)]
    model, cut = goal.segmenter(sam, dtype).train(), Cut(sam, around)
    losses = []
    torch.manual_seed(settings.seed)
    for batch in itertools.islice(loader, steps):
        loss, aux = goal.loss(model, batch), samfast.aux_loss(sam)
        cut.backward(loss, aux)
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(term.item() for term in (loss, aux)))
    tensors = trained_tensors(sam)
    flat = [tensors[name].double().flatten() for name in sorted(tensors)]
    return Training(np.array(losses), torch.cat(flat))


def gap(one: Training, other: Training) -> Gap:
    tensors = (one.tensors - other.tensors).norm() / other.tensors.norm()
    return Gap(tensors.item(), np.abs(one.losses - other.losses).max().item())


class Literal:
    """A literal training, and as many controls of it as someone asks for."""

    def __init__(self, settings: FinetuneSettings, steps: int):
        self.settings = dataclasses.replace(settings, fuse=False)
        self.steps = steps
        self.plain = self._train()

    def control(self, seed: int) -> Gap:
        """The gap between the training and one with other roundings."""
        return gap(self._train(Reordered(seed)), self.plain)

    def _train(self, around=None) -> Training:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SAMFAST_BACKEND", "reference")
            return train(self.settings, self.steps, around)


def check_gap(settings: FinetuneSettings, steps: int) -> None:
    """Assert the rule of this file; draws controls until the gap is within them, or all."""
    literal = Literal(settings, steps)
    assert literal.plain.losses[-1] < literal.plain.losses[0]
    found = gap(train(settings, steps), literal.plain)
    controls = []
    for seed in range(1, CONTROLS + 1):
        controls.append(literal.control(seed))
        allowed = Gap(*(2 * max(one) for one in zip(*controls, strict=True)))
        if all(mine <= most for mine, most in zip(found, allowed, strict=True)):
            return
    raise AssertionError(f"{found} is above twice that of {CONTROLS} controls, {allowed}")


@pytest.mark.slow_on_cpu
def test_a_few_steps_of_lora(data):
    check_gap(settings_for(data, "lora", "fp32", "float32"), 4)


@pytest.mark.slow
@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize(
    ("precision", "base"), [("fp32", "float32"), ("bf16", "float32"), ("bf16", "bfloat16")]
)
def test_long_trainings_end_as_near_as_literal_ones(data, method, precision, base):
    settings = settings_for(data, method, precision, base)
    check_gap(settings, STEPS)
