# SPDX-License-Identifier: Apache-2.0
"""segment on Hugging Face's SamModel and SamHQModel against their own forward."""

import copy
from functools import partial

import pytest
import torch
from budgets import all_within_budget, within_budget
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

pytest.importorskip("transformers")

from hugging_face_models import SIDE, double, images, model, own_forward, prompts, run, twin

import samfast
from samfast.models import (
    TRAINED_DECODER,
    MultiTaskSam,
    Task,
    binary_head,
    decode,
    encode,
    image_size,
    restore_head,
    segment,
    stock_state_dict,
    unused_by_segment,
)

SLOW = pytest.mark.slow
KINDS, PROMPTS = ("sam", "hq"), ("none", "boxes", "points", "both")


CASES = [(kind, given, chunk) for kind in KINDS for given in PROMPTS for chunk in (None, 2)]
QUICK = [("sam", "both", None), ("hq", "both", 2)]


@pytest.mark.slow_on_cpu("hq-both-2")
@pytest.mark.parametrize(
    ("kind", "given", "chunk"),
    [*QUICK, *(pytest.param(*case, marks=SLOW) for case in CASES if case not in QUICK)],
)
def test_equals_the_models_own_forward(kind, given, chunk):
    """With every gradient; in chunks, one begins in the middle of an image."""
    sam, arguments = model(kind, seed=2), prompts(given)
    stock = partial(run, own_forward, sam, images(), **arguments)
    exact = partial(run, own_forward, double(sam), images(), **arguments)
    ours = run(partial(segment, decoder_chunk=chunk), sam, images(), **arguments)
    all_within_budget(ours, stock, exact, torch.float32)
    assert {n.partition(".")[0] for n in ours} >= {"vision_encoder", "mask_decoder"}


@pytest.mark.parametrize("given", ["both", pytest.param("none", marks=SLOW)])
def test_equals_segment_anything_with_the_same_weights(given):
    sam = model(eps=1e-5)
    other, arguments = twin(sam), prompts(given)
    exact = partial(segment, twin(sam).double(), images(), **arguments)
    ours = segment(sam, images(), **arguments)
    within_budget(ours, partial(segment, other, images(), **arguments), exact, torch.float32)
    ours = encode(sam, images())
    exact = partial(encode, twin(sam).double(), images())
    within_budget(ours, partial(encode, other, images()), exact, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_parameters_get_no_gradient(kind):
    sam = model(kind)
    used = {name for g in ("none", "both") for name in run(segment, sam, images(), **prompts(g))}
    names = {name for name, _ in sam.named_parameters()}
    assert set(unused_by_segment(sam)) == names - used


@pytest.mark.parametrize("kind", ["sam", pytest.param("hq", marks=SLOW)])
@pytest.mark.parametrize("how", ["autocast", "base"])
def test_low_precision(kind, how):
    sam, exact_sam, arguments = model(kind), double(model(kind)), prompts("both")
    exact = partial(own_forward, exact_sam, images(), **arguments)
    if how == "base":
        sam.vision_encoder.bfloat16()
        assert encode(sam, images()).dtype == torch.bfloat16

    def narrow(function):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            return function(sam, images(), **arguments)

    def stock():
        if how == "autocast":
            return narrow(own_forward)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return own_forward(model(kind), images(), **arguments)

    ours = narrow(segment)
    assert ours.dtype == torch.float32
    within_budget(ours, stock, exact, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_halves_make_the_whole(kind):
    sam, arguments = model(kind), prompts("boxes")
    with torch.no_grad():
        whole = segment(sam, images(), **arguments)
        assert torch.equal(decode(sam, encode(sam, images()), (50, SIDE), **arguments), whole)
        some = segment(sam, images(), [arguments["boxes"][0], arguments["boxes"][1, :1]])
        assert encode(sam, images()[:0]).shape[0] == 0
    assert [len(masks) for masks in some] == [3, 1] and torch.equal(some[0], whole[0])
    assert image_size(sam) == SIDE and whole.shape == (2, 3, 50, SIDE)
    with pytest.raises(ValueError, match=r"embeddings have shape \(2, 3, 50, 64\), not \(batch, "):
        decode(sam, images(), (50, SIDE))


def test_positions_that_a_wrapper_copied_apart():
    """PEFT's modules_to_save copies the prompt encoder and the matrix in it."""
    sam = model()
    layer = sam.prompt_encoder.shared_embedding
    layer.positional_embedding = nn.Parameter(2 * layer.positional_embedding.detach())
    arguments = prompts("both")
    stock = partial(own_forward, sam, images(), **arguments)
    exact = partial(own_forward, double(sam), images(), **arguments)
    within_budget(segment(sam, images(), **arguments), stock, exact, torch.float32)


def test_one_mask_token():
    sam, arguments = binary_head(model()), prompts("boxes")
    stock = partial(own_forward, sam, images(), **arguments)
    exact = partial(own_forward, double(sam), images(), **arguments)
    within_budget(segment(sam, images(), **arguments), stock, exact, torch.float32)
    with pytest.raises(ValueError, match="has one mask"):
        sam(torch.zeros(1, 3, SIDE, SIDE))
    model(seed=1).load_state_dict(stock_state_dict(sam))
    whole = restore_head(sam).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in model().state_dict().items())


class Segmenter(nn.Module):
    def __init__(self, sam):
        super().__init__()
        self.sam = sam

    def forward(self, pixels):
        return segment(self.sam, pixels)


def test_wrappers_are_looked_through():
    sam = model()
    with torch.no_grad():
        expected = segment(sam, images())
        for wrapped in (Segmenter(sam), AveragedModel(sam), nn.DataParallel(sam)):
            assert torch.equal(segment(wrapped, images()), expected)
            assert samfast.report(wrapped) == samfast.report(sam)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_in_one_graph(kind):
    sam = model(kind)
    compiled = torch.compile(Segmenter(sam), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images()), segment(sam, images()))


def test_inside_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["mask_decoder"])
    adapted = peft.get_peft_model(model(), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.01))
    arguments = prompts("both")
    stock = partial(own_forward, adapted.base_model.model, images(), **arguments)
    exact = partial(own_forward, double(adapted.base_model.model), images(), **arguments)
    within_budget(segment(adapted, images(), **arguments), stock, exact, torch.float32)


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_trained_parameters_that_are_not_read_are_named(group):
    def parallel(train):
        sam = samfast.attach(model(), samfast.Lora(rank=2), train=train)
        return DistributedDataParallel(Segmenter(sam))

    named = r"24 parameters .*_mlps\.1, .*_mlps\.2, .*_mlps\.3, 1 more\).* train=.*TRAINED_DECODER"
    with pytest.raises(RuntimeError, match=named):
        parallel("mask_decoder")(images())
    with pytest.raises(
        RuntimeError, match=r"2 parameters .* \(mask_decoder\.iou_prediction_head\);"
    ):
        parallel((*TRAINED_DECODER, "mask_decoder.iou_prediction_head.layers"))(images())
    trains = parallel(TRAINED_DECODER)
    for _ in range(2):
        trains(images()).square().mean().backward()
    with pytest.raises(RuntimeError, match="bypasses DistributedDataParallel's forward"):
        segment(DistributedDataParallel(model()), images())


def test_what_does_not_fit_is_refused():
    from transformers import SamVisionModel

    only = "got SamVisionModel; .* it may be SamModel, SamHQModel or Sam3TrackerModel$"
    with pytest.raises(TypeError, match=only):
        segment(SamVisionModel(model().config.vision_config), images())
    sam = model()
    sam.prompt_encoder.input_image_size = 1024
    with pytest.raises(ValueError, match=r"this SamModel's vision encoder has 64 and its prompt"):
        segment(sam, images())
    with pytest.raises(ValueError, match="expected a global block, whose output the decoder reads"):
        segment(model("hq", global_blocks=()), images())
    with pytest.raises(ValueError, match="remove the high-quality mask of this SamHQModel"):
        binary_head(model("hq"))
    with pytest.raises(ValueError, match="expected segment_anything's Sam, got SamModel"):
        MultiTaskSam(model(), [Task("roads")])


def test_derived_classes_and_copies(tmp_path):
    sam = model()
    with torch.no_grad():
        expected = segment(sam, images())
        sam.save_pretrained(tmp_path)
        loaded = type(sam).from_pretrained(tmp_path)
        assert torch.equal(segment(loaded.eval(), images()), expected)
        again = copy.deepcopy(sam)
        again.__class__ = type("Derived", (type(sam),), {})
        assert torch.equal(segment(again, images()), expected)
