# SPDX-License-Identifier: Apache-2.0
"""segment in DistributedDataParallel's forward, which waits for every trained parameter."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import samfast
from samfast.models import TRAINED_DECODER, binary_head, build_sam, segment

IMAGES = torch.arange(3 * 64 * 64).view(1, 3, 64, 64).remainder(256).to(torch.uint8)


class Segmenter(nn.Module):
    def __init__(self, sam):
        super().__init__()
        self.sam = sam

    def forward(self, images):
        return segment(self.sam, images)


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def attached(train=("mask_decoder",), head=lambda sam: sam):
    sam = build_sam("vit_tiny", image_size=64, seed=0)
    sam.image_encoder.blocks = sam.image_encoder.blocks[:1]
    return samfast.attach(head(sam), samfast.Lora(rank=2), train=train)


def two_steps(model):
    for _ in range(2):
        model(IMAGES).square().mean().backward()


@pytest.mark.parametrize(
    ("train", "head", "named"),
    [
        (
            "mask_decoder",
            lambda sam: sam,
            r"24 parameters that segment does not read \(mask_decoder\.output_hypernetworks_mlps\."
            r"1, mask_decoder\.output_hypernetworks_mlps\.2, .*, 1 more\)",
        ),
        ("mask_decoder", binary_head, r"6 parameters .* \(mask_decoder\.iou_prediction_head\)"),
        (
            (*TRAINED_DECODER, "prompt_encoder.mask_downscaling.0"),
            lambda sam: sam,
            r"2 parameters .* \(prompt_encoder\.mask_downscaling\.0\)",
        ),
    ],
)
def test_trained_parameters_that_are_not_read_are_named(group, train, head, named):
    model = DistributedDataParallel(Segmenter(attached(train, head)))
    with pytest.raises(RuntimeError, match=rf"{named}; attach with train=.*TRAINED_DECODER, or"):
        model(IMAGES)
    with torch.no_grad():
        model(IMAGES)
    two_steps(model.module)  # outside of it nothing waits


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}])
def test_nothing_is_said_where_nothing_waits(group, options):
    two_steps(DistributedDataParallel(Segmenter(attached()), **options))


def test_ignored_parameters_are_not_waited_for(group):
    model = Segmenter(attached())
    ignored = [f"sam.{name}" for name in samfast.report(model.sam).unread]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    two_steps(DistributedDataParallel(model))


def test_the_decoder_of_one_mask_trains(group):
    two_steps(DistributedDataParallel(Segmenter(attached(TRAINED_DECODER))))


def test_segment_does_not_go_past_the_forward_that_averages(group):
    model = DistributedDataParallel(Segmenter(attached(TRAINED_DECODER)))
    with pytest.raises(RuntimeError, match="bypasses DistributedDataParallel's forward, so grad"):
        segment(model, IMAGES)
    with torch.no_grad():
        assert torch.equal(segment(model, IMAGES), model(IMAGES))
    plain = DistributedDataParallel(build_sam("vit_tiny", image_size=64))
    with pytest.raises(ValueError, match=r"inside a DistributedDataParallel, .* attach first, th"):
        samfast.attach(plain, samfast.Lora(rank=2))


def test_report_lists_what_is_trained_and_not_read():
    report = samfast.report(attached())
    assert len(report.unread) == 24
    assert "24 trained tensors of mask_decoder.output_hypernetworks_mlps.1, " in str(report)
    report = samfast.report(attached(TRAINED_DECODER))
    assert report.unread == () and "not read by segment" not in str(report)
