# SPDX-License-Identifier: Apache-2.0
"""``samfast export`` writes ONNX files that give in onnxruntime what torch gives."""

import copy
import json
import re

import pytest
import torch

import samfast
from samfast import cli
from samfast.export import onnx_check, onnx_files
from samfast.export.parts import PromptDecoder
from samfast.methods.conv_lora.dense import DenseConvLora
from samfast.models import (
    MultiTaskSam,
    Task,
    architectures,
    binary_head,
    build_sam,
    encode,
    segment,
)
from tests import sam3_models

ABSENT = onnx_files.missing_packages()
needs_onnx = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))

SIZE = 64
SMALL = architectures.Architecture(48, 2, 3, (1,), window=3, image_size=SIZE)
SMALLEST = architectures.Architecture(48, 1, 3, (), window=3, image_size=SIZE)
TASKS = (Task("kinds", "semantic", 3), Task("cells", "binary"), Task("depth", "regression"))
NAMES = tuple(task.name for task in TASKS)
ALLOWED = 1e-3  # of a logit, whatever computes it in float32
METHODS = {
    "conv-lora": samfast.ConvLora(experts=3, target=("qkv", "proj", "lin1")),
    "lora": samfast.Lora(target=("qkv", "proj", "lin1", "lin2")),
    "cobot-lora": samfast.CobotLora(),
    "kronecker": samfast.Kronecker(),
    "adaptformer": samfast.AdaptFormer(),
    "cobot-adaptformer": samfast.AdaptFormer(cobot=True),
    "decoder": samfast.DecoderOnly(),
}


@pytest.fixture
def base(monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, "vit_tiny", SMALL)
    return build_sam("vit_tiny", image_size=SIZE, seed=3)


def adapter(base, method, folder, tasks=(), head=None):
    """An adapter some way from where it began, with a gate that decides clearly."""
    model = copy.deepcopy(base)
    model = head(model) if head else model
    model = MultiTaskSam(model, tasks) if tasks else model
    model = samfast.attach(model, method, train=model.trained_parts() if tasks else None)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 2.0 if name.endswith("w_gate") else 0.05
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return samfast.save_adapter(model, folder)


def export(adapter, output, *more):
    return cli.main(["export", "--adapter", str(adapter), "--output", str(output), *more])


def pictures():
    """Two that differ so much that they go to different experts."""
    images = 255 * torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    images[1] = 255 - images[1] / 8
    return images


def run(path, **given):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {own.name for own in session.get_inputs()}
    arrays = {name: tensor.numpy() for name, tensor in given.items() if name in names}
    assert set(arrays) == names
    return [torch.from_numpy(array) for array in session.run(None, arrays)]


def assert_near(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < ALLOWED


def routes_differ(model, images):
    """Whether some layer of the encoder sends the two images to different experts."""
    form, found = samfast.export_form(model), []
    for layer in form.modules():
        if isinstance(layer, DenseConvLora):
            own = layer.routes

            def routes(h, own=own):
                found.append(own(h)[0])
                return own(h)

            layer.routes = routes
    encode(form, images)
    return any(not torch.equal(*index.chunk(2)) for index in found)


@pytest.mark.slow_on_cpu
@needs_onnx
@torch.no_grad()
def test_an_encoder_takes_a_batch_of_different_experts(tmp_path, monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, "vit_tiny", SMALLEST)
    base = build_sam("vit_tiny", image_size=SIZE, seed=3)
    folder = adapter(base, samfast.ConvLora(experts=2), tmp_path / "adapter")
    model, images, path = samfast.load_adapted(folder), pictures(), tmp_path / "encoder.onnx"
    assert routes_differ(model, images)
    onnx_files.write_encoder(samfast.export_form(model), path, 18)
    for some in (images, images[:1], images[1:], images.repeat(2, 1, 1, 1)):
        assert_near(run(path, images=some)[0], encode(model, some))


@pytest.mark.parametrize("head", [None, binary_head])
@torch.no_grad()
def test_a_decoder_takes_prompts_as_segment_does(head, base):
    """In torch: what is exported."""
    model = head(base) if head else base
    decoder, images = PromptDecoder(samfast.export_form(model)), pictures()
    for prompts, coords, labels in prompts_of(2):
        given = onnx_files.prompt_inputs(SIZE, encode(model, images), coords, labels)
        assert_near(decoder(**given)[0], segment(model, images, **prompts))


@torch.no_grad()
def test_a_decoder_is_segment_anything_s_own(base):
    """With so many points that SamOnnxModel takes the first mask token too."""
    decoder = PromptDecoder(samfast.export_form(base))
    for own, theirs, size in own_and_theirs(base, lambda given: decoder(**given)):
        assert_near(own, theirs)
        assert own.dim() != 4 or own.shape[2:] in (size, (16, 16))


@needs_onnx
@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_onnxruntime_gives_torch_s_masks(name, base, tmp_path, capsys):
    import onnx

    folder = adapter(base, METHODS[name], tmp_path / "adapter")
    assert export(folder, tmp_path / "new" / "onnx", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == ["decoder.onnx", "encoder.onnx"] and told["opset"] == 18
    files = tmp_path / "new" / "onnx"
    assert sorted(path.name for path in files.iterdir()) == told["files"]
    for file in told["files"]:
        written = onnx.load(files / file)
        assert [(own.domain, own.version) for own in written.opset_import] == [("", 18)]
        assert not written.functions

    model = samfast.load_adapted(folder)
    images = pictures()
    assert routes_differ(model, images) == isinstance(METHODS[name], samfast.ConvLora)
    for some in (images, images[:1]):
        (embeddings,) = run(files / "encoder.onnx", images=some)
        assert_near(embeddings, encode(model, some))
        for prompts, coords, labels in prompts_of(len(some)):
            given = onnx_files.prompt_inputs(SIZE, embeddings, coords, labels)
            masks, quality, low_res = run(files / "decoder.onnx", **given)
            assert_near(masks, segment(model, some, **prompts))
            assert quality.shape == (len(some), 1) and low_res.shape == (len(some), 1, 16, 16)


def prompts_of(batch):
    """As ``segment`` takes them, and as segment_anything's ONNX decoder does."""
    coords = torch.tensor([[[9.0, 7.0], [40.0, 50.0]], [[30.0, 3.0], [33.0, 60.0]]])[:batch]
    labels, corners = (torch.tensor([own]).repeat(batch, 1) for own in ([1.0, 0.0], [2.0, 3.0]))
    found = [({}, coords[:, :0], labels[:, :0]), ({"boxes": coords.flatten(1)}, coords, corners)]
    for count in (1, 2):
        points = coords[:, :count], labels[:, :count]
        padded = torch.cat([points[0], torch.zeros(batch, 1, 2)], 1)
        kinds = torch.cat([points[1], -torch.ones(batch, 1)], 1)
        found.append(({"points": points}, padded, kinds))
    return found


def own_and_theirs(model, run_own):
    """Outputs of a decoder and of SamOnnxModel, and the photo's size."""
    from segment_anything.utils.onnx import SamOnnxModel

    stock = SamOnnxModel(model, return_single_mask=True)
    generator = torch.Generator().manual_seed(8)
    coords = SIZE * torch.rand(1, 5, 2, generator=generator)
    embeddings = torch.randn(1, 256, 4, 4, generator=generator)
    for labels, size, has in (
        ([1.0, 0.0, 2.0, 3.0, -1.0], (37, 90), 0.0),
        ([1.0, 1.0, 0.0, 0.0, -1.0], (150, 41), 1.0),
    ):
        given = onnx_files.prompt_inputs(SIZE, embeddings, coords, torch.tensor([labels]), size)
        given["mask_input"] = torch.randn(1, 1, 16, 16, generator=generator)
        given["has_mask_input"] = torch.tensor([has])
        for own, theirs in zip(run_own(given), stock(**given), strict=True):
            yield own, theirs, size


@needs_onnx
@pytest.mark.slow_on_cpu
@torch.no_grad()
def test_a_file_gives_what_segment_anything_s_own_decoder_gives(base, tmp_path):
    folder = adapter(base, samfast.DecoderOnly(), tmp_path / "adapter")
    assert export(folder, tmp_path / "onnx") == 0
    model, path = samfast.load_adapted(folder, fuse=False), tmp_path / "onnx" / "decoder.onnx"
    for own, theirs, _ in own_and_theirs(model, lambda given: run(path, **given)):
        assert_near(own, theirs)


@needs_onnx
@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("method", [samfast.Lora(), samfast.TaLora(tasks=NAMES)])
@torch.no_grad()
def test_each_task_has_a_decoder(method, base, tmp_path, capsys):
    folder = adapter(base, method, tmp_path / "adapter", TASKS)
    assert export(folder, tmp_path / "onnx", "--json") == 0
    apart = isinstance(method, samfast.TaLora)
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"] == list(NAMES)
    encoders = {name: f"encoder_{name}.onnx" if apart else "encoder.onnx" for name in NAMES}
    assert set(told["files"]) == {*encoders.values(), *(f"decoder_{n}.onnx" for n in NAMES)}
    model, images = samfast.load_adapted(folder), pictures()
    for some in (images, images[:1]):
        for name, encoder in encoders.items():
            (embeddings,) = run(tmp_path / "onnx" / encoder, images=some)
            file = tmp_path / "onnx" / f"decoder_{name}.onnx"
            (logits,) = run(file, image_embeddings=embeddings)
            assert_near(logits, model(some, name))


@needs_onnx
@pytest.mark.slow_on_cpu
def test_one_of_several_tasks(base, tmp_path):
    folder = adapter(base, samfast.TaLora(tasks=NAMES), tmp_path / "adapter", TASKS)
    assert export(folder, tmp_path / "onnx", "--task", "cells") == 0
    names = sorted(path.name for path in (tmp_path / "onnx").iterdir())
    assert names == ["decoder_cells.onnx", "encoder_cells.onnx"]


@needs_onnx
@pytest.mark.slow_on_cpu
@torch.no_grad()
def test_a_head_of_one_mask_and_a_newer_opset(base, tmp_path):
    import onnx

    folder = adapter(base, samfast.Lora(), tmp_path / "adapter", head=binary_head)
    assert export(folder, tmp_path / "onnx", "--opset", "20") == 0
    for name in ("encoder.onnx", "decoder.onnx"):
        (own,) = onnx.load(tmp_path / "onnx" / name).opset_import
        assert own.version == 20


@needs_onnx
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("options", "words", "says"),
    [
        ({}, ["m.onnx"], "expected --output to be a folder without a suffix, got .*m.onnx"),
        ({}, ["m", "--task", "cells"], "no tasks; leave out --task"),
        ({"tasks": TASKS}, ["m", "--task", "birds"], "birds"),
        ({}, ["m", "--checkpoint", "other.pth"], "other.pth is not its base"),
        ({}, ["m", "--opset", "17"], "expected --opset 18 to 23, got 17"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(options, words, says, base, tmp_path, capsys):
    folder = adapter(base, samfast.Lora(), tmp_path / "adapter", options.get("tasks", ()))
    before = sorted(tmp_path.rglob("*"))
    assert export(folder, tmp_path / words[0], *words[1:]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(says, said), said
    assert sorted(tmp_path.rglob("*")) == before


@needs_onnx
def test_nothing_is_replaced(base, tmp_path, capsys):
    folder = adapter(base, samfast.Lora(), tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_bytes(b"mine")
    assert export(folder, tmp_path / "full") == 2
    assert "exists; name another" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


@needs_onnx
def test_a_file_that_differs_leaves_nothing(base, tmp_path, capsys, monkeypatch):
    folder = adapter(base, samfast.Lora(), tmp_path / "adapter")
    before = sorted(tmp_path.rglob("*"))

    def write(form, path, opset):
        path.write_bytes(b"onnx")

    def check(path, images, embeddings):
        assert path.read_bytes() == b"onnx" and embeddings.shape == (2, 256, 4, 4)
        return onnx_check.agreement(path, embeddings + 0.1 * embeddings.abs().max(), embeddings)

    monkeypatch.setattr(onnx_files, "write_encoder", write)
    monkeypatch.setattr(onnx_check, "check_encoder", check)
    assert export(folder, tmp_path / "onnx") == 2
    assert re.search(r"encoder\.onnx differs from torch by .* nothing was written",
                     capsys.readouterr().err)  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


def test_what_counts_as_agreement(tmp_path):
    expected = torch.tensor([4.0, -2.0])
    assert onnx_check.agreement(tmp_path / "a.onnx", expected + 0.003, expected) > 0
    for wrong in (expected + 0.005, torch.tensor([4.0, float("nan")])):
        with pytest.raises(ValueError, match=r"a\.onnx differs from torch by .*at most 0\.004"):
            onnx_check.agreement(tmp_path / "a.onnx", wrong, expected)
    with pytest.raises(ValueError, match=r"a\.onnx gives shape \(1,\)"):
        onnx_check.agreement(tmp_path / "a.onnx", expected[:1], expected)


@pytest.mark.parametrize("absent", [{"onnxruntime"}, {"onnx", "onnxscript"}])
def test_packages_that_are_missing(absent, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_files, "installed", lambda name: name not in absent)
    assert export(tmp_path, tmp_path / "onnx") == 2
    said = capsys.readouterr().err
    verb = "is" if len(absent) == 1 else "are"
    assert f"but {' and '.join(sorted(absent))} {verb} not installed" in said
    assert 'pip install "samfast[export]"' in said and said.count("\n") == 1


@needs_onnx
def test_sam3_is_refused(tmp_path, capsys):
    sam3_models.tracker().save_pretrained(tmp_path / "base")
    sam = build_sam("sam3", checkpoint=tmp_path / "base")
    sam = samfast.attach(sam, samfast.Lora(target=("q_proj", "v_proj")))
    folder = samfast.save_adapter(sam, tmp_path / "adapter")
    capsys.readouterr()
    assert export(folder, tmp_path / "onnx", "--checkpoint", str(tmp_path / "base")) == 2
    said = capsys.readouterr().err
    assert "was trained on SAM 3, which samfast does not write as ONNX" in said
    assert said.count("\n") == 1 and not (tmp_path / "onnx").exists()
