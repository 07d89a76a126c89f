# SPDX-License-Identifier: Apache-2.0
"""What a machine can do is measured once, and kept where the environment says."""

import json

import pytest
import torch

from samfast.profiling import machine
from samfast.profiling.ceilings import cache_folder, ceilings, measured_again
from samfast.profiling.notes import largest_loss


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMFAST_CACHE", str(tmp_path / "own"))
    return tmp_path / "own" / "ceilings.json"


@pytest.fixture
def measured(monkeypatch):
    """Every measurement, of which none takes time."""
    made = []

    def products(device, dtype, sizes):
        made.append(dtype)
        return 1e9 * len(made), f"product {len(made)}"

    monkeypatch.setattr(machine, "products", products)
    monkeypatch.setattr(machine, "copies", lambda device, size: 2e9)
    monkeypatch.setattr(machine, "launch_seconds", lambda device: 1e-6)
    return made


def test_measured_once_for_each_dtype(cache, measured):
    first = ceilings("cpu", torch.float32)
    assert first.gemm == 1e9 and first.date.count("-") == 2 and first.remark is None
    assert ceilings("cpu", torch.float32) == first
    assert ceilings("cpu", torch.bfloat16).gemm == 2e9
    assert measured == [torch.float32, torch.bfloat16]
    assert any(torch.__version__ in key for key in json.loads(cache.read_text()))


def test_fresh_ones_replace_what_was_kept(cache, measured):
    ceilings("cpu", torch.float32)
    assert ceilings("cpu", torch.float32, fresh=True).gemm == 2e9
    assert ceilings("cpu", torch.float32).gemm == 2e9


OLD = {
    "gemm": 1.0,
    "copy": 1.0,
    "launch": 1.0,
    "date": "",
}  # of one product, before there were more
NEGATIVE = OLD | {"gemm": -1.0, "product": ""}


def test_of_two_measurements_the_faster_is_kept(cache, measured):
    """A busy machine is measured too slow, never too fast."""
    first = ceilings("cpu", torch.float32)
    second = measured_again("cpu", torch.float32, first)
    assert (second.gemm, second.product) == (2e9, "product 2")
    third = measured_again("cpu", torch.float32, first._replace(gemm=7e9, copy=3e9, launch=2e-6))
    assert (third.gemm, third.product) == (7e9, "product 1")
    assert (third.copy, third.launch) == (3e9, 1e-6)
    assert ceilings("cpu", torch.float32) == third


@pytest.mark.parametrize(
    "text", ["", "[]", '{"x": 1}', json.dumps({"x": NEGATIVE}), json.dumps({"x": OLD})]
)
def test_a_broken_file_is_written_anew(text, cache, measured):
    cache.parent.mkdir()
    cache.write_text(text)
    ceilings("cpu", torch.float32)
    (row,) = json.loads(cache.read_text()).values()
    assert row["gemm"] == 1e9


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch, measured):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAMFAST_CACHE", str(tmp_path / "file" / "inside"))
    remark = ceilings("cpu", torch.float32).remark
    assert "measured again" in remark and str(tmp_path / "file") in remark


def test_where_they_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("SAMFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "samfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "samfast"


def test_what_binds(cache, measured):
    least = ceilings("cpu", torch.float32).least_seconds(2_000_000_000, 1000, 3)
    assert least == {"arithmetic": 2.0, "memory": 5e-7, "launches": pytest.approx(3e-6)}


def test_the_fastest_of_all_products_is_the_ceiling(monkeypatch):
    """One order of factors is slow, one size is, and in each round but one the machine is busy."""
    clock, calls = [0.0], []

    def mm(a, b):
        turned = ["a" for t in (a,) if t.stride(0) == 1] + ["b" for t in (b,) if t.stride(0) == 1]
        calls.append((a.shape[0], *turned))
        busy = 1 if len(calls) // 6 == 3 else 3
        clock[0] += 1e-3 * busy * a.shape[0] ** 2 * (1 if turned == ["b"] else 2)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(machine, "now", lambda device: clock[0])
    rate, what = machine.products("cpu", torch.float32, [(2, 4, 8), (4, 4, 8)])
    assert set(calls) == {(rows, *turned) for rows in (2, 4) for turned in ((), ("a",), ("b",))}
    assert what == "2 × 4 × 8, second factor turned"
    assert rate == pytest.approx(2 * 2 * 4 * 8 / (1e-3 * 2**2))


def test_slow_products_are_measured_once(monkeypatch):
    """Where one takes long, such as a dtype without code of its own."""
    clock = [0.0]

    def mm(a, b):
        clock[0] += 10

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(machine, "now", lambda device: clock[0])
    rate, _ = machine.products("cpu", torch.float32, [(2, 4, 8)] * 9)
    assert rate == 2 * 2 * 4 * 8 / 10 and clock[0] < 60


def row(name, share, reached=None, ceiling=None):
    cost = {"flop": 0 if name in ("host gap", "compiled graph") else 1000, "bytes": 0}
    return {"name": name, "share": share, "reached": reached, "ceiling": ceiling, **cost}


def test_the_largest_loss_is_named():
    rows = [row("aten::mm", 0.6, 0.9, "arithmetic"), row("host gap", 0.3)]
    assert largest_loss(rows, True, 1.0) == "host-bound: the device waits 30% of the step"
    assert largest_loss(rows, False, 1.0).startswith("host-bound: no operator runs 30%")
    rows = [row("aten::mm", 0.6, 0.25, "arithmetic"), row("host gap", 0.3)]
    assert largest_loss(rows, True, 1.0) == (
        "aten::mm takes 60% of the step at 25% of its ceiling (arithmetic); 45% of the step is "
        "lost there"
    )


def test_no_loss_above_a_ceiling():
    rows = [row("aten::mm", 0.9, 1.33, "arithmetic")]
    assert largest_loss(rows, False, 1.0) == (
        "no loss is known: aten::mm takes 90% of the step, above its ceiling (arithmetic)"
    )


def test_what_a_compiled_graph_loses_is_not_known():
    rows = [row("compiled graph", 0.8), row("aten::mm", 0.1, 0.5, "memory")]
    first, second = largest_loss(rows, False, 1.0).split("; 5% of the step is lost there; ")
    assert first == "aten::mm takes 10% of the step at 50% of its ceiling (memory)"
    assert second == (
        "compiled graph takes 80%, but how much of that is lost is not known: its FLOP are not "
        "counted"
    )


def test_what_is_not_known_is_no_loss():
    rows = [row("aten::addmm", 0.6), row("host gap", 0.3), row("aten::mm", 0.1, 0.5, "memory")]
    first, second = largest_loss(rows, True, 1.0).split("; ")
    assert first == "host-bound: the device waits 30% of the step"
    assert second.startswith("aten::addmm takes 60%, but how much of that is lost is not known")
