# SPDX-License-Identifier: Apache-2.0
"""Attention with relative positions beside other ways to compute it, and without the bias."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import attention
from benchmarks.registry import Provider, Workload, forward_backward
from benchmarks.shapes import ENCODERS
from samfast.functional import window_relpos_attention
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import costs


def relpos_attention_workloads(
    model, batch, rank, device, dtype, compiled=False
) -> Iterator[Workload]:
    """The attention of a global block, of a windowed one, and that of windows already cut."""
    windows = Windows(batch, 64, 64, 14, 14)
    for layout in (Windows.whole(batch, 64, 64), windows, Windows.whole(windows.samples, 14, 14)):
        yield relpos_attention_workload(ENCODERS[model], layout, device, dtype, compiled)


def relpos_attention_workload(encoder, windows, device, dtype, compiled=False) -> Workload:
    """Others cut a padded map into windows first, and paste what they get."""
    generator = torch.Generator().manual_seed(0)
    heads, head_dim = encoder.heads, encoder.width // encoder.heads
    size = windows.height, windows.width
    tokens, scale = windows.height * windows.width, head_dim**-0.5
    image = windows.batch, windows.image_height, windows.image_width

    def draw(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    qkv = draw(*image, 3 * encoder.width).requires_grad_()
    tables = [draw(2 * n - 1, head_dim, scale=0.3).requires_grad_() for n in size]
    bias = draw(3 * encoder.width)  # pads' row of qkv, of a layer that is not trained
    dy = draw(*image, encoder.width)
    leaves = [qkv, *tables]

    def attending(attend):
        """attend: q, k, v (windows · heads, tokens, head_dim) -> as q"""
        parts = qkv
        if windows.pads:
            parts = windows.cut(qkv, bias.expand(windows.batch * windows.pads, -1))
        parts = parts.view(-1, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        out = attend(*parts.reshape(3, -1, tokens, head_dim))
        out = out.unflatten(0, (-1, heads)).transpose(1, 2).reshape(-1, *size, encoder.width)
        return windows.paste(out)[0].view(dy.shape) if windows.pads else out

    def other(attend):
        return lambda: attending(
            lambda q, k, v: attend(q, k, v, *attention.factors(q, *tables, size), scale)
        )

    def plain(kernels):
        def call():
            q, k, v = qkv.unflatten(3, (3, heads, head_dim)).flatten(1, 2).permute(2, 0, 3, 1, 4)
            with attention.only(kernels):
                out = F.scaled_dot_product_attention(q, k, v)
            return out.transpose(1, 2).reshape(dy.shape)

        return Provider(call, [qkv], checked=False)

    def ours(backend, qkv=qkv, tables=tables, bias=bias):
        return lambda: window_relpos_attention(
            qkv, heads, size, *tables, pad_bias=bias if windows.pads else None, backend=backend
        )

    def exact():
        wide = [t.detach().double().requires_grad_() for t in leaves]
        call = ours("torch", wide[0], wide[1:], bias.double())
        return forward_backward(Provider(call, wide), dy.double())

    design = costs.stages if device == "cuda" else costs.cpu_stages
    layout = windows, heads, head_dim, dtype.itemsize
    providers = {
        "eager": Provider(other(attention.eager), leaves),
        "SDPA + mask": Provider(other(attention.masked), leaves),
        "augmented SDPA": Provider(other(attention.augmented), leaves),
        "samfast": Provider(ours("auto"), leaves, design(*layout)),
        "samfast torch": Provider(ours("torch"), leaves),
    }
    if not windows.pads:
        for name, kernels in attention.without_bias(device).items():
            providers[name] = plain(kernels)
    if device == "cuda":
        providers["FlexAttention"] = Provider(other(attention.flex), leaves)
    if compiled:
        for name in ("eager", "SDPA + mask"):
            call = torch.compile(providers[name].forward)
            providers[f"{name} compiled"] = Provider(call, leaves)
    place = f", windows of {windows.height}" if windows.pads else ""
    return Workload(
        f"attention {'x'.join(map(str, image))}{place}, {heads} heads of {head_dim}",
        ("out", "dqkv", "dtable_h", "dtable_w"),
        "eager",
        ("eager",),
        providers,
        exact,
        dy,
        [*leaves, bias],
        logits=costs.logits_bytes(*layout[:2], dtype.itemsize),
    )
