# SPDX-License-Identifier: Apache-2.0
"""--fit and --memory auto: what is chosen, what stays, and what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from samfast import cli
from samfast.counters import Counts
from samfast.kernels.relpos_attention import flops as attention_flops
from samfast.kernels.window_attention import flops as plain_flops
from samfast.models.architectures import ARCHITECTURES
from samfast.training import dry_run, loop, plan
from samfast.training.card import card_bytes, needed, room
from samfast.training.gpu_autocast import GpuAutocast
from samfast.training.precision import autocast_dtype
from samfast.training.recipe import with_recipe
from samfast.training.settings import FinetuneSettings
from samfast.training.step_counts import Worst, closed_operators

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
KEPT = {"fast": 1000, "balanced": 400, "minimal": 200}  # MB of each image, as counted here
FLOP = {"fast": 3, "balanced": 4, "minimal": 5}
MB = 10**6


@pytest.fixture
def tried(monkeypatch):
    """The settings of each step that was counted; 100 MB, what is kept, 50 MB of each object."""
    made = []

    def counted(settings, device):
        made.append(settings)
        chunk, batch, mode = settings.decoder_chunk, settings.batch_size, settings.memory or "fast"
        objects = batch if chunk is None else min(chunk, batch)
        forward = Counts(flops=(FLOP[mode] + (chunk is not None)) * batch * 10**12)
        forward.launches["product"] = 1000
        peak = MB * (100 + KEPT[mode] * batch + 50 * objects)
        return Worst({"saved": peak}, forward, Counts())

    monkeypatch.setattr(plan, "counted", counted)
    return made


def card(megabytes: float) -> str:
    """A GPU with room for tensors of so many bytes, as an option."""
    return f"{needed(round(megabytes * MB)) / MB:.3f}MB"


def settings(**options):
    return FinetuneSettings(model="vit_tiny", dry_run=True, **options)


@pytest.mark.parametrize(
    ("free", "given", "expected"),
    [
        (4301, {"batch_size": 4}, ("fast", 4, 1, None)),
        (4151, {"batch_size": 4}, ("fast", 2, 2, None)),  # chunks of 1 need 4150: more FLOP
        (1151, {"batch_size": 4}, ("fast", 1, 4, None)),
        (1149, {"batch_size": 4}, ("balanced", 2, 2, None)),
        (349, {"batch_size": 1}, None),
        (351, {"batch_size": 1}, ("minimal", 1, 1, None)),
        (2201, {"batch_size": 2, "accumulate": 3}, ("fast", 2, 3, None)),
        (2201, {"batch_size": 1, "accumulate": 6}, ("fast", 2, 3, None)),
        (9000, {"memory": "minimal"}, ("minimal", 2, 1, None)),
        (2151, {"decoder_chunk": 1}, ("fast", 2, 1, 1)),
        (2201, {"fuse": False}, (None, 2, 1, None)),
    ],
)
def test_the_fastest_that_fits(tried, free, given, expected):
    wanted = settings(fit=card(free), **given)
    if expected is None:
        with pytest.raises(ValueError, match="nothing fits"):
            plan.planned(wanted, CUDA)
        return
    found, made = plan.planned(wanted, CUDA)
    chosen = (found.memory, found.batch_size, found.accumulate, found.decoder_chunk)
    assert chosen == expected
    assert found.fit is None
    assert made.peak <= room(made.card)
    words = made.options().split()
    assert f"--batch-size {expected[1]} --accumulate {expected[2]}" in made.options()
    assert ("--memory" in words) == (expected[0] is not None)
    again, _ = plan.planned(settings(fit=card(free), **{**given, "memory": expected[0]}), CUDA)
    assert again.batch_size == found.batch_size


def test_what_is_named_is_told_where_nothing_fits(tried):
    wanted = settings(fit="1GB", memory="fast", decoder_chunk=1, batch_size=2)
    least = -(-needed(1150 * MB) // 10**7) / 100  # GB, upwards: with so many it fits
    sentence = (
        f"nothing fits 1 GB: --memory fast --batch-size 1 --accumulate 2 --decoder-chunk 1 needs "
        f"{least:.2f} GB with the reserve; leave out --memory fast and --decoder-chunk 1, take a "
        "smaller --image-size or a smaller --model"
    )
    with pytest.raises(ValueError) as raised:
        plan.planned(wanted, CUDA)
    assert str(raised.value) == sentence


def test_memory_auto_changes_only_the_mode(tried, monkeypatch):
    monkeypatch.setattr(plan, "memory_of", lambda device: needed(1100 * MB))
    found, made = plan.planned(settings(memory="auto", batch_size=2, accumulate=2), CUDA)
    assert (found.memory, found.batch_size, found.accumulate) == ("balanced", 2, 2)
    assert all(one.batch_size == 2 and one.decoder_chunk is None for one in tried)
    assert "--memory balanced" in made.sentence()
    monkeypatch.setattr(plan, "memory_of", lambda device: needed(100 * MB))
    with pytest.raises(ValueError, match=r"minimal.* needs .* add --fit auto"):
        plan.planned(settings(memory="auto", batch_size=2), CUDA)


def test_memory_auto_on_a_cpu_is_fast(tried):
    assert plan.planned(settings(memory="auto"), CPU) == (settings(memory="fast"), None)
    assert plan.planned(settings(), CUDA) == (settings(), None)
    assert tried == []


def test_a_smaller_gpu_at_hand_is_refused(tried, monkeypatch):
    monkeypatch.setattr(plan, "memory_of", lambda device: 8 * 10**9)
    real = FinetuneSettings(model="vit_tiny", fit="12GB")
    with pytest.raises(ValueError, match="fit is 12GB, but this GPU has 8 GB"):
        plan.planned(real, CUDA)
    assert plan.planned(settings(fit="12GB"), CUDA)[1].card == 12 * 10**9
    assert plan.planned(settings(fit="auto"), CUDA)[1].card == 8 * 10**9
    assert plan.planned(settings(fit="auto"), CUDA, card=4 * 10**9)[1].card == 4 * 10**9


def test_units():
    sizes = {"12GB": 12 * 10**9, "12 gib": 12 * 2**30, "1.5GB": 15 * 10**8, "900MB": 9 * 10**8}
    assert {text: card_bytes(text) for text in sizes} == sizes
    assert card_bytes("auto") is None
    assert room(needed(10**9)) >= 10**9 > room(needed(10**9) - 10)


def test_a_card_that_is_not_here_computes_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert autocast_dtype("auto", CUDA) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    emulates = {"including_emulation": True}
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda **given: {**emulates, **given}["including_emulation"],
    )
    assert autocast_dtype("auto", CUDA) == torch.float16  # sm_75


def test_a_cpu_stands_for_a_gpu_s_autocast():
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.softmax(x, dim=1).dtype == torch.bfloat16  # of a CPU itself
        with GpuAutocast():
            made = [F.layer_norm(x, (4,)), torch.softmax(x, dim=1), x.pow(2), x**2]
            assert {t.dtype for t in made} == {torch.float32}
            assert (x @ x.t()).dtype == torch.bfloat16
    with GpuAutocast():
        assert x.softmax(1).dtype == torch.bfloat16


@pytest.mark.slow_on_cpu
def test_chunks_are_computed_again_as_a_gpu_would(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = dataclasses.replace(ARCHITECTURES["vit_tiny"], depth=1, global_blocks=())
    monkeypatch.setitem(ARCHITECTURES, "vit_tiny", small)
    both = [settings(image_size=64, decoder_chunk=chunk) for chunk in (None, 1)]
    whole, chunked = (plan.counted(with_recipe(one), CUDA) for one in both)
    assert chunked.flops > whole.flops


def test_attention_of_torch_s_path_is_looked_into(monkeypatch):
    monkeypatch.delenv("SAMFAST_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {}
    for capability in ((7, 5), (8, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        found[capability] = closed_operators("auto", CUDA)
    attention = {*attention_flops.OPERATORS, *plain_flops.OPERATORS}
    assert set(found[8, 6]) - set(found[7, 5]) == attention
    assert closed_operators("torch", CPU) == found[7, 5]


def test_processes_follow_the_smallest_gpu(tried, monkeypatch):
    """Which accelerate's gather_object tells them."""
    from accelerate import utils

    monkeypatch.setattr(loop, "memory_of", lambda device: 24 * 10**9)
    monkeypatch.setattr(utils, "gather_object", lambda own: [*own, needed(1151 * MB)])
    process = {"device": CUDA, "num_processes": 2, "is_main_process": False}
    found = loop._planned(settings(fit="auto"), SimpleNamespace(**process))
    assert (found.memory, found.batch_size, found.accumulate) == ("fast", 1, 2)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--fit", "12"), "fit is '12'; write a GPU's memory with its unit, such as 12GB"),
        (("--fit", "300MB"), "fit is 300MB; it must be above 0.5 GB"),
        (
            ("--fit", "12GB", "--memory", "auto", "--no-fuse"),
            "memory is auto, which only the fused",
        ),
        (
            ("--fit", "501MB", "--batch-size", 1),
            "nothing fits 0.5 GB: .* smaller --image-size or a",
        ),
    ],
)
def test_refused(refused, options, pattern, tried):
    refused("finetune", "--dry-run", "--model", "vit_tiny", *options, pattern=pattern)


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is a GPU that is here")
def test_auto_without_a_gpu_is_refused(refused):
    pattern = "fit is auto, but no GPU was found; give a memory size such as --fit 12GB"
    refused("finetune", "--dry-run", "--model", "vit_tiny", "--fit", "auto", pattern=pattern)


@pytest.mark.slow_on_cpu
def test_the_plan_is_printed_and_is_that_of_its_own_options(capsys):
    common = ["finetune", "--dry-run", "--model", "vit_tiny", "--image-size", "64", "--json"]
    assert cli.main([*common, "--fit", "1.1GB", "--batch-size", "4"]) == 0
    result = json.loads(capsys.readouterr().out)
    made = result["plan"]
    assert made["card_bytes"] == 1_100_000_000 and result["device"] == "cuda"
    assert (result["precision"], result["base_dtype"]) == ("bfloat16", "bfloat16")
    assert made["tensor_bytes"] == result["peak_bytes"]["total"] <= made["room_bytes"]
    assert dry_run.text(result).startswith(f"plan for 1.1 GB: {made['options']}; tensors take ")
    assert made["options"] == "--memory fast --batch-size 4 --accumulate 1"


@pytest.mark.slow_on_cpu
def test_a_run_says_its_plan_and_records_it(shared_data, tmp_path, capsys, tried):
    common = ["finetune", "--data", shared_data, "--model", "vit_tiny", "--image-size", 64]
    common += ["--epochs", 1, "--repeats", 1, "--overlays", 0]
    fit = ["--fit", card(451), "--batch-size", 2, "--output", tmp_path / "fit"]
    auto = ["--memory", "auto", "--output", tmp_path / "auto"]
    for more in (fit, auto):
        assert cli.main([str(word) for word in (*common, *more)]) == 0
    said = capsys.readouterr().out
    assert "--memory minimal --batch-size 1 --accumulate 2; tensors take" in said
    assert torch.cuda.is_available() or "memory auto is fast on a CPU" in said
    saved = json.loads((tmp_path / "fit" / "settings.json").read_text())
    assert [saved[name] for name in ("memory", "batch_size", "accumulate", "fit")] == [
        "minimal", 1, 2, None,
    ]  # fmt: skip
    assert json.loads((tmp_path / "auto" / "settings.json").read_text())["memory"] == "fast"
    resumed = [*common, *fit, "--epochs", 2, "--resume"]
    assert cli.main([str(word) for word in resumed]) == 0  # the same plan again
