# SPDX-License-Identifier: Apache-2.0
"""The model of a step: what it predicted first, what may change that, and measured rates."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from benchmarks import model, rates
from benchmarks.model import Block
from benchmarks.rates import Rates
from benchmarks.shapes import ENCODERS
from samfast.kernels.lora_linear.costs import Stage
from samfast.kernels.relpos_attention import tiling
from samfast.kernels.sam_block import costs
from samfast.models.architectures import ARCHITECTURES

FIRST = "bc6dec3"
LAUNCHES = Path(__file__).parent / "golden" / "vit_h_launches.json"  # batch 4, rank 4, at FIRST
DQ = "dq, factors, delta"  # of windows
WINDOWS, WHOLE = (Block("vit_h", 4, whole, 4) for whole in (False, True))


def frozen():
    """The file without what GPUs have shown, and without code that nobody runs."""
    data = rates.load()
    for rate in data["rates"].values():
        rate.pop("measured", None)
    counts = [row for row in data["counts"] if row["commit"] != rates.PROPOSED]
    return data | {"counts": counts}


@pytest.fixture
def data():
    return frozen()


def first_step(data, device="H100"):
    """ms of a step of ViT-H at batch 4 with the launches and machine code of FIRST."""
    known = Rates(data, device, FIRST)
    launches = json.loads(LAUNCHES.read_text(encoding="utf-8"))
    times = [
        sum(model.block_parts(block, known, [Stage(*row) for row in launches[place]]).values())
        for block, place in ((WINDOWS, "windowed"), (WHOLE, "global"))
    ]
    return model.by_depth("vit_h", *times, model.outside("vit_h", 4, known))


def times(data, block=WINDOWS, device="H100", commit=FIRST):
    known = Rates(data, device, commit)
    return {stage.name: model.launch(block, stage, known)[1] for stage in block.stages()}


def test_the_first_prediction_stays(data):
    assert round(first_step(data), 1) == 144.5
    assert round(first_step(data, "H200"), 1) == 136.8


def test_assumed_rates_and_first_counts_are_frozen(data):
    """A better rate is a measured one; other machine code is a new count."""
    fixed = [(name, rate["unit"], rate["assumed"]) for name, rate in data["rates"].items()]
    counts = [row for row in data["counts"] if row["commit"] == FIRST]
    digest = hashlib.sha256(json.dumps([sorted(fixed), counts]).encode()).hexdigest()
    assert digest[:16] == "c9cce4bb330c9ac3"


def test_a_count_changes_its_kernel_alone(data):
    for row in data["counts"]:
        if row["kernel"] in ("dq windows 80", "gelu adapter") and row["commit"] == FIRST:
            row["instructions"] *= 2
    before, after = times(frozen()), times(data)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {DQ, "GELU, h"}
    # 422 instructions of dq, and products of (26 16 + 2 32 + 2 8) / 2 = 248 cycles
    ratio = (after[DQ] - 1) / (before[DQ] - 1)
    assert round(ratio, 9) == round((2 * 422 + 248) / (422 + 248), 9)


def test_launches_flop_and_bytes_change_a_time(data):
    known = Rates(data, "H100")

    def time(name, **changes):
        (stage,) = (stage for stage in WINDOWS.stages() if stage.name == name)
        return model.launch(WINDOWS, dataclasses.replace(stage, **changes), known)[1]

    gap = data["rates"]["launch.gap"]["assumed"]
    assert time("proj: down", launches=2) == time("proj: down") + gap
    assert time("proj: down", bytes=0) == 1.0
    assert time("qkv: dx = dy W", flops=680 * 10**6) == 2.0


def test_terms_of_a_product_are_whole_tiles(data):
    """1280 columns and 16 behind them take 21 tiles of 64 terms."""
    made = times(data, commit=None)
    joint, plain = (made[f"qkv: {name}"] - 1 for name in (costs.JOINT, "dx = dy W"))
    assert round(joint / plain, 9) == round(21 / 20, 9)


def test_a_stage_nobody_knows_is_refused(data):
    with pytest.raises(ValueError, match=r"unknown stage 'one walk' of costs\.py; add it"):
        model.launch(WINDOWS, Stage("one walk", 1, 1, 1), Rates(data, "H100"))


@pytest.mark.parametrize("rank", [0, 4, 16])
@pytest.mark.parametrize("name", ENCODERS)
def test_counts_are_of_the_tiles_that_kernels_have(data, name, rank):
    known = Rates(data, "H100")
    row = model.step(name, 1, rank, known)
    assert (row["P1 windows"] > 1) == (row["P1 global"] > 1) == (rank > 0)
    parts = sum(row[part] for part in (*model.PARTS, "rest"))
    assert round(row["step"], 9) == round(parts, 9)


def test_another_tile_needs_other_counts(data, monkeypatch):
    chosen = tiling.blocks

    def taller(*arguments):
        block = chosen(*arguments)
        return block | {"BLOCK_M": 2 * block["BLOCK_M"]}

    monkeypatch.setattr(tiling, "blocks", taller)
    sentence = "no counts of forward windows 80 with a tile of 256x64 and 8 warps; read its machine"
    with pytest.raises(ValueError, match=sentence):
        model.step("vit_h", 4, 4, Rates(data, "H100"))
    assert times(data) == times(frozen())  # those of a commit keep their tile


def test_proposed_code_counts_only_when_asked_for(data):
    now = times(data, WHOLE, commit=None)
    row = [row for row in data["counts"] if row["kernel"] == "dkv global 80"][-1]
    data["counts"].append(row | {"instructions": 1, "commit": rates.PROPOSED})
    assert times(data, WHOLE, commit=None) == now
    then = times(data, WHOLE, commit=rates.PROPOSED)
    assert {name for name in now if then[name] < now[name]} == {"dk, dv"}
    with pytest.raises(ValueError, match="no counts of abc; expected one of bc6dec3"):
        Rates(data, "H100", "abc")


def test_a_measured_rate_replaces_the_assumed_one(data):
    name, launch = "gemm.vit_h.4", "lin1: dx = dy W"
    new = rates.measure(data, name, 340.0, "NVIDIA H200", "2030-01-02")
    new = rates.measure(new, name, 1.0, "NVIDIA H200", "2029-12-31")
    assert (times(new, device="H200")[launch] - 1) == 2 * (times(data, device="H200")[launch] - 1)
    assert times(new, device="H100") == times(data, device="H100")
    assert new["rates"][name]["assumed"] == 680 and "measured" not in data["rates"][name]
    assert Rates(new, "H200", FIRST).notes() == [
        "H200: gemm.vit_h.4 measured 340 TFLOP/s on NVIDIA H200, 2030-01-02 (assumed 680)"
    ]
    assert Rates(new, "H100").notes() == ["H100: all rates are assumed, none measured"]


@pytest.mark.parametrize(
    "name, value, date, sentence",
    [
        ("gemm.vit_x.4", 1.0, "2030-01-02", "unknown rate gemm.vit_x.4; expected one of gemm"),
        ("launch.gap", 0.0, "2030-01-02", "expected a positive number for launch.gap, got 0.0"),
        ("launch.gap", float("nan"), "2030-01-02", "for launch.gap, got nan"),
        ("launch.gap", 1.0, "yesterday", "Invalid isoformat string: 'yesterday'"),
        ("memory.H100", 3.0, "2030-01-02", "memory.H100 is not a rate of NVIDIA"),
    ],
)
def test_what_is_no_measurement_is_refused(data, name, value, date, sentence):
    with pytest.raises(ValueError, match=sentence):
        rates.measure(data, name, value, "NVIDIA H200", date)


def test_the_command_writes_what_was_measured(tmp_path, capsys):
    file = tmp_path / "rates.json"
    rates.save(rates.load(), file)
    assert file.read_text(encoding="utf-8") == rates.FILE.read_text(encoding="utf-8")
    options = ["--model", "vit_b", "--batch", "1", "--device", "H200", "--rates", str(file)]
    assert model.main([*options, "--measured", "memory.H200=4.1", "launch.gap=2"]) == 0
    first = capsys.readouterr().out
    assert "memory.H200 measured 4.1 TB/s on NVIDIA H200" in first
    assert rates.load(file)["rates"]["launch.gap"]["measured"][-1]["value"] == 2.0
    assert model.main(options) == 0 and capsys.readouterr().out == first
    assert [path.name for path in tmp_path.iterdir()] == ["rates.json"]


def test_the_command_prints_every_launch(capsys):
    assert model.main(["--model", "vit_h", "--batch", "4", "--device", "H100", "--block"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("vit_h batch 4 H100, a ")]) == 2
    for block in (WINDOWS, WHOLE):
        for stage in block.stages():
            assert any(line.startswith(f"{stage.name} ") for line in lines)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--adapter", "17"], "expected a rank from 0 to 16, whose machine code was counted, got"),
        (["--measured", "launch.gap=2"], "--measured needs the GPU that was measured; pass"),
        (["--device", "H100", "--measured", "launch.gap"], "expected NAME=VALUE for --measured"),
        (["--rates", "{file}"], "cannot read rates from {file}: "),
    ],
)
def test_the_command_ends_in_a_sentence(options, sentence, tmp_path, capsys):
    file = str(tmp_path / "none")
    assert model.main([option.format(file=file) for option in options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"benchmarks.model: {sentence.format(file=file)}")
    assert captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[]", r'expected \{"rates": \{\.\.\.\}, "counts": \[\.\.\.\]\} in'),
        ('{"rates": {"a": {"unit": "1"}}, "counts": []}', "rate a in .* lacks assumed, source"),
        ('{"rates": {"a": {"unit": "1", "assumed": 0, "source": ""}}, "counts": []}', "got 0"),
        ('{"rates": {}, "counts": [{"kernel": "dq"}]}', "lacks commit, tile, triton, warps"),
        (
            '{"rates": {}, "counts": [{"kernel": "dq", "tile": [1, 2], "warps": 4, "triton": "",'
            ' "commit": ""}]}',
            "expected a positive number for the counts of dq in .*, got None",
        ),
    ],
)
def test_a_file_of_another_form_is_refused(text, sentence, tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        rates.load(file)


def test_a_step_is_its_blocks_by_depth():
    assert model.by_depth("vit_h", 4.0, 8.0, 0.5) == 28 * 4.0 + 4 * 8.0 + 0.5
    assert model.by_depth("vit_b", 1.0, 0.0) == 8.0
    for name, encoder in ENCODERS.items():
        known = ARCHITECTURES[name]
        assert (encoder.depth, encoder.global_blocks) == (known.depth, len(known.global_blocks))
    with pytest.raises(
        ValueError, match="unknown model vit_g; expected one of vit_b, vit_l, vit_h"
    ):
        model.by_depth("vit_g", 1.0, 1.0)
    with pytest.raises(ValueError, match="expected milliseconds for whole, got nan"):
        model.by_depth("vit_b", 1.0, float("nan"))


def test_the_floor_is_that_of_the_step(data):
    known = Rates(data, "H100")
    teraflops = [790 * model.floor(name, 1, known) / 1e3 for name in ENCODERS]
    assert [round(value, 3) for value in teraflops] == [2.2, 6.16, 11.936]
