# SPDX-License-Identifier: Apache-2.0
"""Bad input ends in one sentence with the values in it."""

import pytest
import torch
from draws import DEVICE

from samfast.functional import rope
from samfast.kernels._common.windows import Windows
from samfast.kernels.rope import engine
from samfast.kernels.rope.op import supports

from .cases import runnable


def call(**changes):
    arguments = dict(qkv=torch.zeros(1, 4, 6, 48), heads=2, window=(2, 3))
    arguments |= dict(cos=torch.zeros(6, 4), sin=torch.zeros(6, 4))
    return rope(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"heads": 0}, "heads is 0; it must be a whole number of at least 1"),
        ({"heads": True}, "heads is True; it must be"),
        ({"heads": 5}, r"qkv has shape \(1, 4, 6, 48\), but 5 heads need .* a multiple of 10"),
        ({"qkv": torch.zeros(4, 6, 48)}, r"qkv has shape \(4, 6, 48\), but 2 heads need"),
        ({"qkv": torch.zeros(1, 0, 6, 48)}, "no side of 0"),
        ({"qkv": torch.zeros(1, 4, 6, 48).int()}, "qkv is torch.int32, but must be float16"),
        ({"window": 0}, "window is 0; it must be None, a side or"),
        ({"window": (2, 3, 1)}, r"window is \(2, 3, 1\); it must be"),
        ({"window": None}, r"cos has shape \(6, 4\), but windows of 4×6 .* need \(24, 4\)"),
        ({"pairs": "both"}, "pairs is 'both'; it must be one of interleaved, halves"),
        ({"parts": 4}, r"parts is 4; it must be 1 \(q\), 2 \(q and k\) or 3"),
        ({"parts": True}, "parts is True; it must be 1"),
        ({"parts": 2.0}, "parts is 2.0; it must be 1"),
        ({"cos": torch.zeros(6, 8)}, r"cos has shape \(6, 8\).* tables_of takes tables with each"),
        ({"sin": torch.zeros(4, 4)}, r"sin has shape \(4, 4\), but .* need \(6, 4\)$"),
        ({"sin": torch.zeros(6, 4).half()}, r"sin is torch.float16, .* pass sin.to\(torch.float32"),
        ({"cos": torch.zeros(6, 4).double()}, "torch.float32 is rotated with torch.float32"),
        ({"cos": torch.zeros(6, 4, device="meta")}, "cos is on meta but what it rotates is on cpu"),
        ({"cos": torch.zeros(6, 4, requires_grad=True)}, "cos requires a gradient, but rope has"),
        ({"sin": torch.zeros(6, 4, requires_grad=True)}, r"pass sin.detach\(\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sentences(changes, sentence, backend):
    with pytest.raises(ValueError, match=sentence):
        call(**changes, backend=backend)


@pytest.mark.parametrize(
    ("t", "sentence"),
    [
        (torch.zeros(1, 4, 6, 2, 8), r"t has shape \(1, 4, 6, 2, 8\), but 1 images of 4×6 tokens"),
        (torch.zeros(1, 4, 5, 2, 2, 8), r"need \(1, 4, 6, n, heads, head_dim\)"),
        (torch.zeros(1, 4, 6, 2, 2, 7), "an even head_dim"),
        (torch.zeros(1, 4, 6, 2, 2, 16)[..., ::2], "t has stride 2 in its last dimension"),
        (torch.zeros(1, 4, 1, 2, 2, 8).expand(-1, -1, 6, -1, -1, -1), "several elements in one"),
        (torch.zeros(1, 4, 6, 2, 2, 6), r"head_dim 6 need \(6, 3\)"),
    ],
)
def test_in_place(t, sentence):
    tables = torch.zeros(6, 4), torch.zeros(6, 4)
    with pytest.raises(ValueError, match=sentence):
        engine.rotate_("auto", t, *tables, Windows(1, 4, 6, 2, 3), False, False)


def test_a_named_backend_that_cannot_run_raises_its_sentence():
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run rope: x is torch\.float64, but"):
        call(qkv=torch.zeros(1, 4, 6, 48).double(), cos=torch.zeros(6, 4).double(),
             sin=torch.zeros(6, 4).double(), backend="cpu")  # fmt: skip
    t, tables = torch.zeros(1, 4, 6, 2, 2, 8), (torch.zeros(6, 4), torch.zeros(6, 4))
    with pytest.raises(RuntimeError, match="'reference' is plain autograd; call rope for it"):
        engine.rotate_("reference", t, *tables, Windows(1, 4, 6, 2, 3), False, False)
    assert supports("cuda", t) == "it has no CUDA source; triton runs it on a GPU"
    assert supports("torch", t.double()) is None


@pytest.mark.skipif(runnable("cpu") is not None, reason=str(runnable("cpu")))
def test_the_native_operator_checks_too():
    native, x = torch.ops.samfast_native.rope_rotate, torch.zeros(1, 4, 6, 2, 2, 8)
    cos = torch.zeros(6, 4)
    windows = [1, 4, 6, 2, 3]
    for given, sentence in (
        ((x, cos[:5], cos, windows, False, False, x), "cos must have 6 rows of 4 pairs"),
        ((x, cos, cos.double(), windows, False, False, x), "sin must be float32"),
        ((x, cos, cos, [1, 4, 5, 2, 3], False, False, x), "size 6 in dimension 2, not 5"),
        ((x, cos, cos, windows, False, False, x.half()), "out has another element type than x"),
        ((x, cos, cos, windows, False, False, x[:, :, :, :1]), "out has size 1 in dimension 3"),
        ((x, cos, cos, windows, False, False, x.mT), "out has size"),
        ((x, cos, cos, [1, 4, 6, 0, 3], False, False, x), "a window is empty"),
        ((x[..., :7], cos, cos, windows, False, False, x), "head_dim 7 is odd"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            native(*given)


@pytest.mark.skipif(runnable("triton") is not None, reason=str(runnable("triton")))
def test_limits_of_the_kernel():
    def t(*shape):
        return torch.empty(1, device=DEVICE).expand(*shape)

    assert supports("triton", t(1, 4, 6, 2, 2, 1024)) is None
    assert "head_dim 1026 is above 1024" in supports("triton", t(1, 4, 6, 2, 2, 1026))
    # 16 heads of 64 in q and k are one program a token
    assert supports("triton", t(1, 2**15, 2**16 - 1, 2, 16, 64)) is None
    assert "2147483648 programs are more" in supports("triton", t(1, 2**15, 2**16, 2, 16, 64))
