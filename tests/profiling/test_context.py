# SPDX-License-Identifier: Apache-2.0
"""``samfast.profile`` around steps in Python."""

import pytest
import torch
from torch import nn
from torch.optim import optimizer
from torch.utils.flop_counter import FlopCounterMode

import samfast
from samfast.profiling import notes


class Training:
    """Two linear layers; FLOP of a step are 6 · 8 · 16² for each but the first input's gradient."""

    flop = 2 * 8 * 16 * 16 * 5

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def step(self, times=1):
        for _ in range(times):
            self.model(torch.ones(8, 16)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.fixture
def training():
    return Training()


def test_one_step_is_counted_and_timed_at_once(training):
    with samfast.profile(training.model) as p:
        training.step()
    result = p.as_dict()
    assert result["steps"]["timed"] == 1
    assert result["totals"]["flop"] == training.flop
    assert any("timed and counted at once" in note for note in result["notes"])


def test_of_several_steps_the_first_is_only_counted(training):
    with samfast.profile(training.model) as p:
        training.step(4)
    result = p.as_dict()
    assert result["steps"]["timed"] == 3
    assert result["totals"]["flop"] == training.flop
    assert result["notes"] == [] or "above their ceilings" in result["notes"][0]
    assert sum(row["share"] for row in result["operations"]) == pytest.approx(1)
    assert "largest loss: " in p.table()


def test_no_rates_where_other_calls_are_timed_than_counted(training, monkeypatch):
    """The counted step evaluates, the timed ones do not."""
    monkeypatch.setattr(notes, "_SHARE", 0)  # on a busy machine these calls are a small share
    with samfast.profile(training.model) as p:
        with torch.no_grad():
            training.model(torch.ones(4096, 16))
        training.step(4)
    result = p.as_dict()
    rows = {row["name"]: row for row in result["operations"]}
    product = rows["aten::addmm"]
    assert (product["timed_calls"], product["counted_calls"]) == (2, 4)
    rates = ("tflop_per_s", "gb_per_s", "ceiling", "reached")
    assert [product[name] for name in rates] == [None] * 4
    assert rows["aten::mm"]["reached"] is not None  # on a busy machine it may round to 0
    assert result["totals"]["flop"] == training.flop + 2 * 2 * 4096 * 16 * 16
    (note,) = [note for note in result["notes"] if note.startswith("no rates are given for")]
    assert "aten::addmm (timed 2 calls, counted 4)" in note and "aten::mm " not in note
    assert not result["largest_loss"].startswith("aten::addmm")
    p.table()


def test_no_more_than_so_many_steps(training):
    with samfast.profile(steps=2) as p:
        training.step(9)
    assert p.as_dict()["steps"]["timed"] == 2


def test_a_forward_without_an_optimizer(training):
    with samfast.profile() as p, torch.no_grad():
        training.model(torch.ones(8, 16))
    assert p.as_dict()["totals"]["flop"] == 2 * 2 * 8 * 16 * 16
    assert p.as_dict()["totals"]["saved_bytes"] == 0


def test_saved_bytes_belong_to_operations_and_gradients_to_memory(training):
    with samfast.profile(training.model) as p:
        training.step()
    rows = {row["name"]: row["saved_bytes"] for row in p.as_dict()["operations"]}
    each = 4 * 8 * 16
    assert rows["aten::relu"] + rows["aten::addmm"] + rows["aten::pow"] == 3 * each
    memory = p.as_dict()["memory_over_step"]
    assert max(memory["gradients"]) == sum(4 * q.numel() for q in training.model.parameters())


def test_a_tensor_from_before_is_not_made_by_the_step():
    x, layer = torch.ones(8 * 16), nn.Linear(16, 16)
    with samfast.profile(layer) as p:
        layer(x.view(8, 16)).sum().backward()
    totals = p.as_dict()["totals"]
    assert totals["saved_bytes"] == 0
    assert totals["peak"]["temporary"] >= x.nbytes  # but it is there


def test_what_it_leaves_behind(training):
    """No hook, mode or profiler; after an error neither."""
    with samfast.profile():
        training.step(2)
    with pytest.raises(ZeroDivisionError), samfast.profile() as p:
        training.step()
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="there is no result yet"):
        p.as_dict()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not torch.nn.modules.module._global_forward_hooks
    assert not optimizer._global_optimizer_post_hooks
    with torch.profiler.profile():
        training.step()


def test_a_dispatch_mode_inside_is_not_broken(training):
    with samfast.profile() as p, FlopCounterMode(display=False) as counted:
        training.step(2)
    assert counted.get_total_flops() == 2 * training.flop
    assert p.as_dict()["totals"]["flop"] == 2 * training.flop  # one step, as it could not be left


def test_one_profile_at_a_time(training):
    with samfast.profile() as p:
        with (
            pytest.raises(RuntimeError, match=r"another samfast\.profile is active"),
            samfast.profile(),
        ):
            pass
        with pytest.raises(RuntimeError, match="there is no result yet; leave the with block"):
            p.as_dict()
        training.step()
    with pytest.raises(RuntimeError, match="was used before"), p:
        pass


def test_torch_s_profiler_is_not_taken_over(training):
    with torch.profiler.profile() as own:
        with pytest.raises(RuntimeError, match="runs already and would lose its events"):
            samfast.profile(training.model).__enter__()
        training.step()
    assert not torch.nn.modules.module._global_forward_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert any(event.name == "aten::addmm" for event in own.events())
    with samfast.profile(training.model) as p:
        training.step()
    assert p.as_dict()["totals"]["flop"] == training.flop


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        samfast.profile(3)
    with pytest.raises(ValueError, match="steps is 0; it must be a whole number"):
        samfast.profile(steps=0)


def test_other_ranks_only_run(training, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with samfast.profile(training.model) as p:
        assert not torch.nn.modules.module._global_forward_hooks
        training.step()
    assert p.as_dict() == {}
    assert p.table() == "rank 1 did not profile; rank 0 did"
    p.trace(tmp_path / "trace.json")
    assert not list(tmp_path.iterdir())


def test_a_profile_of_nothing(monkeypatch):
    with samfast.profile() as p:
        pass
    with pytest.raises(RuntimeError, match="nothing ran inside the with block"):
        p.table()
    monkeypatch.setenv("RANK", "foo")
    with samfast.profile():
        pass
