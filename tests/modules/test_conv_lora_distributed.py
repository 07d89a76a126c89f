# SPDX-License-Identifier: Apache-2.0
"""Two ranks: no unused-parameter mode is needed, and aux_loss reaches every rank's gates."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_ranks import STEPS

HERE = Path(__file__).parent


@pytest.mark.slow_on_cpu
@pytest.mark.skipif(
    not torch.distributed.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"
)
def test_two_ranks_average_what_each_alone_would_have(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run(
        [sys.executable, str(HERE / "two_ranks.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second, alone = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    assert len(first) == len(STEPS)
    for kind, a, b, expected in zip(STEPS, first, second, alone, strict=True):
        for name, value in expected.items():
            assert torch.equal(a[name], b[name]), (kind, name)
            assert torch.equal(a[name], value), (kind, name)
            if name.endswith(("w_gate", "w_noise")):
                assert bool(value.any()) == (kind not in (None, 0.0)), (kind, name)
