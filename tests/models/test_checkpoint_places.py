# SPDX-License-Identifier: Apache-2.0
"""SAMs inside the files that training scripts write, what else is in these, and bad numbers."""

import argparse
import warnings

import pytest
import torch
from torch import nn

from samfast.models import build_sam
from samfast.models.checkpoints import load_checkpoint, read_checkpoint

SMALL = {
    "image_encoder.patch_embed.proj.weight": torch.ones(2, 3, 1, 1),
    "image_encoder.neck.0.weight": torch.full((1,), 2.0),
    "prompt_encoder.no_mask_embed.weight": torch.full((1,), 3.0),
    "mask_decoder.iou_token.weight": torch.full((1,), 4.0),
}
OTHER = {name: tensor + 10 for name, tensor in SMALL.items()}


def under(prefix, state=SMALL):
    return {prefix + name: tensor for name, tensor in state.items()}


def wrapped_part(part, wrapper):
    return {k.replace(f"{part}.", f"{part}.{wrapper}."): v for k, v in SMALL.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"params": [0]}]}
WHOLE = {
    "micro-sam": {"model_state": under("sam."), "optimizer_state": OPTIMIZER, "init": {}},
    "lightning": {"state_dict": under("model.sam."), "optimizer_states": [OPTIMIZER], "epoch": 1},
    "mmengine": {"meta": {"seed": 0}, "state_dict": under("module.backbone.sam.")},
    "deep": {"run": {"nets": {"weights": under("")}}, "optimizer": OPTIMIZER},
    "ddp encoder": wrapped_part("image_encoder", "module"),
    "fsdp decoder": wrapped_part("mask_decoder", "_fsdp_wrapped_module"),
    "compiled": under("_orig_mod.module._orig_mod.net."),
    "named optimizer": {"net": SMALL, "opt": {"state": OTHER, "param_groups": []}},
    "moments by name": {"net": SMALL, "moments": {name: {"step": 1} for name in SMALL}},
    "numbers next to it": {**under("sam."), "epoch": 3, "name": "x", 7: torch.zeros(1)},
    "itself twice": {"net": SMALL, "same": SMALL},
}


@pytest.fixture
def written(tmp_path):
    def write(content):
        torch.save(content, tmp_path / "file.pt")
        return tmp_path / "file.pt"

    return write


def assert_small(state, expected=SMALL):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("content", WHOLE.values(), ids=WHOLE)
def test_a_sam_is_found_where_scripts_put_it(content, written):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_small(read_checkpoint(written(content)))


LEFT = {
    "another net": ({"net": under("sam."), "decoder_state": {"a.b": torch.zeros(1)}}, "decoder_s"),
    "next to it": ({"m": {**under("sam."), "head.w": torch.zeros(1)}}, r"m\.head\.w are left out"),
    "at the top": ({"model_state": SMALL, "pos_weight": torch.ones(1)}, "pos_weight are left"),
    "in the sam": (under("sam.") | {"sam.points.x": torch.ones(1)}, r"sam\.points\.x are left out"),
    "less of one": (SMALL | {"ema.image_encoder.x": torch.ones(1)}, "ema.image_encoder.x are left"),
    "model, ema": ({"model": SMALL, "model_ema": OTHER}, "weights are 'model', not 'model_ema'$"),
    "ema, state": ({"ema": OTHER, "state_dict": under("sam.")}, "are 'state_dict.sam', not 'ema'$"),
}


@pytest.mark.parametrize(("content", "sentence"), LEFT.values(), ids=LEFT)
def test_what_is_left_out_is_named(content, sentence, written):
    with pytest.warns(UserWarning, match=sentence) as caught:
        assert_small(read_checkpoint(written(content)))
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("content", "places"),
    [
        ({"student": SMALL, "teacher": OTHER}, "'student' and 'teacher'"),
        (under("sam.") | under("ema.module.", OTHER), "'sam' and 'ema.module'"),
        ({"state_dict": under("a.") | under("b.")}, "'state_dict.a' and 'state_dict.b'"),
        (SMALL | under("ema.", OTHER), "one without a prefix and 'ema'"),
    ],
)
def test_of_two_none_is_guessed(content, places, written):
    sentence = rf"holds 2 SAMs, {places}; save the state dict of only one of them$"
    with pytest.raises(ValueError, match=sentence):
        read_checkpoint(written(content))


def test_tensors_that_the_model_lacks_are_named_and_left_out(tiny, written):
    state = tiny.state_dict()
    extra = {f"image_encoder.blocks.{i}.Adapter.w": torch.ones(1) for i in range(4)}
    with pytest.warns(
        UserWarning,
        match=r"blocks\.2\.Adapter\.w and 1 more are left out, because vit_tiny has noth",
    ):
        sam = build_sam("vit_tiny", written({"model_state": state | extra}))
    assert all(torch.equal(tensor, state[name]) for name, tensor in sam.state_dict().items())
    del state["mask_decoder.iou_token.weight"]
    with pytest.raises(ValueError, match=r"lacks mask_decoder\.iou_token\.weight$"):
        build_sam("vit_tiny", written(state))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(tiny, written, value):
    state = dict(tiny.state_dict())
    name = "image_encoder.blocks.1.mlp.lin2.weight"
    state[name] = state[name].clone()
    state[name].view(-1)[-1] = value
    sentence = rf"file.pt contains NaN or infinity in {name}$"
    with pytest.raises(ValueError, match=sentence):
        build_sam("vit_tiny", written(state))


def test_large_numbers_are_numbers(tiny, written):
    """Whose sum is infinite in float32."""
    state = dict(tiny.state_dict())
    name = "image_encoder.blocks.1.mlp.lin2.weight"
    state[name] = torch.full_like(state[name], 3e38)
    assert torch.equal(build_sam("vit_tiny", written(state)).state_dict()[name], state[name])


def test_a_refused_file_leaves_the_model_as_it_was(tiny, written):
    sam = nn.Module()
    sam.state_dict = tiny.state_dict
    sam.image_encoder = tiny.image_encoder
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    state["mask_decoder.iou_token.weight"][0, 0] = float("nan")
    before = {name: id(parameter) for name, parameter in tiny.named_parameters()}
    with pytest.raises(ValueError, match="NaN"):
        load_checkpoint(sam, "vit_tiny", written(state))
    assert {name: id(parameter) for name, parameter in tiny.named_parameters()} == before


def test_other_objects_in_a_file_end_in_a_sentence(written):
    sentence = "names 'argparse.Namespace', .* runs no code from files; if you trust the file, save"
    with pytest.raises(ValueError, match=sentence):
        read_checkpoint(written({"model": SMALL, "args": argparse.Namespace(lr=1)}))
