# SPDX-License-Identifier: Apache-2.0
"""What window_attention saves, who runs it, its FLOP, and bad arguments."""

import dataclasses

import pytest
import torch
from draws import DEVICE
from torch.utils.flop_counter import FlopCounterMode

import samfast.kernels.window_attention.flops  # noqa: F401 - the formulas
from samfast import backends
from samfast.counters import saved_bytes
from samfast.functional import window_attention
from samfast.kernels._common.windows import Windows
from samfast.kernels.window_attention import costs, cpu_path, torch_path
from samfast.kernels.window_attention.op import TABLE, WindowAttention, supports

from .cases import SMALL, TURNED, Case


def test_saved_for_backward_is_qkv_and_the_result():
    """Beside them one number a query and head, and what makes the padding."""
    case = Case(heads=4, head_dim=32, rank=3)
    leaves, _ = case.tensors(torch.float32)
    saved = saved_bytes(lambda: case.call(leaves, "auto"), leaves[1:])
    qkv, queries = leaves[0], case.batch * case.height * case.width * case.heads
    assert saved.hooks == qkv.nbytes + qkv.nbytes // 3 + saved.living
    assert 0 < saved.living <= 8 * queries


def test_flop_are_two_products_and_five():
    """Over each query and each key of its window, padding included."""
    case = Case(heads=2, rank=0)
    leaves, _ = case.tensors(torch.float32)
    windows = (case.windows, case.heads, case.head_dim, 4)
    product = 2 * 2 * 20 * 17 * 2 * 14 * 14 * 16
    assert [s.flops for s in costs.cpu_stages(*windows)] == [2 * product, 5 * product]
    parts = leaves[0].detach().unflatten(3, (3, 2, 16))
    arguments = (leaves[1].detach(), None, None, None, None, False, list(case.windows), 0.25)
    ops = torch.ops.samfast
    out, lse = ops.window_attention_forward(parts, *arguments, "torch")

    needs = [True, True, False, False]
    with FlopCounterMode(display=False) as found:
        ops.window_attention_forward(parts, *arguments, "torch")
        assert found.get_total_flops() == 2 * product
        ops.window_attention_backward(out, out, lse, parts, *arguments, "torch", needs)
    assert found.get_total_flops() == 7 * product


@pytest.mark.parametrize("turn", ["interleaved", "halves"])
def test_opcheck_with_keys_that_are_rotated(turn):
    case = dataclasses.replace(TURNED, turn=turn)
    qkv, *sources = (t.detach() for t in case.tensors(torch.float32)[0])
    parts, out = qkv.unflatten(3, (3, 1, 16)), qkv.new_zeros(1, 3, 2, 1, 16)
    inputs = parts, *sources, *case.turns(), turn == "halves", list(case.windows), 0.25, "torch"
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.samfast
    for operator in (ops.window_attention, ops.window_attention_forward):
        torch.library.opcheck(operator.default, inputs, test_utils=checks)
    given = out, out, qkv.new_zeros(1, 1, 6), *inputs, [True] * 4
    torch.library.opcheck(ops.window_attention_backward.default, given, test_utils=checks)


def chosen(q, windows, backend="auto"):
    qkv = q[:, :, :, None].expand(*q.shape[:3], 3, *q.shape[3:])
    return WindowAttention.path(backend=backend, qkv=qkv, windows=list(windows))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="who runs what on a CPU")
def test_who_runs_on_a_cpu():
    q = torch.zeros(1, 4, 4, 2, 16)
    windows = Windows(1, 4, 4, 2, 2)
    has_native = backends.native_missing() is None
    assert chosen(q, windows) is (cpu_path if has_native else torch_path)
    for other in (q.double(), q[..., :12]):
        assert chosen(other, windows) is torch_path
        with pytest.raises(RuntimeError, match="backend 'cpu' cannot run window_attention"):
            chosen(other, windows, "cpu")
    assert "head_dim 12 is not a multiple of 16" in supports("cpu", q[..., :12], windows) or (
        not has_native
    )
    with pytest.raises(RuntimeError, match="it has no CUDA source of its own"):
        chosen(q, windows, "cuda")


def test_an_extension_from_before_is_too_old():
    assert TABLE.native == "window_attention_forward"


BAD = {
    "heads": ({"num_heads": 5}, "5 heads need"),
    "window": ({"window": 0}, "window is 0"),
    "bias": ({"pad_bias": torch.zeros(5)}, r"pad_bias has shape \(5,\) but qkv has 48 columns"),
    "half a factor": ({"pad_b": None}, "pad_h is given without pad_b"),
    "rows": ({"pad_h": torch.zeros(3, 2)}, r"pad_h has shape \(3, 2\), but the padding has 2 rows"),
    "dimensions": ({"qkv": torch.zeros(3, 2, 48)}, r"qkv has shape \(3, 2, 48\)"),
    "no tokens": ({"qkv": torch.zeros(1, 0, 2, 48)}, "but H and W must be at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_end_in_a_sentence(name):
    changes, message = BAD[name]
    (qkv, bias, pad_h, pad_b), _ = SMALL.tensors(torch.float32)
    named = {"qkv": qkv, "num_heads": 1, "window": (2, 2), "pad_bias": bias}
    named |= {"pad_h": pad_h, "pad_b": pad_b}
    changes = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        window_attention(**named | changes)


@pytest.mark.parametrize(
    ("cos", "sin", "message"),
    [
        ((2, 8), None, "pad_cos is given without pad_sin"),
        (None, (2, 8), "pad_sin is given without pad_cos"),
        ((2, 16), (2, 16), r"pad_cos has shape \(2, 16\) .* 2 pads of heads of 16 need \(2, 8\)"),
        ((3, 8), (3, 8), r"need \(2, 8\)"),
    ],
    ids=["sin", "cos", "width", "rows"],
)
def test_turns_that_do_not_fit(cos, sin, message):
    (qkv, bias, *_), _ = SMALL.tensors(torch.float32)
    turns = [None if shape is None else torch.ones(shape, device=DEVICE) for shape in (cos, sin)]
    with pytest.raises(ValueError, match=message):
        torch.ops.samfast.window_attention(
            qkv.unflatten(3, (3, 1, 16)), bias, None, None, *turns, False, [1, 3, 2, 2, 2], 0.25,
            "torch",
        )  # fmt: skip
