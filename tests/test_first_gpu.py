# SPDX-License-Identifier: Apache-2.0
"""The two calls for a GPU: a step costs its own time only, and what there is so far is kept."""

import importlib
import re
import tarfile

import pytest

from benchmarks import first_gpu, native
from benchmarks.first_gpu import STEPS, Step, run


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(first_gpu, "KEPT", ())
    return tmp_path / "cache"


@pytest.mark.slow_on_cpu
def test_a_step_that_fails_or_hangs_costs_its_own_time(cache, tmp_path):
    out = tmp_path / "out"
    steps = [
        Step("fails", 20, "echo said; exit 3"),
        Step("hangs", 1, "sleep 60"),
        Step("lacks", 20, "exit 1", lacks=lambda: "no wheels"),
        Step("reads", 20, f"cat {out}/steps.log >{out}/seen"),
    ]
    ends = run(steps, 100, out)
    assert ends["fails"].startswith("FAILED with 3, ")
    assert ends["hangs"].startswith("STOPPED, ") and ends["hangs"].split()[3] == "1"
    assert ends["lacks"] == "left out: no wheels" and ends["reads"].startswith("done")
    logged = [f"{name:20} {end}" for name, end in ends.items()]
    assert (out / "steps.log").read_text().splitlines() == logged
    assert (out / "seen").read_text().splitlines() == logged[:3]  # written as each step ended
    assert (out / "output.txt").read_text() == "said\n"


@pytest.mark.slow_on_cpu
def test_all_steps_share_the_time(cache, tmp_path):
    ends = run([Step("long", 60, "sleep 60"), Step("next", 60, "true")], 1.2, tmp_path)
    assert ends["long"].startswith("STOPPED") and ends["next"] == "left out: no time left"


def test_a_rehearsal_runs_other_lines_and_no_gpu(cache, tmp_path):
    steps = [Step("both", 9, "exit 1", "exit 0"), Step("gpu", 9, "exit 1")]
    ends = run(steps, 20, tmp_path, rehearse=True)
    assert ends["both"].startswith("done") and ends["gpu"] == "left out: it needs a GPU"


def test_results_and_new_cache_entries_come_back(cache, tmp_path, monkeypatch):
    (cache / "CARRIED").mkdir(parents=True)
    monkeypatch.setattr(first_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(first_gpu, "KEPT", ("result.xml", "none.csv"))
    make = "mkdir -p $TRITON_CACHE_DIR/{0} && touch $TRITON_CACHE_DIR/{0}/k.cubin && "
    steps = [
        Step("cache", 9, make.format("UNPACKED") + "true"),
        Step("compiles", 9, make.format("NEW") + "touch $TRITON_CACHE_DIR/NEW/k.ttir result.xml"),
    ]
    ends = run(steps, 20, tmp_path / "out")
    assert ends["compiles"].endswith(" 1 new cache entries")
    assert (tmp_path / "out" / "result.xml").is_file()
    with tarfile.open(tmp_path / "out" / "new-cache.tar.xz") as tar:
        assert tar.getnames() == ["NEW/k.cubin"]


@pytest.mark.parametrize("call", STEPS)
def test_the_steps_fit_their_call(call):
    """Memcheck gets what is left; $OUT brings back eight files."""
    steps = STEPS[call]
    assert len({step.name for step in steps}) == len(steps)
    needed = sum(step.seconds for step in steps if step.name != "memcheck")
    assert needed <= first_gpu.SECONDS[call]
    for step in steps:
        for line in filter(None, (step.command, step.rehearsed)):
            guarded = re.findall(r"\[ ! -f benchmarks/(\w+)\.py \]", line)
            for module in re.findall(r"-m (benchmarks\.\w+)", line):
                if module.split(".")[1] in guarded:
                    continue
                assert callable(importlib.import_module(module).main), module


def test_the_smoke_tests_and_benchmarks_come_in_this_order():
    names = [step.name for step in STEPS["call1"]]
    assert names == ["wheels", "cache", "key", "build", "check", "smoke", "quick"]


def test_an_unknown_step_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        first_gpu.main(["call1", "--only", "smok"])
    assert stop.value.code == 2
    assert "unknown step 'smok'; expected one of wheels, cache" in capsys.readouterr().err


def test_native_sources_beside_others(capsys):
    assert native.main(["--device", "cpu", "--small", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert {line.split()[0] for line in lines} == {"conv_experts", "hypercomplex", "task_core"}
    assert {line.split()[1] for line in lines} == {"torch", "cpu"}
