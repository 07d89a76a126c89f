# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of profiling: launches reach a hook, and ranges their kernels."""

import pytest
import torch
from torch.profiler import profile

import samfast
from samfast.functional import lora_linear

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.gpu
KERNELS = "down up up_backward reduce down_backward reduce".split()


def step():
    """LoRA forward and backward on Triton."""
    x, a = (torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((64, 32), (4, 32)))
    b = torch.randn(48, 4, device="cuda", requires_grad=True)
    y = lora_linear(x, torch.randn(48, 32, device="cuda"), None, a, b, 1.0, backend="triton")
    y.sum().backward()


def test_a_profiler_hears_of_each_launch():
    heard, hook = [], triton.knobs.runtime.launch_enter_hook

    def listen(metadata):
        heard.append(metadata.get())

    step()
    hook.add(listen)
    try:
        step()
    finally:
        hook.remove(listen)
    assert [h["name"] for h in heard] == [f"samfast/lora_linear/{name}_kernel" for name in KERNELS]
    assert all(h["bytes"] > 0 for h in heard)
    assert sum(h.get("flops32", 0) for h in heard) == 2 * 64 * 4 * 3 * (32 + 48)


def test_a_profile_has_the_ranges_and_the_kernels():
    step()
    with samfast.ranges(True), profile() as made:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in made.events()]
    for name in ("samfast/lora_linear/forward", "samfast/lora_linear/backward", "down_kernel"):
        assert name in names
