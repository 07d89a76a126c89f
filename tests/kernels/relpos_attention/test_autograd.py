# SPDX-License-Identifier: Apache-2.0
"""The attention operations as operators: gradcheck, opcheck, compile and what they save."""

import dataclasses
from functools import partial

import pytest
import torch
from budgets import all_within_budget, within_budget
from torch._subclasses.fake_tensor import FakeTensorMode

from samfast.counters import saved_bytes
from samfast.functional import relpos_attention, window_relpos_attention

from ..alike import assert_alike
from .cases import BACKENDS, DEVICE, MapCase, WindowCase, runnable

MAP = MapCase(batch=1, heads=1, height=2, width=3)
WINDOWS = WindowCase(batch=1, heads=1, height=3, width=2, window=(2, 2), rank=2)


@pytest.mark.parametrize("case", [MAP, WINDOWS], ids=["map", "windows"])
def test_gradcheck(case):
    leaves, _ = case.tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: case.call(t, "torch"), leaves)


def operator_arguments(case, requires_grad):
    leaves, dout = case.tensors(torch.float32)
    leaves = [t.detach().requires_grad_(requires_grad) for t in leaves]
    if case is MAP:
        q, k, v = (t.detach().movedim(1, 3).requires_grad_(requires_grad) for t in leaves[:3])
        windows = [1, 2, 3, 2, 3]
        inputs, dout = (q, k, v, *leaves[3:]), dout.movedim(1, 3)
    else:
        qkv, table_h, table_w, *pads = leaves
        qkv = qkv.detach().unflatten(3, (3, 1, 16)).requires_grad_(requires_grad)
        windows = list(case.windows)
        inputs, dout = (qkv, *pads, table_h, table_w), dout.unflatten(3, (1, 16))
    return inputs, windows, dout


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("case", [MAP, WINDOWS], ids=["map", "windows"])
def test_opcheck(case, requires_grad, backend):
    inputs, windows, _ = operator_arguments(case, requires_grad)
    name = "relpos_attention" if case is MAP else "window_relpos_attention"
    operator = getattr(torch.ops.samfast, name)
    torch.library.opcheck(operator, (*inputs, windows, 0.25, backend))


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [MAP, WINDOWS], ids=["map", "windows"])
def test_opcheck_of_the_two_halves(case, backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    inputs, windows, dout = operator_arguments(case, False)
    name = "relpos_attention" if case is MAP else "window_relpos_attention"
    forward = getattr(torch.ops.samfast, f"{name}_forward")
    checks = ("test_schema", "test_faketensor")
    arguments = (*inputs, windows, 0.25, backend)
    torch.library.opcheck(forward, arguments, test_utils=checks)
    backward = getattr(torch.ops.samfast, f"{name}_backward")
    for tables in (True, False):
        needs = [*[True] * (len(inputs) - 2), tables, tables]
        grads = (dout.contiguous(), *forward(*arguments), *arguments, needs)
        torch.library.opcheck(backward, grads, test_utils=checks)


@pytest.mark.slow_on_cpu("windows")
@pytest.mark.parametrize("case", [MAP, WINDOWS], ids=["map", "windows"])
def test_compile_fullgraph(case):
    leaves, dout = case.tensors(torch.float32)

    def call(*tensors):
        return case.call(tensors, "auto")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, traced = call(*leaves), compiled(*leaves)
    expected = torch.autograd.grad(eager, leaves, dout)
    actual = torch.autograd.grad(traced, leaves, dout)
    assert torch.equal(eager, traced)
    assert all(torch.equal(e, t) for e, t in zip(expected, actual, strict=True))


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


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [MAP, WINDOWS], ids=["map", "windows"])
def test_only_the_wanted_gradients_are_made(case, backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    full = case.run(torch.float32, backend)[1:]
    for wanted in range(len(full)):
        leaves, dout = case.tensors(torch.float32)
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
        (grad,) = torch.autograd.grad(case.call(leaves, backend), [leaves[wanted]], dout)
        assert_alike(grad, full[wanted])


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [MAP, WINDOWS], ids=["map", "windows"])
def test_an_expanded_gradient_is_like_a_dense_one(case, backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    leaves, _ = case.tensors(torch.float32)
    out = case.call(leaves, backend)
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(e, d) for e, d in zip(expanded, dense, strict=True))


def test_saved_for_backward_is_qkv_and_the_result():
    """Beside them one number a query and head, and what makes the padding."""
    case = WindowCase(heads=4, head_dim=32, rank=3)
    leaves, _ = case.tensors(torch.float32)
    saved = saved_bytes(lambda: case.call(leaves, "auto"), leaves[1:])
    qkv, queries = leaves[0], case.batch * case.height * case.width * case.heads
    tensors = qkv.nbytes + qkv.nbytes // 3
    assert saved.hooks == tensors + saved.living
    assert 0 < saved.living <= 8 * queries


def test_double_backward_is_refused():
    leaves, dout = MAP.tensors(torch.float32)
    out = MAP.call(leaves, "torch")
    (dq,) = torch.autograd.grad(out, leaves[0], dout.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_takes_and_gives_its_dtype(backend):
    case = WindowCase(rank=2)
    leaves, dout = case.tensors(torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours = case.call(leaves, backend)
    assert ours.dtype == torch.bfloat16
    ours = [ours, *torch.autograd.grad(ours, leaves, dout.bfloat16())]
    stock, exact = (partial(case.run, t, "reference") for t in (torch.bfloat16, torch.float64))
    all_within_budget(ours, stock, exact, torch.bfloat16, case.names)


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
        "a map without tokens",
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
