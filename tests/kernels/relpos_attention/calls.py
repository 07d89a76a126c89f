# SPDX-License-Identifier: Apache-2.0
"""A path's forward and backward below autograd, and the literal attention beside them."""

from functools import partial

import torch
from budgets import all_within_budget, within_budget
from draws import drawing

from samfast.kernels.relpos_attention import reference, torch_path

NAMES = ("out", "dq", "dk", "dv", "dpad_k", "dpad_v", "dtable_h", "dtable_w")


class Call:
    """One forward and backward of random tensors.

    pads: "rows" that all differ, one "bias" row seen everywhere, or None for zeros
    """

    def __init__(self, windows, heads=2, head_dim=16, pads="rows"):
        draw = drawing(3, device="cpu")
        self.windows, self.scale = windows, 0.8 * head_dim**-0.5
        shape = (windows.batch, windows.image_height, windows.image_width, heads, head_dim)
        self.tokens = {name: draw(*shape) for name in ("q", "k", "v")}
        self.dout = draw(*shape)
        rows = 1 if pads == "bias" else windows.pads
        pad_shape = (windows.batch, windows.pads, heads, head_dim)
        self.pads = [None, None]
        if pads is not None and windows.pads:
            first = windows.batch if pads == "rows" else 1
            self.pads = [draw(first, rows, heads, head_dim).expand(pad_shape) for _ in range(2)]
        self.pad_shape = pad_shape
        sizes = windows.height, windows.width
        self.tables = [draw(2 * size - 1, head_dim, divisor=2.5) for size in sizes]

    def arguments(self, dtype):
        """Up to lse; expanded pads keep their stride of 0."""
        pads = [None if t is None else cast_expanded(t, dtype) for t in self.pads]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tables = [t.to(wide) for t in self.tables]
        return [*(t.to(dtype) for t in self.tokens.values()), *pads, *tables]

    def run(self, path, dtype=torch.float32, want_pads=True, need_tables=True, layout=None):
        """NAMES' tensors (None for those not wanted) and lse; layout makes views of what is
        given and of what is filled."""
        layout = layout or (lambda t: t)
        *tensors, table_h, table_w = self.arguments(dtype)
        inputs = [None if t is None else layout(t) for t in tensors] + [table_h, table_w]
        out, lse = path.forward(*inputs, self.windows, self.scale)
        assert out.is_contiguous() and out.dtype == dtype
        grads = [layout(torch.full_like(tensors[0], torch.nan)) for _ in range(3)]
        want_pads = want_pads and self.windows.pads > 0
        dpads = [torch.full(self.pad_shape, torch.nan, dtype=dtype) for _ in range(2)]
        dpads = [layout(t) if want_pads else None for t in dpads]
        tables = path.backward(
            layout(self.dout.to(dtype)), *inputs, out, lse, self.windows, self.scale, *grads,
            *dpads, need_tables,
        )  # fmt: skip
        return [out, *grads, *dpads, *(tables or (None, None))], lse

    def literal(self, dtype):
        """NAMES' tensors by name, every logit in memory, gradients by autograd."""
        q, k, v, *pads, table_h, table_w = self.arguments(dtype)
        pads = [q.new_zeros(self.pad_shape) if t is None else t.clone() for t in pads]
        leaves = [t.clone().requires_grad_() for t in (q, k, v, *pads, table_h, table_w)]
        q, k, v, pad_k, pad_v, table_h, table_w = leaves
        parts = [self.cut(q), self.cut(k, pad_k), self.cut(v, pad_v)]
        out = reference.relpos_attention(*parts, table_h, table_w, self.scale)
        out = self.windows.paste(out.movedim(1, 3).flatten(3))[0].view(q.shape)
        grads = torch.autograd.grad(out, leaves, self.dout.to(dtype), materialize_grads=True)
        made = dict(zip(NAMES, [out.detach(), *grads], strict=True))
        return {name: t for name, t in made.items() if self.windows.pads or "pad" not in name}

    def cut(self, t, pad=None):
        rows = self.windows.batch * self.windows.pads
        pad = None if pad is None or rows == 0 else pad.reshape(rows, -1)
        parts = self.windows.cut(t.reshape(self.windows.tokens, -1), pad)
        return parts.unflatten(3, t.shape[3:]).movedim(3, 1)

    def check(self, path, dtype=torch.float32):
        """All that ``path`` gives within the budget."""
        ours, lse = self.run(path, dtype)
        ours = {name: t for name, t in zip(NAMES, ours, strict=True) if t is not None}
        stock, exact = (partial(self.literal, t) for t in (dtype, torch.float64))
        assert list(ours) == list(all_within_budget(ours, stock, exact, dtype).exact)
        assert lse.dtype == torch.float32
        heads = self.tokens["q"].shape[3]
        assert lse.shape == (self.windows.batch, heads, lse[0, 0].numel())
        stock, exact = ((lambda t=t: self.run(torch_path, t)[1]) for t in (dtype, torch.float64))
        within_budget(lse, stock, exact, dtype, "lse")


def cast_expanded(t, dtype):
    rows = t[tuple(slice(1) if stride == 0 else slice(None) for stride in t.stride())]
    return rows.to(dtype).expand(t.shape)
