# SPDX-License-Identifier: Apache-2.0
"""Embeddings of a frozen encoder: each once, the same bits, said beforehand, or not kept."""

import json
import sys

import pytest
import torch
from conftest import fill_folder

from samfast import cli
from samfast.files.format import TENSORS
from samfast.models import encode
from samfast.training import embeddings
from samfast.training.build import attach_method, build_base
from samfast.training.data import Collate, PairDataset
from samfast.training.folders import load_split
from samfast.training.segmenters import Segmenter
from samfast.training.settings import FinetuneSettings

TRAIN, VAL = 5, 1  # of six pictures
LINE = "--model vit_tiny --image-size 64 --epochs 2 --repeats 1 --seed 3 --method decoder".split()


@pytest.fixture
def encoded(monkeypatch):
    """How many images the encoder has seen, in each of its calls."""
    from samfast.integrations import segment_anything

    kind = segment_anything.load().modeling.image_encoder.ImageEncoderViT
    forward, counts = kind.forward, []

    def counted(self, x):
        counts.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", counted)
    return counts


def trained(data, output, *more) -> dict[str, bytes]:
    """The bytes of a run's adapters, and its table without the columns of time and memory."""
    argv = ["finetune", "--data", data, "--output", output, "--overlays", 1, *LINE, *more]
    assert cli.main([str(word) for word in argv]) == 0
    found = {name: (output / "adapter" / name / TENSORS).read_bytes() for name in ("last", "best")}
    table = (output / "metrics.csv").read_text().splitlines()
    found["table"] = [row.split(",")[:5] for row in table]
    return found


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--fuse"], marks=pytest.mark.slow_on_cpu),
        pytest.param(["--no-fuse"], marks=pytest.mark.slow),
        pytest.param(["--fuse", "--precision", "bf16"], marks=pytest.mark.slow),
        pytest.param(["--fuse", "--prompt", "box"], marks=pytest.mark.slow_on_cpu),
    ],
    ids=" ".join,
)
def test_the_same_bits_with_and_without(shared_data, tmp_path, capsys, encoded, more):
    """With batches of one image; in larger ones the encoder's products round otherwise."""
    more = ["--batch-size", 1, "--no-flips", *more]
    kept = trained(shared_data, tmp_path / "kept", *more)
    assert encoded == [1] * (TRAIN + VAL)
    said = capsys.readouterr().out
    assert "keeps 6 embeddings, 96.0 KiB in main memory; --no-cache recomputes them" in said
    anew = trained(shared_data, tmp_path / "anew", *more, "--no-cache")
    assert len(encoded) > 2 * (TRAIN + VAL) and "embedding" not in capsys.readouterr().out
    assert kept == anew
    assert json.loads((tmp_path / "anew" / "settings.json").read_text())["cache"] is False


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["--fuse", "--no-fuse"])
def test_larger_batches_train_as_if_each_image_were_encoded_alone(
    shared_data, tmp_path, monkeypatch, fuse
):
    more = ["--batch-size", 3, "--no-flips", fuse]
    kept = trained(shared_data, tmp_path / "kept", *more)

    def alone(sam, images):
        return torch.cat([encode(sam, image[None]) for image in images])

    monkeypatch.setattr(sys.modules["samfast.models.segment"], "encode", alone)
    assert kept == trained(shared_data, tmp_path / "anew", *more, "--no-cache")


def test_only_images_that_never_change_have_names(shared_data):
    pairs = load_split(shared_data).train
    for flips in (False, True):
        data = PairDataset(pairs, 64, flips=flips, prompt="box", box_jitter=1.0)
        names = tuple(str(pair.image) for pair in pairs[:2])
        batch = Collate(64, truths=False)([data[0, 3], data[1, 0]])
        assert batch.names == (() if flips else names)
    mixed = Collate(64, truths=False)([data[0], PairDataset(pairs, 64, prompt="box")[1]])
    assert mixed.names == ()


@pytest.mark.slow_on_cpu
def test_mirrored_images_are_encoded_anew_and_others_once(shared_data, tmp_path, capsys, encoded):
    trained(shared_data, tmp_path / "out", "--batch-size", 1)
    assert len(encoded) == 2 * TRAIN + VAL  # of two epochs
    assert "keeps 1 embedding, 16.0 KiB" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trained_encoder_keeps_nothing(tmp_path, capsys):
    data = fill_folder(tmp_path / "data")
    (data / "tasks.yaml").write_text("tasks:\n  - {name: spots}\n")
    for more in (["--method", "lora"], ["--tasks", data / "tasks.yaml"]):
        trained(data, tmp_path / more[0], "--no-flips", *more)
        assert "embedding" not in capsys.readouterr().out


def model_of(**options) -> Segmenter:
    settings = FinetuneSettings(model="vit_tiny", image_size=64, method="decoder", **options)
    dtypes = {"bf16": torch.bfloat16, "auto": torch.float32}
    base = None if settings.base_dtype == "auto" else torch.bfloat16
    sam = attach_method(build_base(settings), settings, base)
    return Segmenter(sam, dtypes[settings.precision]).eval()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("base_dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_an_embedding_has_the_bytes_that_were_said(fuse, base_dtype, precision):
    model = model_of(fuse=fuse, base_dtype=base_dtype, precision=precision)
    model.kept = embeddings.KeptEmbeddings()
    with torch.no_grad():
        model(
            torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.full((2, 2), 64), None, ("a", "b")
        )
    for kept in model.kept.by_name.values():
        assert kept.nbytes == embeddings.embedding_bytes(model)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_batch_may_mix_kept_and_new_images(fuse):
    """Each row is the image's own, whatever was met before, and near that of a whole batch."""
    model = model_of(fuse=fuse)
    sam, keep = model.sam, embeddings.KeptEmbeddings()
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.manual_seed(5)).float()
    own = [encode(sam, image[None]) for image in images]
    names = ("a", "b", "c", "d")
    for rows in ([1], [0, 1], [3, 2, 1, 0], [2, 2]):
        found = keep(sam, images[rows], [names[i] for i in rows])
        assert torch.equal(found, torch.cat([own[i] for i in rows]))
        assert found.stride()[1:] == encode(sam, images[rows]).stride()[1:]
    assert list(keep.by_name) == ["b", "a", "d", "c"]
    assert torch.equal(keep(sam, images, ()), encode(sam, images)) and len(keep.by_name) == 4
    exact = encode(model_of(fuse=False).sam.double(), images.double())
    ours, whole = ((e - exact).abs().max() for e in (torch.cat(own), encode(sam, images)))
    assert ours <= 4 * whole  # rounding of the same size


def test_the_free_memory_is_that_of_machine_and_container(tmp_path, monkeypatch):
    whole = embeddings.free_memory()
    assert whole is None or whole > 0
    for name, text in (("max", "10000"), ("current", "9000"), ("stat", "anon 5\ninactive_file 70")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(embeddings, "_CGROUP", tmp_path)
    assert embeddings.free_memory() == 1070
    (tmp_path / "memory.max").write_text("max\n")
    assert embeddings.free_memory() != 1070


def test_too_little_memory_is_said_and_nothing_kept(monkeypatch):
    model, said = model_of(), []
    settings = FinetuneSettings(method="decoder", flips=False)
    for free, kept in ((2 * 96 * 2**10 - 1, False), (2 * 96 * 2**10, True), (None, True)):
        monkeypatch.setattr(embeddings, "free_memory", lambda free=free: free)
        model.kept = None
        embeddings.keep_embeddings(model, settings, 5, 1, said.append)
        assert (model.kept is not None) is kept
    assert said[0] == (
        "recomputes 6 embeddings each time: they would take 96.0 KiB, more than half of the free "
        "main memory (192.0 KiB)"
    )
    assert said[1] == said[2] != said[0]


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    said = []
    settings = FinetuneSettings(method="decoder", flips=False)
    embeddings.keep_embeddings(model_of(), settings, 5, 1, said.append)
    assert said[0].startswith("keeps 16 embeddings, 256.0 KiB")
