# SPDX-License-Identifier: Apache-2.0
"""``samfast profile --compare --json`` against the clock, torch's FLOP counter and the counters."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import eager_adapter, exchange
from samfast import cli
from samfast.counters import counting, saved_bytes
from samfast.kernels.relpos_attention.flops import torch_stands_for
from samfast.profiling import compare
from samfast.profiling.replay import ATTENTION
from samfast.profiling.settings import ProfileSettings
from samfast.profiling.text import table
from samfast.profiling.workload import build, model_flop

SETTINGS = ProfileSettings(model="vit_tiny", image_size=64, batch=1)
WORDS = "profile --model vit_tiny --image-size 64 --batch 1 --skip 2 --steps 2 --json".split()


def profiled(capsys, *more):
    assert cli.main([*WORDS, *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda text, **_: lines.append(text))
        assert cli.main([*WORDS, "--compare"]) == 0
    return json.loads("".join(lines))


def test_shares_are_of_the_clock_s_time(result):
    for kind in ("operations", "phases", "blocks"):
        assert sum(row["share"] for row in result[kind]) == pytest.approx(1, abs=1e-9)
    totals = result["totals"]
    assert totals["ms"] == pytest.approx(totals["outer_ms"], rel=0.03)


def test_sums_of_rows_are_the_totals(result):
    for name in ("flop", "bytes", "launches", "syncs", "saved_bytes"):
        for kind in ("operations", "phases", "blocks"):
            assert sum(row[name] for row in result[kind]) == result["totals"][name], (name, kind)


def test_every_block_and_phase_has_a_row(result):
    names = {row["name"] for row in result["blocks"]}
    blocks = {f"sam.image_encoder.blocks.{i}" for i in range(6)}
    assert blocks | {"sam.image_encoder.neck", "sam.mask_decoder", "optimizer"} <= names
    phases = [row["name"] for row in result["phases"]]
    assert phases == ["forward", "backward", "optimizer", "host gap"]
    flop = {row["name"]: row["flop"] for row in result["phases"]}
    assert flop["backward"] > flop["forward"] > 0 == flop["optimizer"]


def test_operations_have_our_names(result):
    rows = {row["name"]: row for row in result["operations"]}
    assert {"samfast::sam_block", "samfast::window_relpos_attention", "aten::mm"} <= set(rows)
    assert rows["samfast::sam_block"]["calls"] == 12  # six blocks, forward and backward
    assert not any(name.startswith("samfast_native") for name in rows)
    attention = rows["samfast::window_relpos_attention"]
    assert attention["flop"] > 0 and attention["launches"] == 12 and attention["ceiling"]
    assert rows["host gap"]["reached"] is None


def same_calls(result):
    """Only the same calls, timed and counted, have rates; on a CPU all of ours do."""
    for row in result["operations"]:
        same = row["timed_calls"] == row["counted_calls"]
        assert same or row["reached"] is None, row
        if row["name"].startswith("samfast::") and not torch.cuda.is_available():
            assert same and row["reached"], row


def test_a_native_operator_has_its_products(result):
    same_calls(result)
    rows = {row["name"]: row for row in result["operations"]}
    assert rows["samfast::sam_block"]["flop"] > rows["samfast::window_relpos_attention"]["flop"]


def test_blocks_have_a_gap_of_their_own_name(result):
    names = {row["name"] for row in result["blocks"]}
    assert "between blocks" in names and "host gap" not in names
    gaps = [r["share"] for k in ("operations", "phases") for r in result[k] if "gap" in r["name"]]
    assert len(gaps) == 2 and gaps[0] == pytest.approx(gaps[1])


def stock_flop(settings):
    """FLOP of a step's forward and backward with segment_anything's blocks and eager adapters."""
    run = build(settings, fuse=False)
    exchange(run.model, eager_adapter)
    with FlopCounterMode(display=False) as counted:
        images, _, sizes = run.batch
        logits, _ = run.model(images, sizes)
        logits.sum().backward()
    return counted.get_total_flops()


def test_model_flop_is_torch_s_of_the_stock_model(result):
    assert result["totals"]["model_flop"] == pytest.approx(stock_flop(SETTINGS), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 256])
def test_model_flop_at_other_sizes(size):
    settings = dataclasses.replace(SETTINGS, image_size=size)
    assert model_flop(settings) == pytest.approx(stock_flop(settings), rel=0.01)


def counted_by_the_counters(settings, monkeypatch, fuse=True):
    """(counts of a step, saved bytes of its forward), on the torch backend."""
    run = build(settings, fuse)
    monkeypatch.setenv("SAMFAST_BACKEND", "torch")
    run.step()
    known = [*run.batch, *run.model.parameters(), *run.model.buffers()]
    saved = saved_bytes(run.loss, known)
    with counting(ATTENTION) as counts, torch_stands_for("cpu"):
        run.step()
    return counts, saved


def test_launches_flop_and_saved_bytes_are_the_counters(result, monkeypatch):
    counts, saved = counted_by_the_counters(SETTINGS, monkeypatch)
    totals = result["totals"]
    assert totals["launches"] == counts.total_launches
    assert totals["flop"] == counts.flops
    assert totals["bytes"] == counts.bytes
    assert totals["saved_bytes"] == saved.hooks


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["decoder", "conv-lora", "adaptformer", "cobot-lora", "kronecker"]
)
@pytest.mark.parametrize("memory", ["fast", "balanced", "minimal"])
def test_every_method_and_mode(method, memory, capsys, monkeypatch):
    found = profiled(capsys, "--method", method, "--memory", memory)
    settings = dataclasses.replace(SETTINGS, method=method, memory=memory)
    counts, saved = counted_by_the_counters(settings, monkeypatch)
    if method != "conv-lora":  # whose gate draws other experts in every step
        assert found["totals"]["launches"] == counts.total_launches
        assert found["totals"]["flop"] == counts.flops
    assert found["totals"]["saved_bytes"] == saved.hooks
    assert found["totals"]["ms"] == pytest.approx(found["totals"]["outer_ms"], rel=0.03)
    same_calls(found)


def test_programs_that_are_compared(result, monkeypatch):
    rows = {row["name"]: row for row in result["compare"]}
    assert list(rows) == [
        "samfast, fast",
        "samfast, not fused",
        "PEFT on segment_anything",
        "PEFT on Hugging Face, sdpa",
    ]
    present = [row for row in rows.values() if row["missing"] is None]
    assert all(row["least_ms"] <= row["ms"] <= row["most_ms"] for row in present)
    first, unfused = rows["samfast, fast"], rows["samfast, not fused"]
    assert first["saved_bytes"] == result["totals"]["saved_bytes"] < unfused["saved_bytes"]
    assert first["ratio"] == 1.0
    _, saved = counted_by_the_counters(SETTINGS, monkeypatch, fuse=False)
    assert unfused["saved_bytes"] == saved.hooks


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(compare, "installed", lambda name: name != "peft")
    _, *others = compare._others(SETTINGS)
    why = 'peft is not installed: pip install "samfast[peft]"'
    assert [reason for _, reason in others] == [why, why]
    _, *others = compare._others(dataclasses.replace(SETTINGS, method="decoder"))
    assert others[0][1] == "PEFT has no decoder; compare with --method lora"


def test_peak_memory_by_category(result):
    peak, totals = result["totals"]["peak"], result["totals"]
    assert sum(peak.values()) == totals["peak_bytes"]
    run = build(SETTINGS)
    parameters = {t.data_ptr(): t.nbytes for t in run.model.parameters()}
    assert sum(parameters.values()) <= peak["parameters"] < 1.05 * sum(parameters.values())
    assert peak["optimizer state"] == sum(8 * p.numel() + 4 for p in run.parameters)
    memory = result["memory_over_step"]
    sums = [sum(sizes) for sizes in zip(*memory.values(), strict=True)]
    assert max(sums) == totals["peak_bytes"]
    assert max(memory["saved for backward"]) <= totals["saved_bytes"]
    assert memory["gradients"][-1] == sum(4 * p.numel() for p in run.parameters if p.requires_grad)


def test_the_table_says_what_profiling_costs(result):
    lines = table(result).splitlines()
    (step,) = [line for line in lines if line.startswith("step ")]
    assert "under the profiler; without it" in step
    assert any("GFLOP executed" in x and "GFLOP of the stock model's step" in x for x in lines)
    assert any(line.startswith("samfast, not fused  ") for line in lines)
    assert lines[-1] == f"largest loss: {result['largest_loss']}"
