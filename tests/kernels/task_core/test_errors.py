# SPDX-License-Identifier: Apache-2.0
"""Bad input ends in one sentence with the values in it."""

import pytest
import torch

from samfast.functional import task_core, task_cores
from samfast.kernels.lora_linear.op import low_rank_linear
from samfast.kernels.task_core import middle_key


def call(**changes):
    arguments = dict(h=torch.zeros(6, 5, 8), core=torch.zeros(8, 4, 2))
    arguments |= dict(factor_task=torch.zeros(3, 2), task=0)
    return task_core(**{**arguments, **changes})


@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
@pytest.mark.parametrize(("task", "value"), [(3, 3), (-1, -1), ([0, 4], 4), ([-2, 1], -2)])
def test_a_task_out_of_range(task, value, backend):
    task = task if isinstance(task, int) else torch.tensor(task)
    with pytest.raises(ValueError, match=f"task is {value}, but there are tasks 0 to 2"):
        call(task=task, backend=backend)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task": torch.zeros(4, dtype=torch.int64)}, "tasks that divides the batch of 6, got 4"),
        ({"task": torch.zeros(0, dtype=torch.int64)}, "tasks that divides the batch of 6, got 0"),
        ({"task": torch.zeros(3)}, r"int64 of shape \(E,\), but is torch.float32 \(3,\)"),
        ({"task": torch.tensor(1)}, r"int64 of shape \(E,\), but is torch.int64 \(\)"),
        ({"task": True}, "task must be a whole number or int64 .* but is True"),
        ({"task": torch.zeros(3, dtype=torch.int64, device="meta")}, "task is on meta but h is on"),
        ({"h": torch.zeros(6, 5, 7)}, r"h has rank 7 but the core \(8, 4, 2\) takes rank 8"),
        ({"h": torch.zeros(8)}, r"h has shape \(8,\), but must be \(B, …, R1\)"),
        ({"h": torch.zeros(6, 8).int()}, "h is torch.int32, but must be float16"),
        ({"h": torch.zeros(6, 8, device="meta")}, "core is on cpu but h is on meta"),
        ({"core": torch.zeros(8, 4)}, r"a core has shape \(8, 4\), but must be \(R1, R2, R3\)"),
        ({"core": torch.zeros(8, 0, 2)}, r"a core has shape \(8, 0, 2\), but must be"),
        ({"core": torch.zeros(8, 4, 2).long()}, "cores are torch.int64 but task factors are"),
        ({"factor_task": torch.zeros(3, 4)}, r"\(3, 4\), but the core \(8, 4, 2\) needs \(tasks"),
        ({"factor_task": torch.zeros(0, 2)}, r"a task factor has shape \(0, 2\), but the core"),
        ({"factor_task": torch.zeros(3, 2, device="meta")}, "factor is on meta but the first core"),
    ],
)  # fmt: skip
def test_sentences(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(**changes)


def test_layers_that_are_not_alike():
    core, factor = torch.zeros(8, 4, 2), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="for each layer, got 2 cores and 1 task factors"):
        task_cores([core, core], [factor])
    with pytest.raises(ValueError, match="for each layer, got 0 cores and 0 task factors"):
        task_cores([], [])
    with pytest.raises(ValueError, match=r"one core has shape \(8, 5, 2\) and another \(8, 4, 2\)"):
        task_cores([core, torch.zeros(8, 5, 2)], [factor, factor])
    with pytest.raises(ValueError, match=r"one task factor is torch\.float64 and another"):
        task_cores([core, core], [factor, factor.double()])


def test_cores_and_factors_of_two_dtypes():
    with pytest.raises(
        ValueError, match=r"cores are torch\.float32 but task factors are torch\.fl"
    ):
        call(factor_task=torch.zeros(3, 2).half())


def test_a_named_backend_that_cannot_run_raises_its_sentence():
    with pytest.raises(
        RuntimeError, match="'cuda' cannot run task_core: h is on cpu, but the CUDA"
    ):
        call(backend="cuda")
    for backend in ("cpu", "triton"):
        with pytest.raises(
            RuntimeError, match=r"h is torch\.float64, but the kernels take float32"
        ):
            call(h=torch.zeros(6, 8).double(), backend=backend)
    with pytest.raises(RuntimeError, match=r"cores are torch\.float64, but the kernels take"):
        call(
            core=torch.zeros(8, 4, 2).double(),
            factor_task=torch.zeros(3, 2).double(),
            backend="cpu",
        )


def test_a_rank_above_the_tiles(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    wide = dict(h=torch.zeros(6, 8), core=torch.zeros(8, 65, 2))
    with pytest.raises(RuntimeError, match="rank 65 is above 64, the widest tile"):
        call(**wide, backend="triton")
    assert call(**wide).shape == (6, 65)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [([0, 1, 2], "3 tasks do not divide the 10 rows of h"), ([0, 3], "task is 3, but there are")],
)
def test_the_middle_map_checks_too(task, sentence):
    (m,) = task_cores([torch.zeros(8, 4, 2)], [torch.zeros(3, 2)])
    x, weight = torch.zeros(10, 6), torch.zeros(7, 6)
    with pytest.raises(ValueError, match=sentence):
        low_rank_linear(
            x, weight, None, torch.zeros(8, 6), torch.zeros(7, 4), 0.5,
            middle=middle_key("auto"), params=[m, torch.tensor(task)],
        )  # fmt: skip
