# SPDX-License-Identifier: Apache-2.0
"""Twins of SAMed's, Sam_LoRA's, SAM-COBOT's and micro-sam's wrappers, written from their formulas.

Names of classes and of children are theirs, for that is what samfast looks for.
"""

import torch
from torch import nn


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class _LoRA_qkv(nn.Module):
    """SAMed and Sam_LoRA: q and v are written in place, on maps only."""

    def __init__(self, qkv, linear_a_q, linear_b_q, linear_a_v, linear_b_v):
        super().__init__()
        self.qkv = qkv
        self.linear_a_q, self.linear_b_q = linear_a_q, linear_b_q
        self.linear_a_v, self.linear_b_v = linear_a_v, linear_b_v
        self.dim = qkv.in_features
        self.w_identity = torch.eye(qkv.in_features)

    def forward(self, x):
        packed = self.qkv(x)
        q, v = self.linear_b_q(self.linear_a_q(x)), self.linear_b_v(self.linear_a_v(x))
        packed[:, :, :, : self.dim] += q
        packed[:, :, :, -self.dim :] += v
        return packed


def of_any_rank():
    """SAM-COBOT's baseline: the same name, and x of any number of dimensions."""

    def forward(self, x):
        packed = self.qkv(x)
        packed[..., : self.dim] += self.linear_b_q(self.linear_a_q(x))
        packed[..., -self.dim :] += self.linear_b_v(self.linear_a_v(x))
        return packed

    names = {"forward": forward, "__module__": __name__}
    return type("_LoRA_qkv", (_LoRA_qkv,), names)


CobotBaseline = of_any_rank()


class LoRA_Sam(nn.Module):
    """What holds the wrappers of an encoder's blocks, and writes and reads their file."""

    def __init__(self, sam, r, wrapper=_LoRA_qkv):
        super().__init__()
        self.w_As, self.w_Bs = [], []
        for parameter in sam.image_encoder.parameters():
            parameter.requires_grad = False
        for block in sam.image_encoder.blocks:
            qkv = block.attn.qkv
            downs = [linear(qkv.in_features, r) for _ in "qv"]
            ups = [linear(r, qkv.in_features) for _ in "qv"]
            self.w_As += downs
            self.w_Bs += ups
            block.attn.qkv = wrapper(qkv, downs[0], ups[0], downs[1], ups[1])
        for up in self.w_Bs:
            nn.init.zeros_(up.weight)
        self.sam = sam

    def numbered(self):
        found = {f"w_a_{i:03d}": layer.weight for i, layer in enumerate(self.w_As)}
        return found | {f"w_b_{i:03d}": layer.weight for i, layer in enumerate(self.w_Bs)}

    def save_lora_parameters(self, file):
        """SAMed's: with prompt encoder and mask decoder."""
        parts = ("prompt_encoder", "mask_decoder")
        state = {k: v for k, v in self.sam.state_dict().items() if k.startswith(parts)}
        torch.save(self.numbered() | state, file)

    def load_lora_parameters(self, file):
        state = torch.load(file)
        for letter, layers in (("a", self.w_As), ("b", self.w_Bs)):
            for i, layer in enumerate(layers):
                layer.weight = nn.Parameter(state[f"w_{letter}_{i:03d}"])
        rest = {k: v for k, v in state.items() if not k.startswith("w_")}
        self.sam.load_state_dict(rest, strict=False)


class AttentionLoRA(nn.Module):
    """micro-sam: any of q, k and v, times alpha, out of place."""

    def __init__(self, rank, block, update_matrices=("q", "v")):
        super().__init__()
        self.qkv_proj = block
        self.dim = block.in_features
        self.alpha = 1
        self.rank = rank
        for third in ("q", "v", "k"):
            if third in update_matrices:
                setattr(self, f"w_a_linear_{third}", linear(self.dim, rank))
                setattr(self, f"w_b_linear_{third}", linear(rank, self.dim))

    def forward(self, x):
        packed, dim = self.qkv_proj(x), self.dim
        q = k = v = 0
        if hasattr(self, "w_a_linear_q"):
            q = self.alpha * self.w_b_linear_q(self.w_a_linear_q(x))
        if hasattr(self, "w_a_linear_k"):
            k = self.alpha * self.w_b_linear_k(self.w_a_linear_k(x))
        if hasattr(self, "w_a_linear_v"):
            v = self.alpha * self.w_b_linear_v(self.w_a_linear_v(x))
        thirds = packed[:, :, :, :dim], packed[:, :, :, dim:-dim], packed[:, :, :, -dim:]
        return torch.cat([thirds[0] + q, thirds[1] + k, thirds[2] + v], dim=-1)


class MLPLoRA(nn.Module):
    """micro-sam: both layers of an MLP, whose activation it registers a second time."""

    def __init__(self, rank, mlp_layer):
        super().__init__()
        first, second = mlp_layer.lin1, mlp_layer.lin2
        self.mlp_layer = mlp_layer
        self.rank = rank
        self.w_a_linear_1 = linear(first.in_features, rank)
        self.w_b_linear_1 = linear(rank, first.out_features)
        self.w_a_linear_2 = linear(second.in_features, rank)
        self.w_b_linear_2 = linear(rank, second.out_features)
        self.activation = mlp_layer.act

    def forward(self, x):
        h = self.mlp_layer.lin1(x) + self.w_b_linear_1(self.w_a_linear_1(x))
        h = self.activation(h)
        return self.mlp_layer.lin2(h) + self.w_b_linear_2(self.w_a_linear_2(h))


class AdaptFormer(nn.Module):
    """micro-sam: the branch, the MLP and their input together."""

    def __init__(self, rank, block, alpha="learnable_scalar", dropout=None, projection_size=64):
        super().__init__()
        self.mlp_proj = block.mlp
        self.n_embd = block.mlp.lin1.in_features
        self.alpha = nn.Parameter(torch.ones(1)) if alpha == "learnable_scalar" else alpha
        self.projection_size, self.dropout = projection_size, dropout
        self.down_proj = nn.Linear(self.n_embd, projection_size)
        self.non_linear_func = nn.ReLU()
        self.up_proj = nn.Linear(projection_size, self.n_embd)
        block.mlp = self
        if dropout is not None:
            self.dropout_layer = nn.Dropout(dropout)

    def forward(self, x):
        base = self.mlp_proj(x)
        z = self.non_linear_func(self.down_proj(x))
        if self.dropout is not None:
            z = self.dropout_layer(z)
        z = self.up_proj(z) * self.alpha
        return z + x + base


class LoRASurgery(nn.Module):
    """micro-sam: the wrappers of one block, which it registers too."""

    def __init__(self, rank, block, update_matrices=("q", "v")):
        super().__init__()
        self.block = block
        block.attn.qkv = AttentionLoRA(rank, block.attn.qkv, update_matrices)
        if "mlp" in update_matrices:
            block.mlp = MLPLoRA(rank, block.mlp)


class PEFT_Sam(nn.Module):
    """micro-sam: what makes the wrappers; ``sam`` is what it trains and saves."""

    def __init__(self, model, rank=None, peft_module=LoRASurgery, **options):
        super().__init__()
        for parameter in model.image_encoder.parameters():
            parameter.requires_grad = False
        blocks = [peft_module(rank, block, **options) for block in model.image_encoder.blocks]
        self.peft_blocks = nn.ModuleList(blocks)
        self.sam = model
