# SPDX-License-Identifier: Apache-2.0
"""What Triton launches tell a profiler: the bytes of the counters and the FLOP of costs.py."""

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from draws import DEVICE

from samfast.backends import triton_missing
from samfast.counters import Counts, _triton_launches, count
from samfast.functional import lora_linear
from samfast.kernels import operations
from samfast.kernels._common.windows import Windows

pytest.importorskip("triton")

from instruments import told_launches

ROOT = Path(__file__).parents[2]
OPERATIONS = operations("launches.py")
WINDOWS = Windows(4, 64, 64, 14, 14)
# Operations and kernels whose products run in float32 whatever the tensors are.
FLOAT32 = (
    "conv_experts expert_gate hypercomplex cobot_fold fold_kernel fold_backward_kernel rope".split()
)


def costs(operation):
    return importlib.import_module(f"samfast.kernels.{operation}.costs")


def stages(operation, *sizes) -> dict[str, int]:
    """FLOP of the stages of costs.py by name; of stages with one name, of the first."""
    designed = {}
    for stage in costs(operation).stages(*sizes):
        designed.setdefault(stage.name, stage.flops)
    return designed


def designs() -> dict[str, dict[str, int]]:
    """By operation, FLOP of each kernel at the sizes of its first usual configuration."""
    lora = stages("lora_linear", 19600, 1280, 3840, 4, 2)
    branch = stages("adapt_former", 16384, 1280, 16, 2)
    attention = stages("relpos_attention", WINDOWS, 16, 80, 2)
    plain = stages("window_attention", Windows(4, 72, 72, 24, 24), 16, 64, 2)
    each = [n for n in range(8) for _ in range(WINDOWS.samples)]  # each expert, 8 times too many
    experts = stages("conv_experts", WINDOWS, each, tuple(range(1, 9)), 3, False, 2)
    phm = stages("hypercomplex", 4, 768, 3072, 4, 2)
    core = {s.name: s.flops for s in costs("task_core").product(3 * 19600, 32, 32, 3, 2)}
    cores = {s.name: s.flops for s in costs("task_core").cores(24, 32, 32, 4, 3)}
    turn = stages("rope", 4 * 72 * 72, 24 * 24, 16, 64, 2)
    block = stages("sam_block", Windows.whole(4, 64, 64), 1280, 16, 4, 2)
    return {
        "lora_linear": {
            f"{name}_kernel": lora[name] for name in ("down", "up", "up_backward", "down_backward")
        },
        "adapt_former": {
            "low_kernel": branch["LN, down, ReLU, drop"],
            "low_backward_kernel": branch["norm backward, G"],
        },
        "relpos_attention": {
            "forward_kernel": attention["forward"],
            "dq_kernel": attention["dq, factors, delta"],
            "dkv_kernel": attention["dk, dv"],
            "tables_kernel": attention["dtables"],
        },
        "window_attention": {
            "forward_kernel": plain["forward"],
            "dq_kernel": plain["dq"],
            "dkv_kernel": plain["dk, dv"],
        },
        "conv_experts": {
            "forward_kernel": experts["experts"] // 8,
            "backward_kernel": experts["experts backward"] // 8,
        },
        "expert_gate": {"balance_kernel": experts["gate"] // 8},
        "hypercomplex": {
            "build_kernel": phm["build H"],
            "contract_kernel": phm["dweights, shares of drules"],
        },
        "task_core": {
            "product_kernel": core["z = h M"],
            "product_backward_kernel": core["dh, dM"],
            "fold_kernel": cores["M"],
            "fold_backward_kernel": cores["dG, dU3"],
        },
        "cobot_fold": {
            "fold_kernel": costs("cobot_fold").fold(64, 4, 64, 1280, False),
            "fold_backward_kernel": costs("cobot_fold").fold_backward(64, 4, 64, 1280, False),
            "shared_backward_kernel": costs("cobot_fold").shared_backward(64, 4, 64),
        },
        "rope": {"rotate_kernel": turn["rotate"] + turn["rotate back"]},
        "sam_block": {
            "norm_row_kernel": block["norm1, h"] + block["x1 = x + update, norm2, h"],
            "norm_row_backward_kernel": block["norm1 backward, dA"],
            "add_row_kernel": block["y = x1 + update"],
            "gelu_kernel": block["GELU, h"],
            "gelu_backward_kernel": block["GELU backward, dA, dz, dB"],
        },
    }


def usual(operation):
    """The launches of the first usual configuration, and what the counters count of them."""
    module = importlib.import_module(f"samfast.kernels.{operation}.launches")
    _, calls = next(iter(module.launches(True)))
    call = calls if callable(calls) else next(iter(calls.values()))
    counts = Counts()
    with told_launches.interpreted() as launches, _triton_launches(counts):
        call()
    return launches, counts


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_launch_tells_its_name_flop_and_bytes(operation):
    """As Triton asks: nothing before a profiler's hook wants it."""
    launches, counted = usual(operation)
    flops, told_bytes = {}, 0
    for kernel, grid, arguments in launches:
        handed = told_launches.handed(kernel, grid, arguments)
        name = kernel.fn.__name__
        assert "bytes" not in handed.data
        found = handed.get()
        home = kernel.fn.__module__.split(".")[-2]  # the block adds up with lora_linear's kernel
        assert found["name"] == f"samfast/{home}/{name}"
        given = [t.nbytes for t in arguments.values() if isinstance(t, torch.Tensor)]
        assert found["bytes"] == sum(given)
        told_bytes += found["bytes"]
        width = 32 if operation in FLOAT32 or name in FLOAT32 else 16
        others = {key for key in found if key.startswith("flops")} - {f"flops{width}"}
        assert not others, others
        if f"flops{width}" in found:
            flops[name] = flops.get(name, 0) + found[f"flops{width}"]
    assert flops == designs()[operation]
    assert told_bytes == counted.bytes > 0
    assert sum(flops.values()) == counted.flops


@pytest.mark.parametrize("down", [False, True])
def test_the_fold_s_flop_are_those_counted(down):
    """Where all slices are folded; the torch path has the coefficients of all in any case."""
    path = importlib.import_module("samfast.kernels.cobot_fold.torch_path")
    width, rows, layers, own = 8, 20, 3, 1 if down else 2
    slices = layers * own
    c, p = torch.randn(1, width, slices), torch.randn(slices, slices)
    gammas = [torch.randn(own * width) for _ in range(layers)]
    heads = [torch.randn(own, 4, width // 4, width // 4) for _ in range(layers)]
    shape = (width, rows) if down else (own * rows, width)
    factors = [torch.randn(shape) for _ in range(layers)]
    biases = [torch.randn(width) for _ in range(layers)] if down else []
    inputs = (c, p, gammas, heads, factors, biases, 0, down)
    folded, shifts = path.forward(*inputs)
    sizes = slices, width, slices, rows, down
    assert count(lambda: path.forward(*inputs)).flops == costs("cobot_fold").fold(*sizes)
    backward = count(lambda: path.backward(folded, shifts if down else None, *inputs)).flops
    designed = costs("cobot_fold").fold_backward(*sizes)
    assert backward == designed + costs("cobot_fold").shared_backward(*sizes[:3])


@pytest.mark.parametrize("noisy", [False, True])
def test_the_gate_s_flop_are_those_counted(noisy):
    path = importlib.import_module("samfast.kernels.expert_gate.torch_path")
    h, weight, windows = torch.randn(6 * 16, 3), torch.randn(3, 8), Windows.whole(6, 4, 4)
    noise = torch.randn(6, 8) if noisy else None
    made = count(lambda: path.forward(h, weight, weight, noise, None, windows, 0.01))
    assert made.flops == costs("expert_gate").gate(6, 3, 8, noisy)


@pytest.mark.skipif(triton_missing(DEVICE) is not None, reason="Triton does not run here")
def test_the_counters_count_them_as_they_count_torch_s():
    """FLOP of a step are the same whoever runs it, where no kernel makes a product twice."""
    sizes = ((8, 16), (12, 16), (2, 16), (12, 2))
    x, weight, a, b = (torch.randn(*size, device=DEVICE, requires_grad=True) for size in sizes)

    def step(backend):
        y = lora_linear(x, weight.detach(), None, a, b, 1.0, backend=backend)
        torch.autograd.grad(y.sum(), [x, a, b])

    flops = [count(partial(step, backend)).flops for backend in ("torch", "triton")]
    assert flops[0] == flops[1] == 2 * 2 * 8 * 16 * 12 + 3 * 2 * 8 * 2 * (16 + 12)


@pytest.mark.slow
def test_every_launch_can_be_asked_and_no_code_depends_on_it():
    """Of kernels as a GPU has them, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    program = [sys.executable, "-m", "instruments.told_launches"]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["asked"] > 2000 and found["numbers"] and found["heard"]
    assert len(found["same"]) == 37 and all(found["same"].values()), found["same"]
