# SPDX-License-Identifier: Apache-2.0
"""The binary head: what it predicts, what it trains, and how it goes back into SAM's decoder."""

import copy
import pickle
from functools import partial

import pytest
import torch
from budgets import all_within_budget
from stock_loop import prompts, run, stock
from stock_runs import double
from torch import nn

import samfast
from samfast.integrations import segment_anything
from samfast.models import (
    TRAINED_DECODER,
    binary_head,
    build_sam,
    head_of,
    restore_head,
    segment,
    stock_state_dict,
    unused_by_segment,
)
from samfast.models.architectures import ARCHITECTURES
from samfast.models.build import _construct

SIDE = 64
SIZE = (50, 63)
DECODER_OF_ONE_MASK = 3_505_536


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


@pytest.fixture(scope="module")
def base():
    """A Sam of two blocks; not to be written to."""
    sam = build_sam("vit_tiny", image_size=SIDE, seed=2)
    sam.image_encoder.blocks = sam.image_encoder.blocks[1:3]
    return sam


@pytest.fixture
def sam(base):
    return copy.deepcopy(base)


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def equal_states(first, second):
    assert list(first) == list(second)
    return all(torch.equal(value, second[name]) for name, value in first.items())


def one_mask(sam):
    """A copy of a stock Sam whose decoder is segment_anything's own, built for one mask."""
    modeling = segment_anything.load().modeling
    copied = copy.deepcopy(sam)
    state = copied.mask_decoder.state_dict()
    decoder = modeling.MaskDecoder(
        num_multimask_outputs=0,
        transformer=copied.mask_decoder.transformer,
        transformer_dim=256,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    last = "iou_prediction_head.layers.2."
    first_rows = ("mask_tokens.weight", f"{last}weight", f"{last}bias")
    decoder.load_state_dict(
        {
            name: state[name][:1] if name in first_rows else state[name]
            for name in decoder.state_dict()
        }
    )
    copied.mask_decoder = decoder
    return copied


@pytest.fixture(scope="module")
def one_mask_double(base):
    return double(one_mask(base))


@pytest.mark.slow_on_cpu("none")
@pytest.mark.slow_on_cpu("three boxes", "one point")
@pytest.mark.parametrize("kind", ["none", "three boxes", "one point"])
def test_equals_segment_anythings_decoder_of_one_mask(base, sam, images, one_mask_double, kind):
    arguments = prompts(kind, 2, SIZE)
    weights = torch.randn(*SIZE)
    exact = partial(run, stock, one_mask_double, images, arguments, weights)
    theirs = partial(run, stock, one_mask(base), images, arguments, weights)
    ours = run(segment, binary_head(sam), images, arguments, weights)
    all_within_budget(ours, theirs, exact, torch.float32)


def test_the_other_mask_tokens_take_part_in_a_stock_decoder(base, sam, images):
    with torch.no_grad():
        before = segment(base, images)
        difference = segment(binary_head(sam), images) - before
    assert difference.norm() > before.norm() / 100


def test_one_token_one_hypernetwork_and_the_quality_head_remain(base, sam):
    full, decoder = shapes(base.mask_decoder), binary_head(sam).mask_decoder
    expected = {
        name: shape
        for name, shape in full.items()
        if not name.startswith(tuple(f"output_hypernetworks_mlps.{i}." for i in (1, 2, 3)))
    }
    expected["mask_tokens.weight"] = (1, 256)
    assert shapes(decoder) == expected
    assert (decoder.num_mask_tokens, decoder.num_multimask_outputs) == (1, 0)
    assert head_of(sam) == "binary" and head_of(base) == "sam"
    unused = {name for name in unused_by_segment(sam) if "mask_decoder" in name}
    assert unused == {
        f"mask_decoder.{name}" for name in expected if name.startswith("iou_prediction_head")
    }


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_trained_decoder_is_that_of_the_paper(name):
    with torch.device("meta"):
        sam = binary_head(_construct(ARCHITECTURES[name], 1024))
        samfast.attach(sam, samfast.DecoderOnly(), train=TRAINED_DECODER)
    trained = dict(samfast.trainable_parameters(sam))
    assert sum(p.numel() for p in trained.values()) == DECODER_OF_ONE_MASK
    decoder = {name for name, _ in sam.named_parameters() if name.startswith("mask_decoder.")}
    assert set(trained) == decoder - set(unused_by_segment(sam))


def test_restoring_gives_the_model_before(base, sam, images):
    assert restore_head(binary_head(sam)) is sam
    assert head_of(sam) == "sam" and repr(sam) == repr(base)
    assert equal_states(sam.state_dict(), base.state_dict())
    for multimask in (True, False):
        request = [{"image": images[0], "original_size": SIZE}]
        mine, theirs = (model(request, multimask)[0] for model in (sam, base))
        assert torch.equal(mine["low_res_logits"], theirs["low_res_logits"])
        assert torch.equal(mine["iou_predictions"], theirs["iou_predictions"])
    assert restore_head(sam) is sam


def test_heads_given_twice_stay(sam):
    state = binary_head(sam).state_dict()
    assert binary_head(sam) is sam and equal_states(sam.state_dict(), state)
    assert len(sam.mask_decoder._forward_pre_hooks) == 1
    assert len(restore_head(sam).mask_decoder.output_hypernetworks_mlps) == 4


def trained_a_little(sam, images):
    """Move what the head trains; returns the logits."""
    for name, parameter in sam.named_parameters():
        if name.startswith(TRAINED_DECODER):
            parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.no_grad():
        return segment(sam, images)


def test_what_was_trained_is_written_into_a_stock_state_dict(base, sam, images, tmp_path):
    logits = trained_a_little(binary_head(sam), images)
    binary, stock_state = sam.state_dict(), stock_state_dict(sam)
    plain = base.state_dict()
    assert shapes(base) == {name: tuple(value.shape) for name, value in stock_state.items()}
    tokens = "mask_decoder.mask_tokens.weight"
    assert torch.equal(stock_state[tokens], torch.cat([binary[tokens], plain[tokens][1:]]))
    for name, value in stock_state.items():
        if name in binary and name != tokens:
            assert torch.equal(value, binary[name]), name
        elif name != tokens:
            assert torch.equal(value, plain[name]), name
    assert equal_states(sam.state_dict(), binary) and head_of(sam) == "binary"

    loaded = copy.deepcopy(base)
    loaded.load_state_dict(stock_state)
    assert torch.equal(segment(binary_head(loaded), images), logits)
    assert equal_states(restore_head(loaded).state_dict(), restore_head(sam).state_dict())
    with torch.no_grad():
        assert torch.equal(segment(binary_head(sam), images), logits)


def test_a_written_checkpoint_is_one_of_a_stock_sam(images, tmp_path):
    sam = build_sam("vit_tiny", image_size=SIDE, seed=2)
    logits = trained_a_little(binary_head(sam), images)
    torch.save(stock_state_dict(sam), tmp_path / "tuned.pth")
    loaded = build_sam("vit_tiny", tmp_path / "tuned.pth", image_size=SIDE)
    with torch.no_grad():
        assert torch.equal(segment(binary_head(loaded), images), logits)


def test_a_merged_state_dict_is_one_of_a_stock_sam(base, sam, images):
    samfast.attach(binary_head(sam), samfast.Lora(rank=2), train=TRAINED_DECODER)
    for name, parameter in sam.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.02)
    trained_a_little(sam, images)
    loaded = copy.deepcopy(base)
    loaded.load_state_dict(samfast.merged_state_dict(sam))
    with torch.no_grad():
        merged = segment(samfast.merge(sam), images)
        assert torch.equal(segment(binary_head(loaded), images), merged)


@pytest.fixture
def folder(base, images, tmp_path):
    """An adapter of LoRA and a binary head, and the logits it gives."""
    sam = samfast.attach(
        binary_head(copy.deepcopy(base)), samfast.Lora(rank=2), train=TRAINED_DECODER
    )
    logits = trained_a_little(sam, images)
    return samfast.save_adapter(sam, tmp_path / "adapter"), logits


def test_a_loaded_adapter_brings_its_head(folder, sam, images):
    folder, logits = folder
    assert samfast.read_adapter_config(folder)["head"] == "binary"
    samfast.load_adapter(sam, folder)
    assert head_of(sam) == "binary"
    with torch.no_grad():
        assert torch.equal(segment(sam, images), logits)
        trained_a_little(sam, images)
        assert torch.equal(segment(samfast.load_adapter(sam, folder), images), logits)


def test_an_adapter_that_does_not_fit_changes_no_head(folder, sam):
    folder, _ = folder
    sam.image_encoder.neck[0].weight.data.mul_(2)
    before = copy.deepcopy(sam.state_dict())
    with pytest.raises(ValueError, match="was trained on another base"):
        samfast.load_adapter(sam, folder)
    assert head_of(sam) == "sam" and equal_states(sam.state_dict(), before)


def test_adapters_of_another_head_are_refused(folder, sam, base, tmp_path):
    folder, _ = folder
    samfast.attach(sam, samfast.Lora(rank=2), train=TRAINED_DECODER)
    with pytest.raises(ValueError, match="trained with head 'binary', but the model has 'sam'"):
        samfast.load_adapter(sam, folder)
    with pytest.raises(ValueError, match="head is 'binary', but the model's is 'sam'"):
        samfast.save_adapter(sam, tmp_path / "other", head="binary")
    other = samfast.save_adapter(sam, tmp_path / "other")
    with pytest.raises(ValueError, match="trained with head 'sam', but the model has 'binary'"):
        samfast.load_adapter(binary_head(copy.deepcopy(base)), other)


def test_a_refused_adapter_leaves_the_very_same_modules(folder, sam, base):
    """Also what is frozen in them: an optimizer made before still trains them."""
    folder, _ = folder
    networks = sam.mask_decoder.output_hypernetworks_mlps
    networks[1:].requires_grad_(False)
    with torch.no_grad():
        sam.image_encoder.blocks[0].attn.qkv.weight.add_(1.0)  # another base
    before = dict(sam.named_parameters())
    flags = {name: p.requires_grad for name, p in before.items()}
    with pytest.raises(ValueError, match="base"):
        samfast.load_adapter(sam, folder)
    after = dict(sam.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert {name: p.requires_grad for name, p in after.items()} == flags


@pytest.mark.parametrize("how", [copy.deepcopy, lambda sam: pickle.loads(pickle.dumps(sam))])
def test_copies_know_their_head(base, sam, images, how):
    copied = how(binary_head(sam))
    with torch.no_grad():
        assert torch.equal(segment(copied, images), segment(sam, images))
    with pytest.raises(ValueError, match="multimask_output=False"):
        copied([{"image": images[0], "original_size": SIZE}], True)
    restore_head(copied)
    assert equal_states(copied.state_dict(), base.state_dict()) and head_of(sam) == "binary"
    copied([{"image": images[0], "original_size": SIZE}], True)


def test_several_masks_are_refused_and_one_is_given(sam, images):
    binary_head(sam)
    request = [{"image": images[0], "original_size": SIZE}]
    with pytest.raises(ValueError, match=r"one mask .* multimask_output=False"):
        sam(request, multimask_output=True)
    result = sam(request, multimask_output=False)[0]
    assert result["masks"].shape == (1, 1, *SIZE) and result["iou_predictions"].shape == (1, 1)
    decoder = sam.mask_decoder
    inputs = (torch.zeros(1, 256, 4, 4), torch.zeros(1, 256, 4, 4))
    prompt = (torch.zeros(1, 0, 256), torch.zeros(1, 256, 4, 4))
    assert decoder(*inputs, *prompt, False)[0].shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match="multimask_output=False"):
        decoder(*inputs, *prompt, True)


def test_restored_tensors_follow_the_model(sam):
    binary_head(sam)
    samfast.attach(sam, samfast.DecoderOnly(), train=TRAINED_DECODER)
    restore_head(sam.double().train())
    assert {value.dtype for value in sam.mask_decoder.state_dict().values()} == {torch.float64}
    assert all(module.training for module in sam.mask_decoder.modules())
    trained = {name for name, _ in samfast.trainable_parameters(sam)}
    assert "mask_decoder.mask_tokens.weight" in trained
    assert not any("iou_prediction" in name or "mlps.1." in name for name in trained)


def test_a_model_without_sams_decoder_is_refused():
    with pytest.raises(ValueError, match="this Linear has no mask decoder of SAM"):
        binary_head(nn.Linear(2, 2))
    assert head_of(nn.Linear(2, 2)) == "sam"
