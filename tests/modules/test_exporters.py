# SPDX-License-Identifier: Apache-2.0
"""torch.jit.trace and torch.onnx.export say what to call; torch.export takes fused models."""

import pytest
import torch

import samfast

SENTENCE = r"do not support samfast's operators; give them samfast\.export_form\(model\)"
IMAGES = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64)
FLAGS = "torch.onnx._internal.exporter._flags._is_onnx_exporting"


@pytest.fixture
def sam(tiny_sam):
    """Two blocks, one with windows and one without."""
    model = tiny_sam().eval()
    model.image_encoder.blocks = model.image_encoder.blocks[1:3]
    return model


def trace(model):
    return torch.jit.trace(model.image_encoder, (IMAGES,), check_trace=False)


def legacy_onnx(model):
    torch.onnx.export(model.image_encoder, (IMAGES,), "never.onnx", dynamo=False)


def assert_same(exported, model):
    with torch.no_grad():
        assert torch.equal(exported(IMAGES.flip(3)), model.image_encoder(IMAGES.flip(3)))


@pytest.mark.parametrize("export", [trace, legacy_onnx])
def test_fused_and_attached_models_say_what_to_call(sam, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=SENTENCE):
        export(samfast.fuse(sam))
    samfast.unfuse(samfast.attach(sam, samfast.Lora(rank=2)))
    with pytest.raises(RuntimeError, match=SENTENCE):
        export(sam)
    with pytest.raises(RuntimeError, match=SENTENCE):
        export(samfast.merge(samfast.fuse(sam)))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_the_sentence_says_works(sam, move):
    samfast.fuse(move(samfast.attach(sam, samfast.Lora(rank=2))))
    form = samfast.export_form(sam)
    assert_same(trace(form), form)
    assert_same(trace(samfast.merge(samfast.unfuse(sam))), sam)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "method",
    [
        samfast.AdaptFormer(bottleneck=4),
        pytest.param(samfast.CobotLora(rank=4), marks=pytest.mark.slow),
        pytest.param(samfast.Kronecker(n=4), marks=pytest.mark.slow),
        pytest.param(samfast.TaLora(tasks=("a", "b")), marks=pytest.mark.slow),
    ],
    ids=lambda method: method.name,
)
def test_methods_trace_on_the_reference_backend(sam, move, method, monkeypatch):
    move(samfast.attach(sam, method))
    with pytest.raises(RuntimeError, match=SENTENCE):
        trace(sam)
    monkeypatch.setenv("SAMFAST_BACKEND", "reference")
    assert_same(trace(sam), sam)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_choice_of_experts_is_not_recorded(sam, backend, monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    samfast.attach(sam, samfast.ConvLora(rank=2, experts=2))
    with pytest.raises(RuntimeError, match=r"would fix the experts .*samfast\.export_form"):
        trace(sam)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_export_takes_fused_models(sam, move, strict, monkeypatch):
    samfast.fuse(move(samfast.attach(sam, samfast.Lora(rank=2))))
    sam.image_encoder.blocks = sam.image_encoder.blocks[:1]
    program = torch.export.export(sam.image_encoder, (IMAGES,), strict=strict)
    assert_same(program.module(), sam)
    torch.onnx.is_in_onnx_export()  # imports the flag
    monkeypatch.setattr(FLAGS, True)  # torch.onnx.export(dynamo=True) sets it around torch.export
    with pytest.raises(Exception, match=SENTENCE):
        torch.export.export(sam.image_encoder, (IMAGES,), strict=strict)


@pytest.mark.slow
def test_the_exporter_of_onnx_programs(sam, tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=SENTENCE):
        torch.onnx.export(samfast.fuse(sam).image_encoder, (IMAGES,), tmp_path / "x", dynamo=True)
