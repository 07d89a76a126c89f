# SPDX-License-Identifier: Apache-2.0
"""A step of training can be captured as a CUDA graph, and a step that cannot is found out.

Under the stand-in driver, in a process of its own, because tests import kernels for the
interpreter.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from offline_gate import ROOT

pytestmark = pytest.mark.slow
PROGRAM = ROOT / "tests" / "instruments" / "captured_steps.py"
READS = r"the host reads: "
FAULTS = {
    "item": READS + "_local_scalar_dense",
    "branch": READS + "_local_scalar_dense",
    "operator": READS + "_local_scalar_dense",
    "tolist": READS + "tolist",
    "cpu": READS + "cpu",
    "mask": READS + "index",
    "nonzero": READS + "nonzero",
    "tensor": "a tensor is made of Python's numbers",
    "as_tensor": "a tensor is made of Python's numbers",
    "index": "a tensor is made of Python's numbers",
    "number": "a step launches what the one before did not",
    "launch": "a step launches what the one before did not",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the program says."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = (ROOT, ROOT / "tests", ROOT / "tests" / "integrations")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_step_does_what_a_graph_would_not_repeat(told):
    for name, step in told["steps"].items():
        assert step["faults"] == [], name
        assert step["launches"] > 30, name
    assert set(told["methods"]) - {"decoder"} <= set(told["steps"])


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(told, name):
    assert any(re.fullmatch(FAULTS[name], fault) for fault in told["planted"][name])


def test_every_plant_is_looked_for(told):
    assert set(told["planted"]) == set(FAULTS)


def test_native_code_takes_memory_from_torch_only():
    sources = [*ROOT.glob("csrc/**/*.cu"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cpp")]
    assert len(sources) > 5
    assert not [path for path in sources if re.search(r"cuda\w*Malloc", path.read_text())]
