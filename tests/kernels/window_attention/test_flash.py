# SPDX-License-Identifier: Apache-2.0
"""When torch's flash attention runs on a GPU, and that its arguments are as torch wants them.

Fake tensors say they are on a GPU; no GPU computes here.
"""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from samfast.kernels._common.windows import Windows
from samfast.kernels.window_attention import flash, torch_path

WHOLE = Windows.whole(2, 4, 6)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def fakes(head_dim=64, dtype=torch.bfloat16, windows=WHOLE, device="cuda"):
    """qkv of a fake GPU, as the block has it."""
    shape = (windows.batch, windows.image_height, windows.image_width, 3, 2, head_dim)
    return torch.empty(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "windows", "device", "takes"),
    [
        (64, torch.bfloat16, WHOLE, "cuda", True),
        (8, torch.float16, WHOLE, "cuda", True),
        (256, torch.float16, WHOLE, "cuda", True),
        (200, torch.float16, WHOLE, "cuda", False),
        (12, torch.float16, WHOLE, "cuda", False),
        (264, torch.float16, WHOLE, "cuda", False),
        (64, torch.float32, WHOLE, "cuda", False),
        (64, torch.bfloat16, Windows(2, 4, 6, 2, 3), "cuda", False),
        (64, torch.bfloat16, Windows(2, 4, 6, 5, 6), "cuda", False),
        (64, torch.bfloat16, WHOLE, "cpu", False),
    ],
)
def test_what_it_takes(hopper, head_dim, dtype, windows, device, takes):
    with FakeTensorMode():
        q = fakes(head_dim, dtype, windows, device).select(3, 0)
        assert flash.takes(q, windows) == takes


@pytest.mark.parametrize(("capability", "takes"), [((7, 5), False), ((8, 0), True)])
def test_which_gpus_have_it(hopper, monkeypatch, capability, takes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode():
        assert flash.takes(fakes().select(3, 0), WHOLE) == takes
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        assert not flash.takes(fakes().select(3, 0), WHOLE)


@pytest.mark.parametrize("batch", [2, 0])
def test_its_arguments_and_results(hopper, batch, monkeypatch):
    """torch takes views of packed qkv as they lie, and None for lists of lengths."""
    windows, copied = WHOLE._replace(batch=batch), []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, source: copied.append(source.shape))
    with FakeTensorMode():
        qkv, dqkv = fakes(windows=windows), fakes(windows=windows)
        out, lse = torch_path.forward(*qkv.unbind(3), None, None, windows, 0.125)
        assert out.shape == (batch, 4, 6, 2, 64) and out.is_contiguous()
        assert lse.shape == (batch, 2, 24) and lse.dtype == torch.float32
        torch_path.backward(
            out, *qkv.unbind(3), None, None, out, lse, windows, 0.125, *dqkv.unbind(3), None, None
        )
    assert copied == [(2, 4, 6, 2, 64)] * 3 if batch else not copied


def test_rows_that_do_not_begin_at_16_bytes_are_copied():
    qkv = torch.zeros(2, 4, 6, 3, 2, 64, dtype=torch.bfloat16)
    for q in qkv.unbind(3):
        assert flash.aligned(q) is q
    odd = torch.zeros(2 * 24 * 128 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 6, 2, 64)
    turned = qkv[:, :, :, 0].transpose(3, 4).contiguous().transpose(3, 4)
    for t in (odd, turned, qkv[..., 1:9][:, :, :, 0], torch.zeros(2, 4, 6, 2, 12)[..., :8]):
        assert flash.aligned(t).is_contiguous() and flash.aligned(t) is not t


class _Aten:
    """torch's operators with the same mathematics, as they are called for a GPU."""

    @staticmethod
    def _scaled_dot_product_flash_attention(q, k, v, *, scale):
        out, lse = flash.cpu_forward(q, k, v, scale)
        return out, lse, None, None, q.shape[2], k.shape[2], None, None, None

    @staticmethod
    def _scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale
    ):  # fmt: skip
        assert (cum_q, cum_k, dropout, causal) == (None, None, 0.0, False)
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        return flash.cpu_backward(dout, q, k, v, out, lse, scale)


def test_what_goes_in_comes_back_in_place(monkeypatch):
    """Heads, tokens and gradients in their places, by the code for a CPU in its stead."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    qkv, dout = draw(2, 4, 6, 3, 2, 16), draw(2, 4, 6, 2, 16)
    results = []
    stand_in = _Aten()
    for forward, backward in (
        (flash.forward, flash.backward),
        (torch_path.forward, torch_path.backward),
    ):
        own, dqkv = forward is flash.forward, torch.full_like(qkv, torch.nan)
        between = () if own else (None, None)
        after = (0.25,) if own else (WHOLE, 0.25)
        cpu = torch.ops.aten
        stand_in._scaled_dot_product_flash_attention_for_cpu = (
            cpu._scaled_dot_product_flash_attention_for_cpu
        )
        stand_in._scaled_dot_product_flash_attention_for_cpu_backward = (
            cpu._scaled_dot_product_flash_attention_for_cpu_backward
        )
        monkeypatch.setattr(flash, "_aten", stand_in)
        out, lse = forward(*qkv.unbind(3), *between, *after)
        backward(dout, *qkv.unbind(3), *between, out, lse, *after, *dqkv.unbind(3), *between)
        results.append([out, lse, dqkv])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
