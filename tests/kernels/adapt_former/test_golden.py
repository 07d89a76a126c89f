# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT's own numbers on AdaptFormer: its K, folded into down here, is no part of the branch.

Three blocks share the relation tensors; each block's MLP is one frozen linear layer.
"""

from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from budgets import all_within_budget, keep
from draws import DEVICE

from samfast.functional import adapt_former

from .cases import runnable

GOLDEN = Path(__file__).parents[2] / "golden" / "cobot_adaptformer.safetensors"
SIDE = ("norm.weight", "norm.bias", "down.weight", "down.bias", "up.weight", "up.bias")


def quaternion(r, i, j, k):
    """(V, V) from four (V/4, V/4): y = x W."""
    rows = ((r, i, j, k), (-i, r, k, -j), (-j, -k, r, i), (-k, j, -i, r))
    return torch.cat([torch.cat(row, 1) for row in rows])


def run(tensors, dtype, branch):
    """{name: y of each block, "grad.…" of every tensor that has one}."""
    given = {n: t.to(DEVICE, dtype) for n, t in tensors.items() if not n.startswith("grad.")}
    wanted = {n.removeprefix("grad.") for n in tensors if n.startswith("grad.")}
    leaves = {n: given[n].requires_grad_() for n in sorted(wanted)}
    c, p = given["relation_coefficients"], given["relation_matrix"]
    results, total = {}, 0.0
    for m in range(3):
        block = {n: given[f"block{m}.{n}"] for n in ("x", "gamma", "grad_y", "y", *SIDE)}
        head = quaternion(*(given[f"block{m}.head.{part}"] for part in "rijk"))
        kernel = (block["gamma"] + (c @ p)[0, :, m])[:, None] * head
        norm_weight, norm_bias, down, down_bias, up, up_bias = (block[n] for n in SIDE)
        mlp = (given[f"block{m}.mlp.weight"], given[f"block{m}.mlp.bias"])
        y = branch(
            block["x"], F.linear(block["x"], *mlp), norm_weight, norm_bias, kernel.t() @ down,
            down_bias @ kernel, up, up_bias,
        )  # fmt: skip
        results[f"block{m}.y"] = y.detach()
        total = total + (y * block["grad_y"]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return results | {f"grad.{n}": g for n, g in zip(leaves, grads, strict=True)}


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "triton"])
def test_golden(backend):
    if backend == "cpu" and DEVICE.type == "cuda":
        pytest.skip("the C++ backend takes CPU tensors")
    if backend == "triton" and (reason := runnable("triton")):
        pytest.skip(reason)
    tensors = safetensors.torch.load_file(GOLDEN)

    def branch(backend):
        return lambda *args: adapt_former(*args, backend=backend)

    ours = run(tensors, torch.float32, branch(backend))
    stock, exact = (
        partial(run, tensors, t, branch("reference")) for t in (torch.float32, torch.float64)
    )
    budget = all_within_budget(ours, stock, exact, torch.float32)
    assert len(ours) == 3 + sum(n.startswith("grad.") for n in tensors)
    keep(budget, {name: tensors[name].to(DEVICE) for name in ours})
