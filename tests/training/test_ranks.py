# SPDX-License-Identifier: Apache-2.0
"""Several processes train as one process on the joined batch, and end as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budgets import all_within_budget
from conftest import fill_folder
from rank_runs import STILL, in_float64, recorded
from stock_runs import by_reference

from samfast import cli
from samfast.training import launched, ranks
from samfast.training.data import EpochSampler
from samfast.training.joined import JoinedBatches
from samfast.training.launched import Launched

HERE = Path(__file__).parent
needs_fork = pytest.mark.skipif(
    not torch.distributed.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"
)
TINY = ["--model", "vit_tiny", "--image-size", 64, "--epochs", 1, "--repeats", 1, "--overlays", 0]


def environment(**more):
    """Of a process that finds samfast and the tests, on one thread and on CPUs."""
    found = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}
    found["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    found["ACCELERATE_USE_CPU"] = "1"
    return found


def two_ranks(folder, *arguments):
    """Exit codes, records and standard error of both."""
    words = ["finetune", *map(str, arguments), "--output", str(folder / "two")]
    done = subprocess.run(
        [sys.executable, str(HERE / "rank_runs.py"), str(folder), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (first, own), (second, other) = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return (first, second), (own, other), done


def alone(folder, *arguments, change=lambda patch: None):
    words = ["finetune", *arguments, "--output", folder / "one", "--overwrite"]
    code, found = recorded(words, change)
    assert code == 0
    return found


def same_as_one_process(tmp_path, *arguments):
    """Gradients of every step and the loss, within the budget; the same scores."""
    codes, (own, other), _ = two_ranks(tmp_path, *arguments, "--batch-size", 2)
    assert codes == (0, 0)
    joined = (tmp_path, *arguments, "--batch-size", 4)
    stock, exact = by_reference(alone, *joined), by_reference(alone, *joined, change=in_float64)
    steps = {name for name in own if name.startswith("step")}
    assert steps and all(torch.equal(own[name], other[name]) for name in steps)
    all_within_budget(own, stock, exact, torch.float32)


@needs_fork
def test_two_ranks_train_as_one_process(tmp_path):
    """Five images: a batch of four, then one, of which the second rank has none."""
    data = fill_folder(tmp_path / "data", 6)
    same_as_one_process(tmp_path, "--data", data, *TINY, *STILL)
