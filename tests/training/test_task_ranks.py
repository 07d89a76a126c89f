# SPDX-License-Identifier: Apache-2.0
"""Tasks on two ranks: no unused-parameter mode is needed, also where a rank has no image of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budgets import keep
from stock_runs import by_reference
from task_ranks import SPECS, STEPS, alone, batch, build

import samfast
from samfast.kernels._common.budget import Budget
from samfast.training.many_tasks import tasks_loss
from samfast.training.segmenters import TaskSegmenter

HERE = Path(__file__).parent


def test_a_batch_without_a_task_leaves_no_parameter_without_gradient():
    """Which DistributedDataParallel would wait for."""
    inner = build("ta-lora")
    (empty,) = [name for name, rows in STEPS[2][0].items() if not rows]
    loss = tasks_loss(TaskSegmenter(inner), batch(2, 0), SPECS) + samfast.aux_loss(inner)
    loss.backward()
    for name, parameter in samfast.trainable_parameters(inner):
        assert parameter.grad is not None, name
        assert not (f".{empty}" in name and parameter.grad.any()), name


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"
)
@pytest.mark.parametrize("method", ["ta-lora", "lora"])
def test_two_ranks_give_the_gradients_of_one_process(tmp_path, method):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run(
        [sys.executable, str(HERE / "task_ranks.py"), str(tmp_path), method],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second, single = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    assert len(first) == len(second) == len(STEPS)
    for number, (a, b, joined) in enumerate(zip(first, second, single, strict=True)):
        assert set(a) == set(joined)
        for name in a:
            assert torch.equal(a[name], b[name]), (number, name)
        stock, exact = (
            by_reference(alone, method, number, dtype) for dtype in (torch.float32, torch.float64)
        )
        budget = Budget(stock, exact, torch.float32)
        keep(budget, a)
        keep(budget, joined)
    for task, number in (("classes", 3), ("depth", 2)):  # one rank has images, the other none
        assert first[number][f"no_mask_embeds.{task}"].any()
    assert not first[3]["no_mask_embeds.depth"].any()
