# SPDX-License-Identifier: Apache-2.0
"""The counters count what they say, and see what hides from simpler ones."""

import pytest
import torch
import torch.nn.functional as F

import samfast.kernels.relpos_attention.flops  # noqa: F401 - the formulas
from samfast.counters import Counts, Living, count, counting, saved_bytes


def test_views_and_allocations_are_no_launches():
    x = torch.randn(4, 6)
    assert count(lambda: x.t().reshape(3, 8).new_empty(5)).launches == {"clone": 1}
    assert count(lambda: x.view(6, 4)[1:].unsqueeze(0).expand(2, -1, -1)).total_launches == 0


def test_launches_bytes_and_flops():
    x, weight = torch.randn(10, 6), torch.randn(8, 6)
    counts = count(lambda: F.linear(x, weight).relu_())
    assert counts.launches == {"mm": 1, "relu_": 1}
    assert counts.flops == 2 * 10 * 6 * 8
    assert counts.bytes == 4 * (10 * 6 + 8 * 6 + 10 * 8) + 4 * 2 * 10 * 8
    assert counts.largest == 4 * 10 * 8


def test_casts_and_fills_count():
    x = torch.randn(4)
    assert count(lambda: x.half().zero_()).launches == {"_to_copy": 1, "zero_": 1}


def test_what_writes_and_returns_nothing_counts():
    tensors = [torch.ones(4), torch.ones(6)]
    counts = count(lambda: torch._foreach_mul_(tensors, 2.0))
    assert counts.launches == {"_foreach_mul_": 1}
    assert counts.bytes == 4 * (4 + 6)


def test_calls_are_told_to_a_counts_of_one_s_own():
    class Told(Counts):
        def launch(self, name, times, size, flops):
            super().launch(name, times, size, flops)
            told.append((tuple(self.inside), name, flops))

    told = []
    q = torch.randn(1, 2, 2, 3, 1, 16)
    inputs = (q, None, None, None, *torch.randn(2, 3, 16))
    operator = "samfast::window_relpos_attention_forward"
    with counting(counts=Told()) as counts:
        torch.ops.samfast.window_relpos_attention_forward(*inputs, [1, 2, 2, 2, 2], 0.25, "torch")
        q + 1
    assert {inside for inside, *_ in told} == {(operator,), ()}
    assert told[-1] == ((), "aten::add", 0)
    assert sum(flops for *_, flops in told) == counts.flops > 0
    assert len(told) == counts.total_launches


def test_an_operator_can_be_run_another_way():
    asked = []
    inputs = (torch.randn(1, 2, 2, 3, 1, 16), None, None, None, *torch.randn(2, 3, 16))

    def run(func, args, kwargs):
        asked.append(func._schema.name)
        return func(*args, **kwargs)

    with counting(run=run) as counts:
        torch.ops.samfast.window_relpos_attention_forward(*inputs, [1, 2, 2, 2, 2], 0.25, "torch")
    assert asked == ["samfast::window_relpos_attention_forward"]
    assert counts.total_launches == 0


def test_host_syncs():
    x = torch.randn(4)
    assert count(lambda: x.sum().item()).syncs == {"_local_scalar_dense": 1}
    assert count(lambda: x[x > 0]).total_syncs == 1
    assert count(lambda: torch.nonzero(x)).syncs == {"nonzero": 1}
    assert count(lambda: x.sum()).total_syncs == 0


def test_saved_bytes_by_hooks_and_by_living_storages():
    x = torch.randn(16, 4)
    weight = torch.randn(4, 4, requires_grad=True)
    saved = saved_bytes(lambda: (x @ weight).sigmoid(), [weight])
    # the product's input by its hook; sigmoid keeps its own result, which the caller holds anyway
    assert saved.hooks == 4 * (16 * 4 + 16 * 4)
    assert saved.living == 0


class Hides(torch.autograd.Function):
    """Keeps a tensor aside where the hooks cannot see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.aside = x * 2
        return x + 1

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.aside


def test_a_tensor_kept_aside_shows_as_a_living_storage():
    x = torch.randn(32, requires_grad=True)
    saved = saved_bytes(lambda: Hides.apply(x), [x])
    assert saved.hooks == 0
    assert saved.living == 4 * 32


def test_living_storages_at_their_most():
    x = torch.zeros(100)
    with Living([x]) as living, counting():
        y = (x + 1) * 2  # two at once, then one
        view = y[10:]
        z = torch.cat([y, x])
        del y
        del view  # only now is y gone
        x + 1
    assert living.peak() == 4 * (100 + 200)
    assert living.peak(but=[z]) == 4 * 200
    assert [size // 400 for _, size in living.events] == [1, 1, -1, 2, -1, 1, -1]


@pytest.mark.parametrize("window", [2, 3], ids=["whole", "padded"])
@pytest.mark.parametrize("tables", [True, False])
def test_a_closed_operator_is_one_call(tables, window):
    """Its formulas are what its torch path computes, queries of the padding included."""
    ops, options = torch.ops.samfast, ([1, 2, 2, window, window], 0.25, "torch")
    tables_of = torch.randn(2, 2 * window - 1, 16)
    inputs = (torch.randn(1, 2, 2, 3, 1, 16), None, None, None, *tables_of)
    needs = [True, False, False, False, tables, tables]

    def both():
        out, lse = ops.window_relpos_attention_forward(*inputs, *options)
        ops.window_relpos_attention_backward(out, out, lse, *inputs, *options, needs)

    names = [f"window_relpos_attention_{way}" for way in ("forward", "backward")]
    with counting([f"samfast::{name}" for name in names]) as closed:
        both()
    with counting() as opened:
        both()
    assert closed.launches == dict.fromkeys(names, 1)
    assert opened.total_launches > 10
    assert closed.flops == opened.flops > 0
