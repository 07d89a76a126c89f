# SPDX-License-Identifier: Apache-2.0
"""The benchmarks themselves: the right is timed, what cannot run is a row, goals are read off."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from benchmarks import goals, gpu, run, step, timed
from benchmarks.blocks import block_workload
from benchmarks.operations import OPERATIONS, segment_anything_missing
from benchmarks.options import parsed
from benchmarks.registry import Provider, Workload
from benchmarks.relpos_attention import relpos_attention_workload
from benchmarks.run import COLUMNS, Settings, append, measure
from benchmarks.shapes import ENCODERS, Encoder
from benchmarks.verify import verify
from samfast.kernels._common.windows import Windows

TINY = Encoder("tiny", 32, 2, 2)


def row(provider, operation="block", shape="LoRA on qkv r4", mode="graph", **numbers):
    return dict.fromkeys(COLUMNS, "") | {
        "operation": operation, "shape": shape, "provider": provider, "mode": mode,
    } | {name: str(value) for name, value in numbers.items()}  # fmt: skip


def lines(rows, number):
    return [line for line in goals.table(rows) if line.startswith(f"{number} ") and "(" in line]


def test_goals_are_read_off_the_newest_rows():
    old, new = (row(goals.FAST, p50_ms=9, ratio=ratio) for ratio in (2.0, 1.1))
    (line,) = lines([old, new], "P1")
    assert "goal 1.12" in line and "graph 1.100, met" in line
    (line,) = lines([new, old], "P1")
    assert line.endswith("graph 2.000, MISSED  (LoRA on qkv r4)")


def test_a_goal_beside_another_provider():
    shape = "windows, Conv-LoRA on qkv r4"
    rows = [row(goals.FAST, shape=shape, p50_ms=12), row("samfast, LoRA", shape=shape, p50_ms=10)]
    assert "graph 1.200, MISSED" in lines(rows, "P4")[0]
    assert lines(rows, "P1") == []  # another goal's shape


def test_a_peak_counts_what_was_there():
    rows = [row(goals.FAST, "encoder", "vit_h", p50_ms=30, predicted_ms=20, peak_mib=2**13,
                resident_mib=2**12)]  # fmt: skip
    assert "graph 12.885, met" in lines(rows, "P8")[0]
    assert "graph 1.500, met" in lines(rows, "P6")[0]


def test_a_ratio_without_its_baseline_is_no_verdict():
    (line,) = lines([row(goals.FAST, p50_ms=9, ratio="nan")], "P1")
    assert "graph baseline not timed" in line and "MISSED" not in line


def test_what_has_no_time_says_why():
    rows = [row(goals.FAST, mode="", note="OutOfMemoryError: too much")]
    assert "samfast, fast: OutOfMemoryError: too much" in lines(rows, "P1")[0]
    assert all(line.endswith("no row") for line in goals.table([]))


def test_one_job_that_fails_or_hangs_costs_no_other(monkeypatch):
    def process(command, seconds):
        name = command[4]
        assert seconds <= 20  # a third of the time
        return {"hangs": None, "fails": 3}.get(name, 0), 1.0

    monkeypatch.setattr(timed, "run", process)
    ends = gpu.run(["fails --x", "hangs", "ends"], ["--record"], 60)
    assert ends["fails --x"].startswith("FAILED: exit status 3")
    assert ends["hangs"].startswith("STOPPED: no time left")
    assert ends["ends"].startswith("done")
    assert gpu.run(["ends"], [], 0) == {"ends": "not run: no time left"}


def test_the_jobs_are_options_of_run():
    for job in gpu.JOBS:
        operation, *options = job.split()
        assert operation in OPERATIONS
        assert {o[2:] for o in options if o.startswith("--")} <= set(vars(Settings()))


def test_options_are_what_they_were():
    """As tyro read them: both spellings, both flags of a switch, None by name."""
    assert parsed(Settings, []) == Settings()
    given = "--op block --image_size 512 --rank 3 --compiled --csv a.csv --dtype float16".split()
    expected = Settings("block", image_size=512, rank=3, compiled=True, csv=Path("a.csv"))
    assert parsed(Settings, given) == dataclasses.replace(expected, dtype="float16")
    given = "--image-size 512 --rank None --no-compiled --csv None --no-record".split()
    assert parsed(Settings, given) == Settings(image_size=512)
    assert parsed(step.Settings, ["--memory", "minimal"]).memory == "minimal"


@pytest.mark.parametrize("given", ["--op blok", "--rank four", "--comp", "--model vit_x"])
def test_an_option_that_is_not_there(given, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(Settings, given.split())
    assert stop.value.code == 2 and given.split()[0] in capsys.readouterr().err


def test_benchmarks_need_no_tyro():
    for file in Path(run.__file__).parent.glob("*.py"):
        assert "tyro" not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("operation", ["block", "encoder", "saved_bytes"])
def test_without_segment_anything_a_sentence(operation, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    assert run.main(Settings(operation)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the benchmark {operation} needs segment_anything" in line and "carry-gpu" in line


def test_other_operations_need_no_segment_anything(monkeypatch):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    for operation in OPERATIONS.keys() - {"block", "encoder"}:
        assert segment_anything_missing(operation) is None


def test_wheels_to_carry_are_those_of_the_constraints():
    root = Path(run.__file__).parents[1]
    lines = (root / "benchmarks" / "gpu_wheels.txt").read_text(encoding="utf-8").splitlines()
    wheels = {line for line in lines if not line.startswith("#")}
    pins = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert wheels and wheels <= set(pins)


def test_a_provider_that_refuses_is_a_row():
    x = torch.randn(3, requires_grad=True)

    def refuses():
        raise NotImplementedError("not here")

    providers = {"good": Provider(lambda: 2 * x, [x]), "bad": Provider(refuses, [x])}
    workload = Workload("w", ("y", "dx"), "good", ("good",), providers, list, torch.ones(3), [x])
    rows = measure(workload, {}, "eager", Settings(repeats=1), (1.0, 1.0))
    by_name = {r["provider"]: r for r in rows}
    assert by_name["bad"]["note"] == "NotImplementedError: not here"
    assert by_name["good"]["ratio"] == 1.0 and by_name["good"]["resident_mib"] == 24 / 2**20


def test_who_cannot_be_counted_or_judged_costs_no_other():
    """Compiled attention under a dispatch mode, a peer that finds no kernel."""
    x = torch.randn(3, requires_grad=True)

    def alone():
        if _get_current_dispatch_mode() is not None:
            raise NotImplementedError("not under a mode")
        return 2 * x

    def refuses():
        raise RuntimeError("no kernel")

    providers = {name: Provider(lambda: 2 * x, [x]) for name in ("good", "last")}
    providers = {"alone": Provider(alone, [x]), "bad": Provider(refuses, [x]), **providers}
    exact = [2 * x.detach().double(), torch.full((3,), 2.0, dtype=torch.float64)]
    workload = Workload(
        "w", ("y", "dx"), "good", ("bad", "good"), providers, lambda: exact, torch.ones(3), [x]
    )
    wrong = verify(workload, torch.float32)
    assert wrong == {"bad": "RuntimeError: no kernel"}
    rows = measure(workload, wrong, "eager", Settings(repeats=1), (1.0, 1.0))
    assert [r["provider"] for r in rows] == ["alone", "good", "last"]
    assert rows[0]["note"] == "no saved_mib: NotImplementedError: not under a mode"
    assert rows[0]["p50_ms"] > 0 and "saved_mib" not in rows[0] and "saved_mib" in rows[2]
    workload.stock = ("bad",)
    with pytest.raises(RuntimeError, match=r"no peer's errors set the budget of w: .*no kernel"):
        verify(workload, torch.float32)


def test_rows_of_other_columns_are_not_mixed(tmp_path):
    file = tmp_path / "a.csv"
    append(file, [{"provider": "ours", "p50_ms": 1.23456}])
    append(file, [{"provider": "theirs"}])
    assert [line.count(",") for line in file.read_text().splitlines()] == [len(COLUMNS) - 1] * 3
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns a,b, not operation,provider"):
        append(file, [{"provider": "ours"}])
    assert file.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("windows", [Windows(1, 6, 5, 4, 4), Windows.whole(2, 3, 4)], ids=str)
def test_all_attentions_compute_the_same(windows):
    workload = relpos_attention_workload(TINY, windows, "cpu", torch.float32)
    assert verify(workload, torch.float32) == {}
    assert ("SDPA without bias" in workload.providers) == (windows.pads == 0)


@pytest.mark.slow_on_cpu("14")
@pytest.mark.parametrize("window", [14, 0])
def test_routing_does_not_hang_on_rounding(window, monkeypatch):
    """Else bfloat16 would choose other experts than float64, and no comparison mean anything."""
    monkeypatch.setitem(ENCODERS, "tiny", TINY)
    for dtype in (torch.float32, torch.bfloat16):
        workload = block_workload(
            "tiny", 1, 4, window, "Conv-LoRA on qkv", "cpu", dtype, side=20 if window else 8
        )
        assert verify(workload, dtype) == {}
        assert {"samfast, LoRA", "samfast, frozen"} <= workload.providers.keys()


class IndexedByHost(TorchDispatchMode):
    """Whether a tensor elsewhere is indexed by one on the CPU, for which a GPU waits."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor and not args[0].is_cpu:
            self.found |= any(t is not None and t.is_cpu for t in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [14, 0])
def test_who_waits_for_the_host_is_not_captured(window, monkeypatch):
    """A capture that breaks off leaves the allocator in the middle of it, for all that follow."""
    monkeypatch.setitem(ENCODERS, "tiny", TINY)
    side = 16 if window else 8
    workload = block_workload("tiny", 1, 4, window, "LoRA on qkv", "meta", torch.float32, side=side)
    for name, provider in workload.providers.items():
        with IndexedByHost() as mode:
            provider.forward()
        assert provider.captured == (not mode.found), name
    assert not workload.providers["eager"].captured
