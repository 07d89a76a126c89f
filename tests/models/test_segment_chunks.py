# SPDX-License-Identifier: Apache-2.0
"""segment with the mask decoder in chunks: the same results, and no decoder graph is kept."""

import importlib
from functools import partial

import pytest
import torch
from budgets import all_within_budget
from stock_loop import SIDE, prompts, random_boxes, run, stock

import samfast
from samfast.counters import saved_bytes
from samfast.models import build_sam, decode, segment

SIZE = (60, SIDE)
module = importlib.import_module("samfast.models.segment")  # the package has the function


pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def checkpoints(monkeypatch):
    """The number of objects in each call that was checkpointed."""
    calls, whole = [], module.checkpoint

    def counted(function, embeddings, positions, tokens, *rest, **options):
        calls.append(len(tokens))
        return whole(function, embeddings, positions, tokens, *rest, **options)

    monkeypatch.setattr(module, "checkpoint", counted)
    return calls


def images_of(batch):
    return torch.randint(0, 256, (batch, 3, *SIZE), dtype=torch.uint8)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    ("chunk", "sizes"), [(1, [1] * 6), (2, [2] * 3), (4, [4, 2])], ids="chunk{}".format
)
def test_equals_the_stock_loop(small, small_double, checkpoints, chunk, sizes):
    """Two images of three objects: chunks end inside an image and go across two."""
    images, arguments = images_of(2), prompts("boxes and points", 2, SIZE)
    weights = torch.randn(SIZE)
    ours = run(partial(segment, decoder_chunk=chunk), small, images, arguments, weights)
    assert checkpoints == sizes
    theirs, exact = (
        partial(run, stock, sam, images, arguments, weights) for sam in (small, small_double)
    )
    ours = {name: values for name, values in ours.items() if values.any()}
    assert set(ours) == {name for name, values in exact().items() if values.any()}
    all_within_budget(ours, theirs, exact, torch.float32, some=True)


@pytest.mark.slow_on_cpu
def test_under_autocast(small, small_double, checkpoints):
    images, arguments = images_of(2), prompts("three boxes", 2, SIZE)

    def cast(function, **options):
        def call(sam, images, **arguments):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(sam, images, **arguments, **options)

        return call

    weights = torch.randn(SIZE)
    ours = run(cast(segment, decoder_chunk=2), small, images, arguments, weights)
    assert checkpoints == [2, 2, 2] and ours["logits"].dtype == torch.float32
    assert ours.keys() == run(cast(segment), small, images, arguments, weights).keys()
    theirs = partial(run, cast(stock), small, images, arguments, weights)
    exact = partial(run, stock, small_double, images, arguments, weights)
    all_within_budget(ours, theirs, exact, torch.bfloat16, some=True)


def test_a_chunk_has_the_bits_of_its_objects_alone(small):
    """In the decoder, of one image's objects: the same code runs on the same layout. What comes
    before and after it has other sizes."""
    embeddings, tokens = torch.randn(1, 256, SIDE // 16, SIDE // 16), torch.randn(5, 3, 256)
    positions = small.prompt_encoder.get_dense_pe()
    dense = small.prompt_encoder.no_mask_embed.weight
    masks = partial(module.decode_objects, small.mask_decoder, embeddings, positions)
    alone = [masks(some, dense, len(some)) for some in tokens.split(2)]
    assert torch.equal(masks(tokens, dense, 5, 2), torch.cat(alone))


def test_computing_again_changes_no_bit(small, monkeypatch):
    images, arguments = images_of(2), prompts("three boxes", 2, SIZE)
    chunked = partial(segment, decoder_chunk=4)
    again = run(chunked, small, images, arguments, torch.ones(SIZE))
    monkeypatch.setattr(module, "checkpoint", lambda f, *args, **_: f(*args))
    kept = run(chunked, small, images, arguments, torch.ones(SIZE))
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_dropout_in_the_decoder_is_drawn_again(monkeypatch):
    sam = build_sam("vit_tiny", image_size=64, seed=3)
    target = r"mask_decoder\.transformer\.layers\..*\.lin1"
    samfast.attach(sam, samfast.Lora(rank=2, dropout=0.5, target=target)).train()
    with torch.no_grad():
        for name, parameter in samfast.trainable_parameters(sam):
            if "lora_B" in name:
                parameter.normal_()
    images, boxes = torch.rand(1, 3, 64, 64) * 255, random_boxes(1, 3, (64, 64))

    def one(seed):
        torch.manual_seed(seed)
        return run(
            partial(segment, decoder_chunk=1), sam, images, {"boxes": boxes}, torch.ones(64, 64)
        )

    first, other = one(1), one(2)
    assert not torch.equal(first["logits"], other["logits"])
    monkeypatch.setattr(module, "checkpoint", lambda f, *args, **_: f(*args))
    kept = one(1)
    assert any("lora_A" in name for name in kept)
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_every_run_gives_the_same_bits(small):
    images, arguments = images_of(2), prompts("three boxes", 2, SIZE)
    chunked = partial(segment, decoder_chunk=4)
    first, *others = (run(chunked, small, images, arguments, torch.ones(SIZE)) for _ in range(3))
    torch.use_deterministic_algorithms(True)
    try:
        others.append(run(chunked, small, images, arguments, torch.ones(SIZE)))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.slow_on_cpu
def test_what_is_kept_is_no_decoder_graph(small):
    """Of each object only its prompt tokens and its masks, seen by hooks and by living storages."""
    embeddings = torch.randn(1, 256, SIDE // 16, SIDE // 16, requires_grad=True)
    known = [*small.parameters(), *small.buffers(), embeddings]

    def kept(objects, chunk):
        boxes = random_boxes(1, objects, SIZE)
        call = partial(decode, small, embeddings, SIZE, boxes, decoder_chunk=chunk)
        saved = saved_bytes(call, [*known, boxes])
        return max(saved.hooks, saved.living)

    of_one_graph = kept(1, None)
    for chunk in (1, 2):
        more = (kept(8, chunk) - kept(4, chunk)) / 4
        assert more <= 4 * (8 * 256 + (SIDE // 4) ** 2) < of_one_graph / 20


def test_without_gradients_nothing_is_checkpointed(small, checkpoints):
    images, arguments = images_of(2), prompts("three boxes", 2, SIZE)
    recorded = segment(small, images, **arguments, decoder_chunk=4)
    assert checkpoints.pop() == 2
    checkpoints.clear()
    with torch.no_grad():
        assert torch.equal(segment(small, images, **arguments, decoder_chunk=4), recorded)
    with torch.inference_mode():
        assert torch.equal(segment(small, images, **arguments, decoder_chunk=4), recorded)
    assert checkpoints == []


@pytest.mark.parametrize("chunk", [6, 7])
def test_one_chunk_is_no_chunk(small, checkpoints, chunk):
    images, arguments = images_of(2), prompts("three boxes", 2, SIZE)
    whole = segment(small, images, **arguments)
    assert torch.equal(segment(small, images, **arguments, decoder_chunk=chunk), whole)
    assert checkpoints == []


@pytest.mark.parametrize(("batch", "count"), [(0, 2), (2, 0)])
def test_nothing_to_decode(small, batch, count):
    boxes = torch.zeros(batch, count, 4)
    logits = segment(small, torch.zeros(batch, 3, 30, 40), boxes, decoder_chunk=1)
    assert logits.shape == (batch, count, 30, 40)


@pytest.mark.slow_on_cpu
def test_compiles_without_a_graph_break(small):
    images, arguments = images_of(1), prompts("three boxes", 1, SIZE)
    compiled = torch.compile(segment, fullgraph=True, backend="eager")
    expected = segment(small, images, **arguments, decoder_chunk=2)
    assert torch.equal(compiled(small, images, **arguments, decoder_chunk=2), expected)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("chunk", "kind", "sentence"),
    [
        (0, ValueError, "decoder_chunk is 0; it must be at least 1"),
        (-3, ValueError, "decoder_chunk is -3; it must be at least 1"),
        (2.0, TypeError, "decoder_chunk is 2.0, not a whole number"),
        (True, TypeError, "decoder_chunk is True, not a whole number"),
        ("all", TypeError, "decoder_chunk is 'all', not a whole number"),
    ],
)
def test_bad_chunks(small, chunk, kind, sentence):
    with pytest.raises(kind, match=sentence):
        segment(small, torch.zeros(1, 3, 30, 40), decoder_chunk=chunk)
    with pytest.raises(kind, match=sentence):
        decode(small, torch.zeros(1, 256, 6, 6), (30, 40), decoder_chunk=chunk)
