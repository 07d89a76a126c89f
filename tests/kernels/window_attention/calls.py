# SPDX-License-Identifier: Apache-2.0
"""A path's forward and backward below autograd, and the literal attention beside them.

relpos_attention's, with tables of zeros in the literal and none in the paths.
"""

import torch

from ..relpos_attention import calls


class Call(calls.Call):
    """One forward and backward of random tensors of a path of relpos_attention without tables."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.tables = [torch.zeros_like(t) for t in self.tables]

    def run(self, path, dtype=torch.float32, want_pads=True, layout=None):
        return super().run(Without(path), dtype, want_pads, False, layout)

    def literal(self, dtype):
        made = super().literal(dtype)
        return {name: t for name, t in made.items() if "table" not in name}


class Without:
    """A path that is given no tables, and returns no gradients of them."""

    def __init__(self, path):
        self.path = path

    def forward(self, q, k, v, pad_k, pad_v, table_h, table_w, windows, scale):
        return self.path.forward(q, k, v, pad_k, pad_v, None, None, windows, scale)

    def backward(self, dout, q, k, v, pad_k, pad_v, table_h, table_w, *rest):
        made = self.path.backward(dout, q, k, v, pad_k, pad_v, None, None, *rest)
        assert made is None
        return None
