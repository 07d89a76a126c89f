# SPDX-License-Identifier: Apache-2.0
"""Single objects by prompts: their loss against segment_anything's loop, and whole runs."""

import csv

import numpy as np
import pytest
import torch
from budgets import all_within_budget
from objects_folder import fill_with_objects
from PIL import Image
from stock_runs import double
from test_resume import ended, results

from samfast.models import build_sam
from samfast.training import loop
from samfast.training.checks import check_settings
from samfast.training.data import EpochSampler
from samfast.training.joined import JoinedBatches
from samfast.training.launched import ALONE, Launched
from samfast.training.loop import finetune
from samfast.training.losses import LOSSES
from samfast.training.prompted_objects import PromptedObjects
from samfast.training.recipe import with_recipe
from samfast.training.scored import Scored
from samfast.training.settings import FinetuneSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images with two objects each, but for one that has none."""
    return fill_with_objects(tmp_path_factory.mktemp("objects") / "data", empty=(0,))


def settings_of(folder, output=None, **options):
    given = {
        **{"data": folder, "output": output, "model": "vit_tiny", "image_size": 64},
        **{"masks": "instances", "prompt": "mixed", "val_fraction": 0.34, "overlays": 0},
        **{"epochs": 1, "repeats": 1, "lr": 1e-3},
        **options,
    }
    return with_recipe(FinetuneSettings(**given))


def goal_of(folder, **options):
    goal = PromptedObjects(settings_of(folder, **options))
    goal.check()
    return goal


@pytest.fixture(scope="module")
def small():
    """A Sam of two blocks, for images of 64 pixels."""
    sam = build_sam("vit_tiny", image_size=64, seed=3)
    sam.image_encoder.blocks = sam.image_encoder.blocks[1:3]
    return sam


def batch_of(goal, *keys):
    data, collate = goal.training_data(64)
    return collate([data[key] for key in keys])


def full_key(goal):
    """A training image with two objects."""
    return goal.there.index(2), 0


SCORES = ("val_miou", "val_miou_box", "val_miou_point")
GRADIENTS = (
    "image_encoder.pos_embed",
    "prompt_encoder.mask_downscaling.0.weight",
    "prompt_encoder.point_embeddings.1.weight",
    "mask_decoder.mask_tokens.weight",
)


def with_gradients(sam, loss):
    sam.zero_grad()
    loss.backward()
    own = {name: sam.get_parameter(name).grad.clone() for name in GRADIENTS}
    return {"loss": loss.detach()[None], **own}


def literal(sam, batch, rounds):
    """One object and round after the other by segment_anything's prompt encoder and decoder."""
    (height, width), losses = batch.sizes[0].tolist(), []
    image = batch.images[0, :, :height, :width].float()
    embedding = sam.image_encoder(sam.preprocess(image)[None].to(sam.pixel_mean.dtype))
    for m, truth in enumerate(batch.masks[:, :height, :width]):
        given, low = batch.first.given[m].double(), None  # so that half a pixel more is exact
        is_box = bool(batch.first.is_box[m])
        points = [] if is_box else [given[:3]]
        for number in range(rounds):
            taken = torch.stack(points)[None] if points else None
            sparse, dense = sam.prompt_encoder(
                points=None if taken is None else (taken[..., :2], taken[..., 2]),
                boxes=given[None] if is_box else None,
                masks=low,
            )
            low, _ = sam.mask_decoder(
                image_embeddings=embedding,
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            logits = sam.postprocess_masks(low, (height, width), (height, width))[0]
            losses.append(LOSSES["bce-dice"](logits, truth[None]))
            wrong = ((logits[0] > 0) != truth).nonzero().tolist()
            if number + 1 < rounds:
                y, x = wrong[int(batch.draws[m, number] * len(wrong))]
                points.append(given.new_tensor([x, y, float(truth[y, x])]))
    return with_gradients(sam, sum(losses) / len(losses))


@pytest.mark.parametrize(
    ("dtype", "chunk"),
    [
        (torch.float32, None),
        pytest.param(torch.float64, None, marks=pytest.mark.slow),
        pytest.param(torch.float64, 1, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_a_literal_loop(folder, small, dtype, chunk):
    goal = goal_of(folder, prompt_rounds=2, decoder_chunk=chunk, seed=2)
    index, _ = full_key(goal)
    batches = (batch_of(goal, (index, number)) for number in range(20))
    batch = next(own for own in batches if own.first.is_box.tolist() == [True, False])
    assert batch.draws.shape == (2, 1)
    wide = double(small)
    own = small if dtype == torch.float32 else wide
    found = with_gradients(own, goal.loss(goal.segmenter(own, torch.float32), batch))

    def stock():
        return literal(own, batch, 2)

    def exact():
        return literal(wide, batch, 2)

    all_within_budget(found, stock, exact, dtype)


def test_chunks_change_nothing(folder, small):
    whole, parts = (goal_of(folder, prompt_rounds=2, decoder_chunk=chunk) for chunk in (None, 1))
    batch = batch_of(whole, full_key(whole))
    own = [
        with_gradients(small, goal.loss(goal.segmenter(small, torch.float32), batch))
        for goal in (whole, parts)
    ]
    wide = double(small)

    def run(sam):
        return lambda: with_gradients(sam, whole.loss(whole.segmenter(sam, torch.float32), batch))

    all_within_budget(own[1], run(small), run(wide), torch.float32)


def test_images_without_objects_teach_nothing(folder, small):
    """A batch of them has a loss of 0; beside others they change nothing."""
    goal = goal_of(folder, prompt="box")
    empty = goal.there.index(0), 0
    model = goal.segmenter(small, torch.float32)
    small.zero_grad()
    loss = goal.loss(model, batch_of(goal, empty))
    loss.backward()
    assert loss == 0
    for name in ("image_encoder.pos_embed", "mask_decoder.mask_tokens.weight"):
        assert not small.get_parameter(name).grad.any()
    assert goal.counts([empty[0]]) == [0]
    with torch.no_grad():
        alone = goal.loss(model, batch_of(goal, full_key(goal)))
        both = goal.loss(model, batch_of(goal, full_key(goal), empty))
    assert abs(alone - both) < 1e-5 * alone


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_make_means_over_all_objects_of_a_step(processes):
    """Sums of (mean of a part * its weight) are the mean over the objects of the whole step."""
    counts = [0, 2, 8, 1, 3, 0, 5]
    values = [np.random.default_rng(i).random(n) for i, n in enumerate(counts)]
    accumulate, size = 2, 2
    found: dict[int, float] = {}
    for rank in range(processes):
        place = Launched(rank, processes) if processes > 1 else ALONE
        joined = JoinedBatches(EpochSampler(7, seed=1), size, place)
        weights = joined.weights(lambda chosen: [sum(counts[i] for i in chosen)], accumulate)
        for number, (keys, own) in enumerate(zip(joined, weights, strict=True)):
            part = np.concatenate([values[i] for i, _ in keys])
            mean = part.mean() if len(part) else 0.0
            step = number // accumulate
            found[step] = found.get(step, 0) + own[1] * mean / accumulate / processes
    order = [i for i, _ in EpochSampler(7, seed=1)]
    whole = accumulate * size * processes
    for step, begin in enumerate(range(0, 7, whole)):
        own = np.concatenate([values[i] for i in order[begin : begin + whole]])
        assert found[step] == pytest.approx(own.mean(), rel=1e-12)


def gradients(monkeypatch, settings):
    """The gradients of each step; weights stay as they are."""
    found = []
    step = torch.optim.AdamW.step

    def stepping(self, *args):
        found.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stepping)
        patch.setattr(loop, "curves_png", lambda *_: b"")
        row = dict.fromkeys(("val_loss", *SCORES), 0.5)
        patch.setattr(PromptedObjects, "scores", lambda *_: Scored(row, []))
        finetune(settings)
    return found


@pytest.mark.slow_on_cpu
def test_accumulated_batches_give_the_mean_over_objects(folder, tmp_path, monkeypatch):
    """Four batches of one image, one of them without an object, are as one batch of four."""
    still = {"lr": 1e-30, "weight_decay": 0.0, "clip": 0.0, "method": "decoder", "cache": False}
    whole = settings_of(folder, tmp_path / "whole", batch_size=4, **still)
    parts = settings_of(folder, tmp_path / "parts", batch_size=1, accumulate=4, **still)
    (one,), (four,) = (gradients(monkeypatch, own) for own in (whole, parts))
    one, four = (torch.cat([gradient.flatten() for gradient in own]) for own in (one, four))
    norm = torch.linalg.vector_norm
    assert 0 < norm(one - four) <= 1e-5 * norm(one)  # other sums: the mean of means is far off


@pytest.mark.slow
def test_a_run_learns_which_object_is_meant(tmp_path):
    """Both discs together would score a mean IoU of about 0.45."""
    data = fill_with_objects(tmp_path / "data", 8)
    more = {"val_fraction": 0.25, "epochs": 3, "repeats": 20, "overlays": 1}
    finetune(settings_of(data, tmp_path / "out", prompt="box", **more))
    with (tmp_path / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["val_miou"]) > 0.6
    assert all(row["val_miou"] == row["val_miou_box"] for row in rows)
    with (tmp_path / "out" / "scores.csv").open() as file:
        images = list(csv.DictReader(file))
    assert list(images[0]) == ["image", "objects", "miou"]
    assert {row["objects"] for row in images} == {"2"}
    mean = sum(float(row["miou"]) for row in images) / len(images)
    best = max(float(row["val_miou"]) for row in rows)
    assert mean == pytest.approx(best, rel=1e-6)  # torchmetrics adds in float32
    overlay = Image.open(next((tmp_path / "out" / "overlays").glob("*.png")))
    assert overlay.width > 3 * 64


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run that nothing ends, with two rounds and no worker."""
    output = tmp_path_factory.mktemp("finished") / "out"
    settings = settings_of(folder, output, **SMALL)
    finetune(settings)
    return results(output)


SMALL = {
    **{"epochs": 2, "batch_size": 1, "accumulate": 2, "prompt_rounds": 2, "save_every": 1},
    **{"objects": 1, "overlays": 1, "val_fraction": 0.34},
}


@pytest.mark.slow_on_cpu
def test_workers_and_resuming_change_no_bit(folder, tmp_path, finished):
    ended(settings_of(folder, tmp_path / "out", workers=2, **SMALL), 1, 3)
    finetune(settings_of(folder, tmp_path / "out", workers=2, resume="newest", **SMALL))
    assert results(tmp_path / "out") == finished


ERRORS = [
    ({"masks": None}, "prompt is mixed, which is for prompted objects, but masks is binary; give"),
    ({"masks": None, "prompt": "box", "objects": 3}, "objects is 3, which is for prompted objects"),
    ({"prompt": "none", "prompt_rounds": 2}, "prompt_rounds is 2, which is for .* and prompt none"),
    ({"foreground": (3,)}, "foreground is an option for binary masks, but masks is instances"),
    ({"threshold": 2.0}, "threshold is an option for binary masks, but masks is instances"),
    ({"prompt_rounds": 0}, "prompt_rounds is 0; it must be at least 1"),
    ({"objects": 0}, "objects is 0; it must be at least 1"),
    ({"prompt": "point", "box_jitter": 2.0}, "box_jitter is 2.0, but prompt point has no box"),
    ({"model": "sam3", "image_size": None}, "sam3 learns one mask per image; leave out --masks"),
]


@pytest.mark.parametrize(("options", "pattern"), ERRORS)
def test_settings_that_do_not_fit_are_refused(tmp_path, options, pattern):
    given = {"model": "vit_tiny", "image_size": 64, "masks": "instances", "prompt": "mixed"}
    settings = FinetuneSettings(data=tmp_path, output=tmp_path / "out", **{**given, **options})
    with pytest.raises(ValueError, match=pattern):
        check_settings(settings)


def test_masks_that_hold_no_objects_are_refused(tmp_path):
    data = fill_with_objects(tmp_path / "data", 3)
    masks = sorted((data / "masks").iterdir())

    def refused(pattern, **options):
        with pytest.raises(ValueError, match=pattern):
            goal_of(data, **options)

    Image.fromarray(np.full((64, 64), 0.5, np.float32)).save(masks[0].with_suffix(".tif"))
    kept = masks[0].read_bytes()
    masks[0].unlink()
    refused(r"p0.tif holds floats of 32 bits; save labels as integers")
    masks[0].with_suffix(".tif").unlink()
    Image.fromarray(np.full((64, 64), -3, np.int32)).save(masks[0].with_suffix(".tif"))
    refused(r"p0.tif does not hold objects: labels hold -3; expected 0 for the background")
    masks[0].with_suffix(".tif").unlink()
    Image.fromarray(np.ones((64, 60), np.uint8)).save(masks[0])
    refused(r"p0.png is 60x64 \(width x height\) but image .*p0.png is 64x64")
    masks[0].write_bytes(kept)
    for path in masks:
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    refused(r"none of the training masks in .*masks holds an object \(a number above 0\)")
    one = np.zeros((64, 64), np.uint8)
    one[1, 1] = 5
    for path in masks:
        Image.fromarray(one).save(path)
    refused(r"no training object has a pixel left at 8 pixels; take a larger", image_size=8)


def test_a_dataset_has_binary_masks(folder, tmp_path):
    settings = settings_of(None, tmp_path / "out")
    with pytest.raises(ValueError, match="masks is instances, but a dataset has binary masks"):
        finetune(settings, [])
