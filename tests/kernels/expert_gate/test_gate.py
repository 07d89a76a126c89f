# SPDX-License-Identifier: Apache-2.0
"""The gate against its specification: choice, loss and the loss's gradient made with it."""

import pytest
import torch
from budgets import all_within_budget, assert_same_dtypes
from draws import DEVICE

from samfast.functional import expert_gate
from samfast.kernels._common.windows import Windows
from samfast.kernels.expert_gate import reference

from .cases import BACKENDS, runnable, tensors

NAMES = ("loss", "dh", "dw_gate", "dw_noise")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := runnable(request.param):
        pytest.skip(reason)
    return request.param


def run(leaves, noise, backend, **options):
    index, loss = expert_gate(*leaves, noise=noise, backend=backend, **options)
    if noise is None and backend == "reference":
        return index, [loss, *(torch.zeros_like(t) for t in leaves)]
    return index, [loss, *torch.autograd.grad(loss, leaves)]


@pytest.mark.slow_on_cpu("triton-34x1x2x5x3", "triton-25x14x14x3x8", "torch.float16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "sizes",
    [(1, 3, 4, 3, 4), (25, 14, 14, 3, 8), (6, 1, 1, 1, 2), (34, 1, 2, 5, 3), (4, 5, 7, 16, 8)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_values(sizes, training, dtype, backend):
    leaves, noise = tensors(*sizes, dtype=dtype)
    noise = noise if training else None
    index, ours = run(leaves, noise, backend)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    given = wide, None if noise is None else noise.double(), "reference"
    assert torch.equal(index, run(*given)[0])
    budget = all_within_budget(
        ours, lambda: run(leaves, noise, "reference")[1], lambda: run(*given)[1], dtype, NAMES
    )
    assert_same_dtypes(ours, budget)


def test_a_forced_choice_is_what_importance_counts(backend):
    leaves, noise = tensors(6, dtype=torch.float32)
    forced = torch.tensor([0, 0, 0, 3, 3, 1], device=DEVICE)
    index, ours = run(leaves, noise, backend, expert_index=forced)
    assert torch.equal(index, forced) and index.data_ptr() != forced.data_ptr()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    all_within_budget(
        ours,
        lambda: run(leaves, noise, "reference", expert_index=forced)[1],
        lambda: run(wide, noise.double(), "reference", expert_index=forced)[1],
        torch.float32,
        NAMES,
    )
    chosen, free = run(leaves, noise, backend)
    counts = [torch.bincount(i, minlength=4).sort().values for i in (chosen, forced)]
    assert torch.equal(*counts) or not torch.equal(free[0], ours[0])


def test_one_expert_and_no_sample_lose_nothing(backend):
    for sizes in ((4, 3, 4, 3, 1), (0, 3, 4, 3, 4)):
        leaves, noise = tensors(*sizes, dtype=torch.float32)
        for given in (noise, None):
            index, results = run(leaves, given, backend)
            assert index.shape == (sizes[0],) and not index.any()
            assert not any(t.any() for t in results)


def test_a_tie_goes_to_the_first_and_nan_to_some_expert(backend):
    (h, w_gate, w_noise), _ = tensors(3, dtype=torch.float32)
    zeros = torch.zeros_like(w_gate)
    assert not expert_gate(h, zeros, zeros, backend=backend)[0].any()
    with torch.no_grad():
        h[1, 0, 0, 0] = torch.nan
    index, _ = expert_gate(h, w_gate, w_noise, backend=backend)
    assert set(index.tolist()) <= {0, 1, 2, 3}


def test_pads_count_as_zeros(backend):
    windows = Windows(1, 5, 6, 4, 4)
    generator = torch.Generator().manual_seed(8)
    h = torch.randn(windows.tokens, 3, generator=generator).to(DEVICE)
    (_, w_gate, w_noise), noise = tensors(windows.samples, dtype=torch.float32)
    index, loss, dpool, dgate = torch.ops.samfast.expert_gate_forward(
        h, w_gate, w_noise, noise, None, list(windows), 0.01, backend
    )

    def literal(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (h, w_gate, w_noise)]
        chosen, _, value = reference.expert_gate(
            windows.cut(leaves[0]), *leaves[1:], noise.to(dtype), coefficient=0.01
        )
        dh, *dgates = torch.autograd.grad(value, leaves)
        per_sample = windows.cut(dh)[:, 0, 0]  # the first pixel of every window is in the image
        return chosen.squeeze(1), [value, per_sample, torch.stack(dgates)]

    assert torch.equal(index, literal(torch.float64)[0])
    stock, exact = ((lambda t=t: literal(t)[1]) for t in (torch.float32, torch.float64))
    all_within_budget([loss, dpool, dgate], stock, exact, torch.float32, ("loss", "dh", "dgate"))


def test_a_seed_draws_what_the_published_module_draws():
    leaves, _ = tensors(5, dtype=torch.float32)
    torch.manual_seed(4)
    noise = torch.randn(5, 4).to(DEVICE)
    torch.manual_seed(4)
    if DEVICE.type == "cpu":
        _, drawn = expert_gate(*leaves, training=True)
        assert torch.equal(drawn, expert_gate(*leaves, noise=noise)[1])
    first, second = (
        expert_gate(*leaves, training=True, generator=torch.Generator(DEVICE).manual_seed(1))[1]
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.slow_on_cpu
def test_opcheck_without_noise():
    (h, w_gate, w_noise), _ = tensors(4, dtype=torch.float32)
    h = h.detach().reshape(-1, 3).requires_grad_()
    arguments = (h, w_gate, w_noise, None, None, [4, 3, 4, 3, 4], 0.01, "torch")
    torch.library.opcheck(torch.ops.samfast.expert_gate, arguments)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"h": torch.zeros(2, 12, 3)}, r"h has shape \(2, 12, 3\), but must be"),
        ({"w_gate": torch.zeros(2, 4)}, r"w_gate has shape \(2, 4\), but h of rank 3 needs"),
        ({"w_noise": torch.zeros(3, 5)}, r"w_noise has shape \(3, 5\), but h of rank 3 needs"),
        ({"noise": torch.zeros(2, 3)}, r"noise has shape \(2, 3\), but 2 samples and 4 experts"),
        ({"expert_index": torch.zeros(2)}, r"but is torch.float32 \(2,\)"),
        ({"noise": torch.zeros(2, 4, device="meta")}, "noise is on meta but h is on cpu"),
    ],
)
def test_one_sentence(changes, sentence):
    good = {"h": torch.zeros(2, 3, 4, 3), "w_gate": torch.zeros(3, 4), "w_noise": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=sentence):
        expert_gate(**{**good, **changes})


def test_the_reference_breaks_ties_as_the_others_do():
    h, zeros = torch.randn(3, 2, 2, 3), torch.zeros(3, 8)
    assert not expert_gate(h, zeros, zeros, backend="reference")[0].any()
