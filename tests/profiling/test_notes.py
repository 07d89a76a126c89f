# SPDX-License-Identifier: Apache-2.0
"""What a profile says where its numbers are not what readers would take them for."""

import re

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import samfast
from samfast.profiling import machine
from samfast.profiling.context import result_of
from samfast.profiling.recorder import BOTH, TIME, Recorder, plan

WIDTH, ROWS = 16, 8


class Training:
    def __init__(self):
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.called = self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def loss(self, rows=ROWS):
        return self.called(torch.ones(rows, WIDTH)).square().mean()

    def step(self, rows=ROWS):
        self.loss(rows).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture
def training():
    return Training()


def notes_with(result, words):
    return [note for note in result["notes"] if words in note]


@pytest.fixture
def slow_once(monkeypatch, tmp_path):
    """A machine that was busy in so many measurements of products."""
    monkeypatch.setenv("SAMFAST_CACHE", str(tmp_path))

    def of(times):
        made = []

        def products(*_):
            made.append(None)
            return (1e3 if len(made) <= times else 1e15), "a product"

        monkeypatch.setattr(machine, "products", products)
        monkeypatch.setattr(machine, "copies", lambda *_: 1e15)
        monkeypatch.setattr(machine, "launch_seconds", lambda *_: 1e-9)
        return made

    return of


def profiled(training, **options):
    with samfast.profile(training.model, **options) as p:
        for _ in range(3):
            training.step()
    return p


def test_above_a_ceiling_is_a_word_and_a_note(training, slow_once):
    slow_once(9)
    p = profiled(training)
    result, text = p.as_dict(), p.table()
    rows = {row["name"]: row for row in result["operations"]}
    assert rows["aten::addmm"]["reached"] > 1
    operations = text.partition("\nphase ")[0]
    assert all(float(share) <= 100 for share in re.findall(r"([\d.]+)%", operations))
    assert re.search(r"^aten::addmm .* arithmetic +above ", operations, re.M)
    (note,) = notes_with(result, "above their ceilings")
    assert re.search(r"aten::addmm \([\d.]+ times its arithmetic ceiling\)", note)
    assert "does less work than counted" in note and "the machine was busy" in note
    assert f"note: {note}" in text


def test_above_a_ceiling_it_is_measured_again(training, slow_once):
    made = slow_once(1)
    result = profiled(training).as_dict()
    assert len(made) == 2 and result["ceilings"]["gemm"] == 1e15
    assert not notes_with(result, "above their ceilings")
    assert all(row["reached"] is None or row["reached"] <= 1 for row in result["operations"])
    assert profiled(training).as_dict()["ceilings"]["gemm"] == 1e15 and len(made) == 2


def compiled():
    training = Training()
    training.called = torch.compile(training.model, backend="eager", dynamic=False)
    return training


def test_the_first_timed_step_that_compiles_does_not_count():
    """The counted step runs as written, so that the next one compiles."""
    result = profiled(compiled()).as_dict()
    assert notes_with(result, "torch.compile compiled in the first 1 of the timed steps, which do")
    assert result["steps"]["timed"] == 1
    rows = {row["name"]: row for row in result["operations"]}
    assert not rows["compiled graph"]["flop"] and rows["compiled graph"]["reached"] is None
    (note,) = notes_with(result, "the row of the compiled graph")
    assert "but no FLOP and no bytes" in note
    assert "computes nothing that is counted" not in result["largest_loss"]


def test_compiling_in_a_later_step_is_said():
    training = compiled()
    with samfast.profile(training.model) as p:
        for rows in (ROWS, ROWS, ROWS, 2 * ROWS):
            training.step(rows)
    result = p.as_dict()
    assert result["steps"]["timed"] == 2
    (note,) = notes_with(result, "torch.compile compiled")
    assert note.startswith("torch.compile compiled during the timed steps, so their times include")
    assert notes_with(result, "1 of 2 timed steps have inputs of other shapes")


SAVED = 3 * 4 * ROWS * WIDTH  # the input, and what ReLU and the second layer make
# ReLU and the layer behind it save one tensor, of which both get a half; and a layer its weight.
HALVED = 4 * 2 * ROWS * WIDTH + 2 * WIDTH * WIDTH


class Halved(saved_tensors_hooks):
    """Keeps floats in half precision."""

    def __init__(self):
        super().__init__(lambda t: t.half(), lambda t: t.float())


class Aside(saved_tensors_hooks):
    """Keeps a number in place of a tensor."""

    def __init__(self):
        kept = {}

        def pack(t):
            kept[len(kept)] = t.detach()
            return len(kept) - 1

        super().__init__(pack, kept.__getitem__)


@pytest.mark.parametrize("around", ["loss", "step", "profile", "optimizer"])
@pytest.mark.parametrize(
    ("hooks", "size"),
    [(save_on_cpu, SAVED), (Halved, HALVED), (Aside, 0)],
    ids=["cpu", "halved", "aside"],
)
def test_what_hooks_of_the_program_keep(training, hooks, size, around):
    """In place of what autograd would keep. On a CPU save_on_cpu keeps the tensors themselves."""
    plain = profiled(training).as_dict()
    assert plain["totals"]["saved_bytes"] == SAVED and not notes_with(plain, "hooks")

    def step():
        if around == "loss":
            with hooks():
                loss = training.loss()
            loss.backward()
            training.optimizer.step()
        elif around == "optimizer":  # steps end inside
            with hooks():
                training.loss().backward()
                training.optimizer.step()
        else:
            training.step()
        training.optimizer.zero_grad()

    if around == "profile":
        with hooks(), samfast.profile(training.model) as p:
            for _ in range(3):
                step()
    else:
        with samfast.profile(training.model) as p:
            for _ in range(3):
                step() if around != "step" else hooked(hooks, step)
    result = p.as_dict()
    assert result["totals"]["saved_bytes"] == size
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    said = notes_with(result, "the program's own hooks save tensors")
    assert [("as int, whose bytes are not counted" in note) for note in said] == (
        [True] if hooks is Aside else []
    )


def test_hooks_from_before_that_end_within_the_counted_step(training):
    """What is saved after them is kept as it is, and nothing stays on torch's stack."""
    hooks = Aside()
    hooks.__enter__()
    with samfast.profile(training.model) as p:
        aside = training.loss()
        hooks.__exit__()
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        (aside + training.loss()).backward()
        training.optimizer.step()
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        training.step()
    assert p.as_dict()["totals"]["saved_bytes"] == SAVED
    assert notes_with(p.as_dict(), "the program's own hooks save")


def hooked(hooks, step):
    with hooks():
        step()


def test_inputs_of_other_shapes_are_said(training):
    with samfast.profile(training.model) as p:
        for rows in (ROWS, ROWS, 4096, 4096):
            training.step(rows)
    result = p.as_dict()
    (note,) = notes_with(result, "other shapes")
    assert note.startswith("2 of 3 timed steps have inputs of other shapes than the counted step (")
    assert "Sequential gets (4096, 16), counted with (8, 16)" in note
    assert all(row["reached"] is None for row in result["operations"])
    assert not notes_with(result, "timed and the counted calls differ")
    assert not notes_with(profiled(training).as_dict(), "other shapes")


def test_a_closure_s_phases(training):
    """L-BFGS computes the loss inside its step, as often as it searches."""
    training.optimizer = torch.optim.LBFGS(training.model.parameters(), max_iter=2)

    def closure():
        training.optimizer.zero_grad()
        loss = training.loss()
        loss.backward()
        return loss

    with samfast.profile(training.model) as p:
        for _ in range(3):
            training.optimizer.step(closure)
    result = p.as_dict()
    assert notes_with(result, "the optimizer calls a closure: the time of its forward stands under")
    phases = {row["name"]: row for row in result["phases"]}
    product = 2 * ROWS * WIDTH * WIDTH
    evaluations, rest = divmod(phases["forward"]["flop"], 2 * product)
    assert evaluations >= 2 and rest == 0 == phases["optimizer"]["flop"]
    assert phases["backward"]["flop"] == 3 * product * evaluations
    assert phases["forward"]["ms"] == 0
    assert min(phases["backward"]["ms"], phases["optimizer"]["ms"]) > 0


def test_several_optimizers(training):
    """A step ends where the first one steps; the second one's step begins the next."""
    first, last = (
        torch.optim.SGD(part.parameters(), lr=0.1)
        for part in (training.model[0], training.model[2])
    )

    def one(optimizers):
        training.loss().backward()
        for optimizer in optimizers:
            optimizer.step()
        training.model.zero_grad()

    def recorded(steps, optimizers):
        with Recorder(steps, training.model) as recorder:
            for _ in range(5):
                one(optimizers)
        result = result_of(recorder)
        said = notes_with(result, "several optimizers step, and a step ends where the first one")
        assert len(said) == len(optimizers) - 1
        return result["phases"][0]["launches"], result["totals"]["flop"]

    for steps, again in (plan(2, 2), 2), ([BOTH, TIME, TIME], 0):
        alone, both = recorded(steps, [first]), recorded(steps, [first, last])
        assert both[0] - alone[0] == again  # calls for the second optimizer's two tensors
        assert both[1] == alone[1]


def test_a_closure_among_several_optimizers(training):
    """Both are said."""
    other = torch.optim.SGD(training.model[2].parameters(), lr=0.1)
    with samfast.profile(training.model) as p:
        for _ in range(3):
            training.loss().backward()
            training.optimizer.step(lambda: training.loss().detach())
            other.step()
    result = p.as_dict()
    assert notes_with(result, "closure") and notes_with(result, "several optimizers")
