# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of ``samfast warmup``: a new process loads all and compiles nothing.

Never run on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("triton", "tyro", "tqdm", "segment_anything"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.gpu
WORDS = "warmup --model vit_tiny --image-size 64 --method cobot-lora --json".split()


def test_a_second_process_finds_every_kernel(tmp_path):
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "samfast", *WORDS],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    first, second = told
    assert first["compiled"] == first["kernels"] == second["found"] > 0
    assert second["compiled"] == 0
