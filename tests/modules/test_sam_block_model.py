# SPDX-License-Identifier: Apache-2.0
"""Fused blocks in whole encoders: numbers, dtypes, what they save, predictors, compile."""

import copy
import functools

import numpy as np
import pytest
import torch
from budgets import all_within_budget, keep
from sam_layers import random_tables
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from stock_runs import by_reference, double
from torch import nn
from torch.utils.checkpoint import checkpoint

import samfast
from samfast.counters import saved_bytes
from samfast.kernels._common.budget import Budget
from samfast.models import build_sam

pytestmark = pytest.mark.usefixtures("same_noise")
MODES = ("fast", "balanced", "minimal")
EVERYWHERE = ("qkv", "proj", "lin1", "lin2")
METHODS = {
    "lora": samfast.Lora(rank=2),
    "everywhere": samfast.Lora(rank=3, target=EVERYWHERE, dropout=0.2),
    "slices": samfast.Lora(rank=2, slices=("q", "v")),
    "conv-lora": samfast.ConvLora(rank=2, experts=3),
    "conv-lora, mlp": samfast.ConvLora(rank=2, experts=3, target=("lin1", "lin2")),
}
SIZE = 80  # a map of 5 x 5; windows of 4, of 7 and the whole map


@functools.cache
def _built():
    """Three blocks of a vit_tiny: padded windows, windows larger than the map, and the map."""
    sam = random_tables(build_sam("vit_tiny", image_size=SIZE, seed=0))
    blocks = sam.image_encoder.blocks
    sam.image_encoder.blocks = blocks[:3]
    blocks[0].window_size = 4
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in sam.image_encoder.blocks:
            layer.attn.qkv.weight *= 3
            nn.init.normal_(layer.attn.qkv.bias, std=0.5, generator=generator)
    return sam


def in_token_order(sam):
    """A fused block gives its map token by token, a stock one in the patch embedding's layout, on
    which the neck's convolutions round differently; the stock model is given the former too."""
    first = sam.image_encoder.blocks[0]
    first.register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))
    return sam


def attached(method, move, **options):
    """The same adapters at every call."""
    torch.manual_seed(8)
    return move(samfast.attach(copy.deepcopy(_built()), method, train=(), **options), std=0.1)


IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
DY = torch.randn(2, 256, 5, 5, generator=torch.Generator().manual_seed(2))


def run(sam, dtype=None, images=IMAGES, autocast=None, seed=4):
    """{"y", "aux", every trained parameter's gradient}, with the noise of that seed."""
    encoder = sam.image_encoder
    if dtype is not None:
        encoder = copy.deepcopy(sam).to(dtype).image_encoder
    torch.manual_seed(seed)
    images = images.to(encoder.patch_embed.proj.weight.dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = encoder(images)
    aux = samfast.aux_loss(encoder).to(torch.promote_types(y.dtype, torch.float32))
    named = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    for parameter in named.values():
        parameter.grad = None
    ((y.to(torch.promote_types(y.dtype, torch.float32)) * DY).sum() + 10 * aux).backward()
    grads = [parameter.grad for parameter in named.values()]
    return dict(zip(["y", "aux", *named], [y.detach(), aux.detach(), *grads], strict=True))


def same(ours, budget):
    assert set(ours) == set(budget.exact)
    keep(budget, ours)


@pytest.mark.slow_on_cpu("everywhere", "conv-lora, mlp")
@pytest.mark.slow_on_cpu(but=["everywhere", "conv-lora", "conv-lora, mlp"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_whole_encoder(method, move):
    """Against segment_anything's blocks with the same adapters and noise, float64 too.

    In training, but for dropout, which they draw for windows and their padding, in their order.
    """
    stock = in_token_order(attached(method, move)).train(method.dropout == 0)
    single, exact = (by_reference(run, stock, t) for t in (torch.float32, torch.float64))
    budgets = {torch.float32: Budget(single, exact, torch.float32)}
    budgets[torch.float64] = Budget(exact, exact, torch.float64)
    assert bool(exact()["aux"]) == isinstance(method, samfast.ConvLora)
    for memory in MODES:
        fused = samfast.fuse(copy.deepcopy(stock), memory)
        assert set(samfast.report(fused).blocks.values()) == {"fused"}
        for dtype, budget in budgets.items():
            same(run(fused, dtype), budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_whole_encoder_of_a_narrow_base(dtype, move):
    """attach(base_dtype=…): base and stream narrow, adapters and their gradients float32."""
    method = samfast.Lora(rank=2, target=EVERYWHERE)
    exact = by_reference(run, attached(method, move), torch.float64)
    stock = by_reference(run, in_token_order(attached(method, move, base_dtype=dtype)))
    fused = samfast.fuse(attached(method, move, base_dtype=dtype))
    assert set(samfast.report(fused).blocks.values()) == {"fused"}
    ours = run(fused)
    assert ours["y"].dtype == dtype
    assert all(ours[name].dtype == torch.float32 for name in ours if "lora" in name)
    same(ours, Budget(stock, exact, dtype))


@pytest.mark.parametrize("base", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_whole_encoder_under_autocast(base, move):
    method = samfast.Lora(rank=2, target=EVERYWHERE)
    exact = by_reference(run, attached(method, move), torch.float64)
    stock = in_token_order(attached(method, move, base_dtype=base))
    fused = samfast.fuse(attached(method, move, base_dtype=base))
    ours = run(fused, autocast=torch.bfloat16)
    budget = Budget(by_reference(run, stock, autocast=torch.bfloat16), exact, torch.bfloat16)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in budget.stock.items()}
    same(ours, budget)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_memory_modes_give_the_same_bits(method, move):
    """In training, noise and dropout drawn from one seed: every gradient and the aux loss."""
    fused = samfast.fuse(attached(method, move)).train()
    assert set(samfast.report(fused).blocks.values()) == {"fused"}
    expected = run(fused)
    for memory in MODES[1:]:
        actual = run(samfast.fuse(fused, memory))
        assert samfast.report(fused).memory == (memory,)
        for name, value in expected.items():
            assert torch.equal(value, actual[name]), (memory, name)


@pytest.mark.slow_on_cpu(
    "True-everywhere-fast", "True-conv-lora-balanced", "True-everywhere-minimal",
    "False-conv-lora-fast", "False-everywhere-balanced", "False-conv-lora-minimal",
)  # fmt: skip
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("method", ["everywhere", "conv-lora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_fused_blocks(reentrant, method, memory, move):
    fused = samfast.fuse(attached(METHODS[method], move), memory).train()
    expected = run(fused)
    for layer in fused.image_encoder.blocks:
        forward = functools.partial(type(layer).forward, layer)
        layer.forward = functools.partial(checkpoint, forward, use_reentrant=reentrant)
    actual = run(fused, images=IMAGES.clone().requires_grad_())
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


def test_blocks_below_the_first_adapter_build_no_graph(move):
    method = samfast.Lora(rank=2, target=r"image_encoder\.blocks\.1\.mlp\.lin2")
    fused = samfast.fuse(attached(method, move))
    seen = []
    for layer in fused.image_encoder.blocks:
        layer.register_forward_hook(lambda _, x, y: seen.append(y))
    fused.image_encoder(IMAGES).sum().backward()
    assert seen[0].grad_fn is None and not seen[0].requires_grad
    assert [type(y.grad_fn).__name__ for y in seen[1:]] == ["SamBlockFunctionBackward"] * 2


@pytest.mark.parametrize("memory", MODES)
def test_what_an_encoder_saves(memory, move):
    """10, 3 or 1 · D elements per token and block, by both counts; MLPs are four times as wide."""
    fused = samfast.fuse(attached(METHODS["lora"], move), memory)
    blocks = fused.image_encoder.blocks
    x = torch.randn(2, 5, 5, 192)
    tokens, rank, heads = 2 * 5 * 5, 2, 3

    def call():
        y = x
        for layer in blocks:
            y = layer(y)
        return y

    saved = saved_bytes(call, [x, *blocks.parameters()])
    elements = {"fast": 10 * 192 + rank + heads, "balanced": 3 * 192 + heads, "minimal": 192}
    # The first x is known, the others are the results of the blocks before.
    expected = 4 * tokens * (len(blocks) * elements[memory] - 192)
    expected += 4 * 2 * 7 * 64  # the first block's tables, of 13 lines for windows of 7
    assert (saved.hooks, saved.living) == (expected, expected)


@pytest.mark.parametrize("method", ["lora", "everywhere", "conv-lora"])
def test_predictor_and_mask_generator(method, move, monkeypatch):
    """What segment_anything's own tools make of a fused, adapted model.

    All masks are kept: torchvision's choice among them is compiled code that may be missing.
    """
    monkeypatch.setattr(
        "segment_anything.automatic_mask_generator.batched_nms",
        lambda boxes, scores, *_, **__: torch.arange(len(scores)),
    )
    stock = in_token_order(attached(METHODS[method], move)).eval()
    fused, wide = samfast.fuse(copy.deepcopy(stock)), double(stock)
    image = 255 * torch.rand(60, 80, 3, generator=torch.Generator().manual_seed(3))
    image = image.numpy().astype(np.uint8)
    points = {"point_coords": np.array([[30, 20]]), "point_labels": np.array([1])}

    def predicted(sam):
        """The image's features, masks, their qualities and small masks."""
        predictor = SamPredictor(sam)
        predictor.set_image(image)
        made = predictor.predict(**points, return_logits=True)
        return [predictor.features, *map(torch.from_numpy, made)]

    theirs, exact = by_reference(predicted, stock), by_reference(predicted, wide)
    all_within_budget(predicted(fused), theirs, exact, torch.float32)
    ours, theirs = (
        SamAutomaticMaskGenerator(
            sam, points_per_side=3, pred_iou_thresh=-10, stability_score_thresh=-10
        ).generate(image)
        for sam in (fused, stock)
    )
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(mine["segmentation"], other["segmentation"])
        assert mine["bbox"] == other["bbox"] and mine["point_coords"] == other["point_coords"]


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    ("method", "batches"),
    [
        ("everywhere", (2,)),
        pytest.param("everywhere", (2, 3), marks=pytest.mark.slow),
        pytest.param("conv-lora", (2, 3), marks=pytest.mark.slow),
    ],
)
def test_compiled_whole(method, batches, move):
    """One graph for the encoder, one for batches of other sizes; blocks may differ in alpha."""
    fused = samfast.fuse(attached(METHODS[method], move), "balanced").eval()
    if method == "everywhere":
        fused.image_encoder.blocks[1].attn.qkv.alpha = 7
    torch._dynamo.reset()
    compiled = torch.compile(fused.image_encoder, fullgraph=True, backend="aot_eager")
    wide = copy.deepcopy(fused).double()
    for batch in batches:
        images, dy = torch.randn(batch, 3, SIZE, SIZE), torch.randn(batch, 256, 5, 5)

        def results(sam, dtype, call, images=images, dy=dy):
            trained = dict(samfast.trainable_parameters(sam))
            leaves, y = list(trained.values()), call(images.to(dtype))
            grads = torch.autograd.grad(y, leaves, dy.to(dtype), materialize_grads=True)
            return {"y": y, **dict(zip(trained, grads, strict=True))}

        ours = results(fused, torch.float32, compiled)
        eager = by_reference(results, fused, torch.float32, fused.image_encoder)
        exact = by_reference(results, wide, torch.float64, wide.image_encoder)
        all_within_budget(ours, eager, exact, torch.float32)


@pytest.mark.slow_on_cpu
def test_copies_after_a_forward(move):
    fused = samfast.fuse(attached(METHODS["conv-lora"], move), "minimal").train()
    expected = run(fused)
    twin = copy.deepcopy(fused)
    assert samfast.report(twin).memory == ("minimal",)
    assert all(torch.equal(v, run(twin)[n]) for n, v in expected.items())
