# SPDX-License-Identifier: Apache-2.0
"""Twins of SAM-COBOT's layers, written from their formulas; names of classes and parts are theirs.

Heads come in three kinds: a layer of torch's functions, one of a function of autograd with a
backward of its own, as quaternion libraries have it, and one of that which takes square maps only.
"""

import torch
from torch import nn


def hamilton(r, i, j, k):
    """W of y = x W from its quarters."""
    rows = [r, i, j, k], [-i, r, k, -j], [-j, -k, r, i], [-k, j, -i, r]
    return torch.cat([torch.cat(row, 1) for row in rows], 0)


class Hamilton(torch.autograd.Function):
    """The product with a backward of its own."""

    @staticmethod
    def forward(ctx, x, r, i, j, k):
        ctx.save_for_backward(x, r, i, j, k)
        return torch.matmul(x, hamilton(r, i, j, k))

    @staticmethod
    def backward(ctx, dy):
        x, r, i, j, k = ctx.saved_tensors
        dx = dr = di = dj = dk = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(dy, hamilton(r, i, j, k).t())
        if ctx.needs_input_grad[1]:
            dw = torch.matmul(x.flatten(0, -2).t(), dy.flatten(0, -2))
            a, b, c, d = [row.chunk(4, 1) for row in dw.chunk(4, 0)]
            dr, di = a[0] + b[1] + c[2] + d[3], a[1] - b[0] + c[3] - d[2]
            dj, dk = a[2] - b[3] - c[0] + d[1], a[3] + b[2] - c[1] - d[0]
        return dx, dr, di, dj, dk


class QuaternionLinear(nn.Module):
    """Of torch's functions."""

    def __init__(self, inputs, outputs, bias=False):
        super().__init__()
        self.in_features, self.out_features = inputs // 4, outputs // 4
        for name in "rijk":
            weight = nn.Parameter(torch.rand(self.in_features, self.out_features))
            setattr(self, f"{name}_weight", weight)
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)

    def forward(self, x):
        weight = hamilton(self.r_weight, self.i_weight, self.j_weight, self.k_weight)
        y = torch.matmul(x, weight)
        return y if self.bias is None else y + self.bias


def of_a_function():
    """The class whose product is ``Hamilton``'s."""

    def forward(self, x):
        if x.size()[-1] % 4 != 0:
            raise RuntimeError("four does not divide " + str(x.size()))
        return Hamilton.apply(x, self.r_weight, self.i_weight, self.j_weight, self.k_weight)

    names = {"forward": forward, "__module__": __name__}
    return type("QuaternionLinear", (QuaternionLinear,), names)


WithFunction = of_a_function()


class OnSquares(QuaternionLinear):
    """Takes square maps, sequences and rows only, as SAM-COBOT's own does."""

    def forward(self, x):
        lead = x.shape[:-1]
        if x.dim() == 4:
            batch, _, side, width = x.shape
            x = x.reshape(batch * side * side, width)
        y = Hamilton.apply(x, self.r_weight, self.i_weight, self.j_weight, self.k_weight)
        return y.reshape(*lead, y.shape[-1])


class _LoRA_qkv_relation_add(nn.Module):
    """Packed qkv with related LoRA on q and v."""

    def __init__(
        self, qkv, linear_a_q, linear_b_q, linear_a_v, linear_b_v,
        FacT_c, FacT_d1, FacT_d2, FacT_p, idx,
    ):  # fmt: skip
        super().__init__()
        self.qkv = qkv
        self.linear_a_q, self.linear_b_q = linear_a_q, linear_b_q
        self.linear_a_v, self.linear_b_v = linear_a_v, linear_b_v
        self.dim = self.in_features = qkv.in_features
        self.idx = idx
        self.FacT_c, self.FacT_d1, self.FacT_d2, self.FacT_p = FacT_c, FacT_d1, FacT_d2, FacT_p
        self.w_identity = torch.eye(qkv.in_features)
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x):
        packed = self.qkv(x)
        self.CP = (self.FacT_c @ self.FacT_p)[..., self.idx : self.idx + 2]
        q, v = self.linear_a_q(x), self.linear_a_v(x)
        q = self.FacT_d1(q * self.CP[:, :, 0] + q * self.gamma[:4])
        v = self.FacT_d2(v * self.CP[:, :, 1] + v * self.gamma[-4:])
        packed[..., : self.dim] += self.linear_b_q(q)
        packed[..., -self.dim :] += self.linear_b_v(v)
        return packed


class Adapter(nn.Module):
    """AdaptFormer around an MLP."""

    def __init__(
        self, mlp, d_model=768, bottleneck=16, dropout=0.1, adapter_scalar="1.0",
        adapter_layernorm_option="in",
    ):  # fmt: skip
        super().__init__()
        self.mlp, self.n_embd, self.down_size = mlp, d_model, bottleneck
        self.adapter_layernorm_option = adapter_layernorm_option
        self.adapter_layer_norm_before = nn.LayerNorm(d_model)
        learnt = adapter_scalar == "learnable_scalar"
        self.scale = nn.Parameter(torch.ones(1)) if learnt else float(adapter_scalar)
        self.down_proj = nn.Linear(d_model, bottleneck)
        self.non_linear_func = nn.ReLU()
        self.up_proj = nn.Linear(bottleneck, d_model)
        self.dropout = dropout

    def forward(self, x, add_residual=True, residual=None):
        base = self.mlp(x) if residual is None else residual
        if self.adapter_layernorm_option == "in":
            x = self.adapter_layer_norm_before(x)
        z = self.non_linear_func(self.down_proj(x))
        z = nn.functional.dropout(z, p=self.dropout, training=self.training)
        y = self.up_proj(z) * self.scale
        if self.adapter_layernorm_option == "out":
            y = self.adapter_layer_norm_before(y)
        return y + base if add_residual else y


class Adapter_relation(Adapter):
    """The same with related coefficients and a head."""

    def __init__(self, mlp, FacT_c, FacT_d1, FacT_p, idx, d_model=768, bottleneck=16, **options):
        super().__init__(mlp, d_model, bottleneck, **options)
        self.FacT_c, self.FacT_d1, self.idx, self.FacT_p = FacT_c, FacT_d1, idx, FacT_p
        self.gamma = nn.Parameter(torch.ones(16))

    def forward(self, x, add_residual=True, residual=None):
        base = self.mlp(x) if residual is None else residual
        if self.adapter_layernorm_option == "in":
            x = self.adapter_layer_norm_before(x)
        self.CP = (self.FacT_c @ self.FacT_p)[..., self.idx]
        h = self.down_proj(x)
        z = self.non_linear_func(self.FacT_d1(h.mul(self.CP) + self.gamma * h))
        z = nn.functional.dropout(z, p=self.dropout, training=self.training)
        y = self.up_proj(z) * self.scale
        if self.adapter_layernorm_option == "out":
            y = self.adapter_layer_norm_before(y)
        return y + base if add_residual else y
