# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of the hypercomplex products; on a CPU the same code runs small.

Values, gradients and module checks run on a GPU too, from tests/kernels and tests/modules.
"""

import pytest
import torch
from draws import DEVICE

from samfast.backends import triton_missing
from samfast.counters import count
from samfast.functional import hypercomplex_linear
from samfast.kernels.hypercomplex import cuda_path
from samfast.modules import KroneckerLinear, PHMLinear, QuaternionLinear

from . import proofs
from .proofs import CUDA

pytestmark = pytest.mark.slow_on_cpu

REPEATS = 250 if CUDA else 2
TOKENS, INPUTS, OUTPUTS = (4096, 768, 3072) if CUDA else (12, 16, 32)
N = 4
BACKENDS = [name for name, missing in (
    ("triton", triton_missing(DEVICE)), ("cuda", cuda_path.missing(DEVICE, N))
) if missing is None] or ["torch"]  # fmt: skip
LAYERS = {
    "phm": lambda: PHMLinear(INPUTS, OUTPUTS, N, device=DEVICE),
    "quaternion": lambda: QuaternionLinear(INPUTS, OUTPUTS, device=DEVICE),
    "kronecker": lambda: KroneckerLinear(INPUTS, OUTPUTS, N, device=DEVICE),
}


def problem(dtype=torch.float32):
    """x, rules, weights, bias, all leaves, and an incoming gradient."""
    torch.manual_seed(0)
    layer = LAYERS["phm"]()
    leaves = [torch.randn(TOKENS, INPUTS, device=DEVICE).to(dtype), *layer.parameters()]
    leaves = [t.detach().requires_grad_() for t in leaves]
    return leaves, torch.randn(TOKENS, OUTPUTS, device=DEVICE).to(dtype)


def gradients(leaves, dy, backend):
    y = hypercomplex_linear(*leaves, backend=backend)
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend, dtype, deterministic):
    call = problem(dtype)
    proofs.same_bits(lambda: gradients(*call, backend), REPEATS, deterministic)


@pytest.mark.parametrize("name", LAYERS)
def test_optimizer_steps_under_graph_replay_equal_eager(name):
    """Parameters updated between replays must be seen: no matrix may be frozen in the graph."""

    def prepare():
        torch.manual_seed(0)
        layer = LAYERS[name]()
        if name == "kronecker":
            layer.requires_grad_(False)
            for _, parameter in layer.adapter_parameters():
                parameter.requires_grad_()
        x = torch.randn(64, INPUTS, device=DEVICE)
        target = torch.randn(64, OUTPUTS, device=DEVICE)
        trained = [p for p in layer.parameters() if p.requires_grad]
        return lambda: (layer(x) - target).square().mean(), trained

    proofs.steps_under_replay(prepare, 20, 0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counted_launches_and_syncs(backend):
    call = problem()
    counts = count(lambda: gradients(*call, backend))
    assert counts.total_launches <= (8 if backend != "torch" else 19)
    assert counts.total_syncs == 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_that_is_not_the_default(backend):
    call = problem()
    proofs.another_stream(lambda: gradients(*call, backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_matrix_is_not_kept(backend):
    """Nothing beside x, which is known here: H is gone when y is there."""
    leaves, _ = problem(torch.bfloat16)
    proofs.saved_as_allocated(lambda: hypercomplex_linear(*leaves, backend=backend), leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_profiler_sees_the_counted_launches(backend):
    if backend == "cuda":
        pytest.skip("its kernels carry mangled names, which the counter does not know")
    call = problem(torch.bfloat16)
    proofs.launches_as_profiled(lambda: gradients(*call, backend))
