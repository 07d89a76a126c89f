# SPDX-License-Identifier: Apache-2.0
"""The attention operations: sizes that change, what they save, and bad arguments."""

import dataclasses
from functools import partial

import pytest
import torch
from budgets import within_budget
from draws import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

from samfast.counters import saved_bytes
from samfast.functional import relpos_attention, window_relpos_attention

from .cases import MAP, WINDOWS, MapCase, WindowCase


@pytest.mark.slow_on_cpu("windows")
@pytest.mark.parametrize("case", [MAP, WINDOWS], ids=["map", "windows"])
def test_compile_with_sizes_that_change(case):
    """One graph serves every batch, as with stock layers."""
    calls = []

    def backend(graph, inputs):
        calls.append(1)
        return graph

    compiled = torch.compile(
        lambda *t: case.call(t, "torch"), fullgraph=True, dynamic=True, backend=backend
    )
    for batch in range(11, 14):  # no other size, for which it might be taken
        again = dataclasses.replace(case, batch=batch)
        leaves, _ = again.tensors(torch.float32)
        assert torch.equal(compiled(*leaves), again.call(leaves, "torch"))
    assert len(calls) == 1


def test_a_table_resized_by_shapes_alone_leaves_no_trace():
    """Fake tensors and inference mode make no tensor that a later call would meet."""
    case = dataclasses.replace(MAP, tables=(9, 4))
    leaves, dout = case.tensors(torch.float64)
    with FakeTensorMode() as mode:
        case.call([mode.from_tensor(t) for t in leaves], "torch")
    with torch.inference_mode():
        case.call(leaves, "torch")
    assert torch.autograd.grad(case.call(leaves, "torch"), leaves, dout)[3].isfinite().all()


def test_saved_for_backward_is_qkv_and_the_result():
    """Beside them one number a query and head, and what makes the padding."""
    case = WindowCase(heads=4, head_dim=32, rank=3)
    leaves, _ = case.tensors(torch.float32)
    saved = saved_bytes(lambda: case.call(leaves, "auto"), leaves[1:])
    qkv, queries = leaves[0], case.batch * case.height * case.width * case.heads
    tensors = qkv.nbytes + qkv.nbytes // 3
    assert saved.hooks == tensors + saved.living
    assert 0 < saved.living <= 8 * queries


def test_batches_of_one_image_are_the_batch():
    """Images do not see each other."""
    case = WindowCase(batch=2, rank=0)
    (qkv, *rest), _ = case.tensors(torch.float64)
    both = partial(case.call, [qkv, *rest], "reference")
    alone = torch.cat([case.call([image[None], *rest], "torch") for image in qkv])
    within_budget(alone, both, both, torch.float64)


BAD_MAPS = {
    "shapes": (lambda q, k, v, h, w: (q, k[:, :, :1], v, h, w), r"\(1, 1, 1, 3, 16\)"),
    "dimensions": (lambda q, k, v, h, w: (q[0], k[0], v[0], h, w), r"\(1, 2, 3, 16\)"),
    "dtype": (lambda q, k, v, h, w: (q, k.half(), v, h, w), "k is torch.float16 but q is"),
    "table": (lambda q, k, v, h, w: (q, k, v, h[:, :8], w), r"rel_pos_h has shape \(3, 8\)"),
    "no table": (lambda q, k, v, h, w: (q, k, v, h, w[:0]), r"rel_pos_w has shape \(0, 16\)"),
    "integer": (lambda q, k, v, h, w: (q, k, v, h.int(), w), "rel_pos_h is torch.int32"),
    "no tokens": (
        lambda q, k, v, h, w: (*(t[:, :, :0] for t in (q, k, v)), h, w),
        "no side may be 0",
    ),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_maps_end_in_a_sentence(name):
    change, message = BAD_MAPS[name]
    leaves, _ = MAP.tensors(torch.float32)
    with pytest.raises(ValueError, match=message):
        relpos_attention(*change(*leaves))


BAD_WINDOWS = {
    "heads": ({"num_heads": 5}, "5 heads need"),
    "no heads": ({"num_heads": 0}, "num_heads is 0"),
    "half heads": ({"num_heads": 2.0}, r"num_heads is 2\.0"),
    "half window": ({"window": 4.0}, r"window is 4\.0"),
    "no window": ({"window": None}, "window is None"),
    "window": ({"window": 0}, "window is 0"),
    "sides": ({"window": (3, 3, 3)}, r"window is \(3, 3, 3\)"),
    "bias": ({"pad_bias": torch.zeros(5)}, r"pad_bias has shape \(5,\) but qkv has 48 columns"),
    "half a factor": ({"pad_b": None}, "pad_h is given without pad_b"),
    "rows": ({"pad_h": torch.zeros(3, 2)}, r"pad_h has shape \(3, 2\), but the padding has 2 rows"),
    "factor": ({"pad_b": torch.zeros(48, 5)}, r"pad_b has shape \(48, 5\)"),
}


@pytest.mark.parametrize("name", BAD_WINDOWS)
def test_bad_windows_end_in_a_sentence(name):
    changes, message = BAD_WINDOWS[name]
    (qkv, table_h, table_w, bias, pad_h, pad_b), _ = WINDOWS.tensors(torch.float32)
    named = {"qkv": qkv, "num_heads": 1, "window": (2, 2), "rel_pos_h": table_h}
    named |= {"rel_pos_w": table_w, "pad_bias": bias, "pad_h": pad_h, "pad_b": pad_b}
    changes = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        window_relpos_attention(**(named | changes))


def test_backends_that_cannot_run_say_so():
    leaves, _ = MapCase(head_dim=24).tensors(torch.float32)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        relpos_attention(*leaves, backend="fast")
    for backend in ("cpu", "triton"):
        with pytest.raises(RuntimeError, match="head_dim 24 is not a multiple of 16"):
            relpos_attention(*leaves, backend=backend)
    with pytest.raises(RuntimeError, match="no CUDA source"):
        relpos_attention(*leaves, backend="cuda")
    wide, _ = MapCase().tensors(torch.float64)
    with pytest.raises(RuntimeError, match=r"torch\.float64"):
        relpos_attention(*wide, backend="cpu" if DEVICE.type == "cpu" else "triton")
    assert relpos_attention(*leaves).shape == leaves[0].shape  # auto takes what is left
