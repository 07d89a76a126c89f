# SPDX-License-Identifier: Apache-2.0
"""build_sam: sizes, random starts, its record, and the sentences for bad arguments."""

import copy
import pickle

import pytest
import torch

from samfast.integrations import segment_anything
from samfast.models import build_sam, image_size
from samfast.models.architectures import ARCHITECTURES
from samfast.models.build import _construct


def layout(sam):
    blocks = sam.image_encoder.blocks
    return {
        "modules": repr(sam),
        "tensors": {name: tuple(t.shape) for name, t in sam.state_dict().items()},
        "heads": [block.attn.num_heads for block in blocks],
        "windows": [block.window_size for block in blocks],
        "pixels": (sam.pixel_mean.tolist(), sam.pixel_std.tolist()),
        "sizes": (sam.image_encoder.img_size, sam.prompt_encoder.input_image_size),
        "grid": sam.prompt_encoder.image_embedding_size,
    }


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_sizes_are_those_of_segment_anything(name):
    with torch.device("meta"):
        stock = segment_anything.load().sam_model_registry[name]()
        ours = _construct(ARCHITECTURES[name], 1024)
    assert layout(ours) == layout(stock)


def test_vit_tiny(tiny):
    assert image_size(tiny) == 256
    assert tiny.image_encoder.pos_embed.shape == (1, 16, 16, 192)
    assert [block.window_size for block in tiny.image_encoder.blocks] == [7, 7, 0, 7, 7, 0]
    assert {block.attn.num_heads for block in tiny.image_encoder.blocks} == {3}
    assert not tiny.training


def test_image_size_sets_every_grid():
    sam = build_sam("vit_tiny", image_size=96, seed=0)
    assert image_size(sam) == 96
    assert sam.image_encoder.pos_embed.shape[1:3] == (6, 6)
    assert sam.image_encoder.blocks[2].attn.rel_pos_h.shape == (11, 64)
    assert sam.image_encoder.blocks[0].attn.rel_pos_h.shape == (13, 64)
    assert sam.prompt_encoder.image_embedding_size == (6, 6)
    assert sam.prompt_encoder.input_image_size == (96, 96)


def test_random_start_leaves_nothing_zero_that_should_move_tokens(tiny):
    encoder = tiny.image_encoder
    tables = [t for n, t in encoder.named_parameters() if "rel_pos" in n or "pos_embed" in n]
    assert len(tables) == 1 + 2 * len(encoder.blocks)
    for table in tables:
        assert 0.01 < table.std() < 0.03
        assert table.abs().max() < 0.2


def test_a_seed_fixes_the_weights_and_leaves_the_generator_alone(tiny):
    before = torch.get_rng_state()
    again = build_sam("vit_tiny", seed=0)
    assert torch.equal(before, torch.get_rng_state())
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    other = build_sam("vit_tiny", seed=1).image_encoder.pos_embed
    assert not torch.equal(other, tiny.image_encoder.pos_embed)


def test_without_a_seed_the_global_generator_decides():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, second = build_sam("vit_tiny"), build_sam("vit_tiny")
        torch.manual_seed(5)
        third = build_sam("vit_tiny")
    first, second, third = (sam.image_encoder.pos_embed for sam in (first, second, third))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_the_record_survives_copies_and_stays_out_of_the_state(tiny):
    record = {"name": "vit_tiny", "image_size": 256, "checkpoint": None, "seed": 0}
    assert tiny.samfast_base == record
    assert copy.deepcopy(tiny).samfast_base == record
    assert pickle.loads(pickle.dumps(tiny)).samfast_base == record
    assert not [name for name in tiny.state_dict() if "samfast" in name]


def test_the_default_device_is_not_used():
    with torch.device("meta"):
        sam = build_sam("vit_tiny", image_size=32, seed=0)
    assert {t.device.type for t in [*sam.parameters(), *sam.buffers()]} == {"cpu"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"name": "vit_hh"},
            "unknown model 'vit_hh'; the models are vit_h, vit_b, vit_l, vit_tiny",
        ),
        ({"name": "VIT-TINY"}, "unknown model 'VIT-TINY'; the models are vit_tiny, "),
        ({"name": None}, "unknown model None; the models are "),
        ({"name": "vit_b"}, "vit_b needs a checkpoint .*random_init=True"),
        ({"name": "vit_tiny", "device": "cuda"}, "device is 'cuda'; Sam is built on the cpu"),
        ({"name": "vit_b", "checkpoint": "a.pth", "device": "meta"}, "device is 'meta'; Sam is"),
        (
            {"name": "vit_b", "checkpoint": "a.pth", "random_init": True},
            "vit_b cannot be random and from checkpoint a.pth; give only one",
        ),
        *(
            ({"name": "vit_tiny", "image_size": size}, "image size .* positive multiple of 16")
            for size in (0, -16, 100, True, 64.0, "64")
        ),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_sam(**arguments)


def test_without_memory():
    """A Sam on the meta device has the shapes of the one on the CPU."""
    empty, real = (build_sam("vit_tiny", device=device) for device in ("meta", "cpu"))
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert {k: v.shape for k, v in empty.state_dict().items()} == {
        k: v.shape for k, v in real.state_dict().items()
    }
