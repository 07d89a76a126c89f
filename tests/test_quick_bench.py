# SPDX-License-Identifier: Apache-2.0
"""Rows of the quick benchmark rest on evidence: what was not verified is not written."""

import csv

import pytest
import torch

from benchmarks import evidence, quick, run, smoke
from benchmarks.evidence import UNVERIFIED, admitted, green_test
from benchmarks.operations import OPERATIONS
from benchmarks.registry import Provider, Workload
from benchmarks.verify import OTHER, WITHIN, verdict, verify

GOOD = {
    "operation": "block", "shape": "s", "provider": "samfast", "p50_ms": 1.0, "commit": "c",
    "triton_key": "k", "test": UNVERIFIED, "verified": WITHIN,
}  # fmt: skip


def test_a_row_with_all_of_its_evidence_is_kept():
    untimed = {"operation": "block", "provider": "eager", "note": "RuntimeError: no kernel"}
    rows = [GOOD, GOOD | {"verified": OTHER}, untimed]
    assert admitted(rows) == rows and admitted([]) == []


@pytest.mark.parametrize("name", evidence.EVIDENCE)
def test_a_time_without_evidence_is_rejected(name):
    for row in (GOOD | {name: ""}, {k: v for k, v in GOOD.items() if k != name}):
        with pytest.raises(ValueError, match=f"samfast has a time without {name}; verify it"):
            admitted([GOOD, row])


@pytest.mark.parametrize("said", ["yes", "dx: error 3 above 2", UNVERIFIED])
def test_a_time_with_another_verdict_is_rejected(said):
    with pytest.raises(ValueError, match="expected 'within budget' or 'another result, finite'"):
        admitted([GOOD | {"verified": said}])


def test_a_row_that_says_nothing_is_rejected():
    with pytest.raises(ValueError, match="neither a time nor a note"):
        admitted([{"operation": "block"}])


def workload(**providers):
    x = torch.randn(3, requires_grad=True)
    exact = [2 * x.detach().double(), torch.full((3,), 2.0, dtype=torch.float64)]
    made = {name: Provider(lambda call=call: call(x), [x], **options)
            for name, (call, options) in providers.items()}  # fmt: skip
    return Workload("w", ("y", "dx"), "good", ("good",), made, lambda: exact, torch.ones(3), [x])


def test_verdicts_are_what_was_verified():
    made = workload(
        good=(lambda x: 2 * x, {}), bad=(lambda x: 3 * x, {}),
        beside=(lambda x: 5 * x, {"checked": False}),
        broken=(lambda x: x / 0, {"checked": False}),
    )  # fmt: skip
    wrong = verify(made, torch.float32)
    assert wrong.keys() == {"bad", "broken"} and wrong["broken"] == "y is not finite"
    said = {name: verdict(made, name, wrong) for name in (*made.providers, "nobody")}
    assert said == {"good": WITHIN, "bad": "", "beside": OTHER, "broken": "", "nobody": ""}


SMOKE = "tests/gpu/test_smoke.py::test_values"


def test_the_green_test_of_a_row():
    passed = f"{SMOKE}[sam_block-global-triton-bfloat16]"
    outcomes = {
        passed: "passed",
        f"{SMOKE}[sam_block-windows-triton-bfloat16]": "failed",
        f"{SMOKE}[relpos_attention-windows-triton-bfloat16]": "skipped",
    }
    assert green_test(outcomes, "block", "global", "bfloat16") == passed
    for operation, place, dtype in (
        ("block", "windows", "bfloat16"), ("block", "global", "float16"),
        ("relpos_attention", "windows", "bfloat16"), ("relpos_attention", "global", "bfloat16"),
        ("encoder", "global", "bfloat16"),
    ):  # fmt: skip
        assert green_test(outcomes, operation, place, dtype) == UNVERIFIED
    assert green_test({}, "block", "global", "bfloat16") == UNVERIFIED


def test_every_row_has_a_smoke_test():
    from gpu import test_smoke

    ids = {value.id for value in test_smoke.VALUES}
    for (operation, place), prefix in evidence.TESTS.items():
        assert operation in OPERATIONS and place in ("windows", "global")
        assert f"{prefix}-triton-bfloat16" in ids
    assert {operation for operation, _ in evidence.TESTS} == set(quick.PEERS)


@pytest.fixture
def settings():
    return run.Settings("block", repeats=1)


def test_rows_are_written_as_they_come(settings, tmp_path):
    """With their evidence, and for a provider that is wrong without a time."""
    made = workload(good=(lambda x: 2 * x, {}), samfast=(lambda x: 2 * x, {}),
                    bad=(lambda x: 3 * x, {}))  # fmt: skip
    common = {"operation": "block", "commit": "c", "triton_key": "k"}
    outcomes = {f"{SMOKE}[sam_block-global-triton-float32]": "passed"}
    file, seen = tmp_path / "q.csv", []
    for rows in quick.measured("block", "global", made, settings, common, (1.0, 1.0), outcomes):
        run.append(file, admitted(rows), evidence.QUICK_COLUMNS)
        with file.open(newline="") as written:
            seen.append(list(csv.DictReader(written)))
    assert [len(rows) for rows in seen] == [2, 3]
    good, ours, bad = seen[-1]
    assert (ours["test"], ours["verified"]) == (*outcomes, WITHIN)
    assert good["test"] == "none: not samfast" and float(ours["host_ms"]) > 0
    assert bad["p50_ms"] == bad["verified"] == "" and bad["note"].startswith("y: ")


def test_a_time_of_what_is_wrong_cannot_be_written(settings, monkeypatch):
    """Even where the measuring forgets to leave it out."""
    made = workload(good=(lambda x: 2 * x, {}), bad=(lambda x: 3 * x, {}))
    measure = run.measure
    monkeypatch.setattr(run, "measure", lambda w, wrong, *rest: measure(w, {}, *rest))
    common = {"operation": "block", "commit": "c", "triton_key": "k"}
    with pytest.raises(ValueError, match="w, bad has a time without verified"):
        for rows in quick.measured("block", "global", made, settings, common, (1.0, 1.0), {}):
            admitted(rows)


def test_steps_multiply_depths(tmp_path, capsys):
    def row(provider, place, batch=4, **numbers):
        shape = f"vit_h block, {place}, {batch}x64x64, LoRA on all r4"
        made = {"operation": "block", "provider": provider, "mode": "eager", "shape": shape}
        made |= {"ratio": "1.1", "test": UNVERIFIED} | {k: str(v) for k, v in numbers.items()}
        return dict.fromkeys(evidence.QUICK_COLUMNS, "") | made

    rows = [
        row(quick.OURS, "windows of 14", p50_ms=3.0, host_ms=1.0),
        row(quick.OURS, "global", p50_ms=8.0, host_ms=2.0),
        row("eager", "windows of 14", p50_ms=6.0, host_ms=2.0),
        row("eager", "global", p50_ms=16.0, host_ms=4.0),
        row("SDPA + mask, PEFT", "global", p50_ms=9.0),  # without its windows no step
    ]
    lines = quick.steps(rows)
    assert "116.00 ms by its blocks, 1.92 of the floor 60.44 ms" in lines[0]
    assert "host 36.00 ms, 0.50 of eager" in lines[1]
    assert "eager, eager: 232.00 ms" in lines[2] and len(lines) == 4
    run.append(tmp_path / "q.csv", rows, evidence.QUICK_COLUMNS)
    assert quick.main(["--goals", str(tmp_path / "q.csv")]) == 0
    assert "3 shapes" not in (printed := capsys.readouterr().out) and "2 shapes" in printed
    assert quick.main(["--goals", str(tmp_path / "none.csv")]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_a_sentence(capsys):
    assert quick.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_commit_of_a_tree_without_history(monkeypatch, tmp_path):
    monkeypatch.delenv("SAMFAST_COMMIT", raising=False)
    assert evidence.commit() != "unknown"
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "CARRIED", tmp_path / "commit")
    assert evidence.commit() == "unknown"
    (tmp_path / "commit").write_text("abc\n")
    assert evidence.commit() == "abc"
    monkeypatch.setenv("SAMFAST_COMMIT", "given")
    assert evidence.commit() == "given"


def test_only_peers_that_need_no_compiler(monkeypatch):
    """FlexAttention is compiled by torch when it is first called."""
    from benchmarks.shapes import ENCODERS, Encoder

    monkeypatch.setitem(ENCODERS, "tiny", Encoder("tiny", 32, 2, 2))
    operation = "relpos_attention"
    made = dict(quick.workloads(operation, "tiny", 2, "cpu", torch.float32, side=4))
    assert made.keys() == {"windows", "global"}
    for workload in made.values():
        assert workload.providers.keys() <= set(quick.PEERS[operation])
        assert "samfast torch" not in workload.providers  # which the benchmark of all has
        assert workload.verified.name == workload.name.replace("2x4x4", "1x4x4") != workload.name
    assert not {name for names in quick.PEERS.values() for name in names if "Flex" in name}
    assert smoke.RESULTS != quick.RESULTS
