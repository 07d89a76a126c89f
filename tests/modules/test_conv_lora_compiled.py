# SPDX-License-Identifier: Apache-2.0
"""Conv-LoRA under torch.compile where nothing ran eagerly before, and with sizes that change."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from samfast.modules import ConvLoraLinear

ROOT = Path(__file__).parents[2]
FIRST = """
import torch
from samfast.modules import ConvLoraLinear
torch.manual_seed(0)
layer, x = ConvLoraLinear(12, 18, experts=3), torch.randn(2, 4, 4, 12)
layer.eval()
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
assert torch.equal(compiled, layer(x))
compiled.sum().backward()
print("compiled first")
"""


@pytest.mark.slow_on_cpu
def test_the_first_call_of_a_process_may_be_a_compiled_one():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", FIRST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "compiled first", done.stderr


@pytest.mark.slow_on_cpu
def test_batches_and_token_counts_may_change():
    torch.manual_seed(0)
    layer = ConvLoraLinear(12, 18, experts=3).train()
    torch.nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for samples, side in ((3, 4), (2, 4), (2, 5), (1, 3)):
        x = torch.randn(samples, side * side, 12)
        results = []
        for call in (layer, compiled):
            torch.manual_seed(1)  # of the gate's noise
            y, aux = call(x, return_aux=True)
            grads = torch.autograd.grad((y * y).sum() + aux, list(layer.parameters()))
            results.append([y, aux, *grads])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
