# SPDX-License-Identifier: Apache-2.0
"""segment_anything's transformer block as one operator."""

import torch
from torch import Tensor, nn

from samfast.adapters.block_layer import block_layer, layer_problem
from samfast.adapters.stand_in import altered, kind_of, leaving_alone, runs_as, standing_in
from samfast.backends import requested
from samfast.fused.proof import Attention, Block, MLPBlock, objection
from samfast.fused.rel_pos_attention import RelPosAttention
from samfast.kernels._common.autocast import autocast_dtype, autocast_input
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention.op import fit_table
from samfast.kernels.sam_block.op import sam_block, stages_backend
from samfast.kernels.sam_block.plan import Plan, check_memory


class SamBlock(Block):
    """Transformer block with window attention, as the stock module, in one autograd node.

    x: (B, H, W, D) -> (B, H, W, D). Parameters, submodules and the state dict are the stock
    module's. ``block_problem`` says what stands against one node; then the submodules run one
    after another, with the attention fused where it can be, and save what they save. The node's
    result lies token by token, whatever the layout of x.

    memory: what the node saves for its backward, in elements per token. "fast": 10 · D, nothing is
        computed again but norms and GELU; "balanced": 3 · D, qkv and lin1 are; "minimal": D, all
        of the block is. The gradients are the same.
    """

    memory = "fast"

    @classmethod
    def from_block(cls, block: Block, memory: str = "fast") -> "SamBlock":
        """A block with the Parameters, submodules and hooks of ``block``."""
        if type(block) is not Block:
            raise TypeError(f"expected segment_anything's Block, got {type(block).__name__}")
        check_memory(memory)
        module = standing_in(cls, block)
        module.memory = memory
        if type(block.attn) is Attention:
            module.attn = RelPosAttention.from_attention(block.attn)
        return module

    def forward(self, x: Tensor) -> Tensor:
        problem = self.block_problem()
        if problem is None and self._fits(x):
            return self._fused(x)
        if problem is not None and objection(self) is not None:
            return self._stock(x)
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def block_problem(self) -> str | None:
        """None when the block runs as one node, or why its submodules run one by one.

        Where that is that its class is not what it is called, its own forward runs.
        """
        if (reason := objection(self)) is not None:
            return reason
        if requested("auto") == "reference":
            return "the reference backend runs its submodules one by one"
        if (reason := self.window_order()) is not None and (
            self.window_size > 0 or not runs_as(self.attn, RelPosAttention) or altered(self.attn)
        ):
            return reason
        if not self.attn.use_rel_pos:
            return "attn has no relative positions"
        if self.attn.backend == "reference":
            return "attn has the reference backend, which is plain autograd"
        for name in ("norm1", "norm2"):
            if (reason := _norm_problem(name, getattr(self, name))) is not None:
                return reason
        if type(self.mlp) is not MLPBlock and not hasattr(self.mlp, "block_side"):
            return f"mlp is {kind_of(self.mlp)}"
        if altered(self.mlp) or altered(self.mlp.act):
            return "mlp or its activation has hooks or a forward of its own"
        if type(self.mlp.act) is not nn.GELU or self.mlp.act.approximate != "none":
            return f"the activation is {self.mlp.act}, not the exact GELU"
        if hasattr(self.mlp, "side_problem") and (reason := self.mlp.side_problem()) is not None:
            return reason
        problems = (layer_problem(name, layer) for name, layer in self._linears())
        return next((p for p in problems if p is not None), None)

    def _fits(self, x: Tensor) -> bool:
        """Whether x is what the norm takes; the submodules say what is wrong with another."""
        if x.dim() != 4 or x.shape[3:] != self.norm1.normalized_shape or 0 in x.shape[1:3]:
            return False
        autocast = autocast_dtype(x.device.type) is not None
        return x.is_floating_point() and (autocast or x.dtype == self.attn.qkv.weight.dtype)

    def _stock(self, x: Tensor) -> Tensor:
        """Bit for bit what the stock class gives, its attention included."""
        if not runs_as(self.attn, RelPosAttention):
            return super().forward(x)
        if not torch.compiler.is_compiling():
            with leaving_alone(self.attn):
                return super().forward(x)
        self.attn.left_alone = True
        try:
            return super().forward(x)
        finally:
            self.attn.left_alone = False

    def _linears(self) -> list[tuple[str, nn.Module]]:
        attn, mlp = self.attn, self.mlp
        return [("qkv", attn.qkv), ("proj", attn.proj), ("lin1", mlp.lin1), ("lin2", mlp.lin2)]

    def _fused(self, x: Tensor) -> Tensor:
        attn = self.attn
        side = self.window_size
        sides = (side, side) if side else x.shape[1:3]
        windows, whole = Windows(*x.shape[:3], *sides), Windows.whole(*x.shape[:3])
        like = autocast_input(x[:0])
        layers = [
            block_layer(layer, like, windows if name == "qkv" else whole)
            for name, layer in self._linears()
        ]
        beside = self.mlp.block_side(like) if hasattr(self.mlp, "block_side") else None
        plan = Plan(
            heads=attn.num_heads,
            window=side,
            scale=float(attn.scale),
            eps=(float(self.norm1.eps), float(self.norm2.eps)),
            dtype="" if like.dtype == x.dtype else str(like.dtype).removeprefix("torch."),
            memory=self.memory,
            attention="" if attn.backend == "auto" else requested(attn.backend),
            layers=tuple(layer.plan for layer in layers),
            side=None if beside is None else beside.plan,
        )
        head = (self.norm1.weight, self.norm1.bias, self.norm2.weight, self.norm2.bias)
        tables = (attn.rel_pos_h, attn.rel_pos_w)
        tables = [fit_table(table, size) for table, size in zip(tables, sides, strict=True)]
        tensors = [*head, *tables, *(t for layer in layers for t in layer.tensors)]
        tensors += [] if beside is None else beside.tensors
        y, aux = sam_block(x, tensors, plan)
        for layer, value in zip(layers, aux, strict=True):
            if layer.keep is not None:
                y = layer.keep(value, y)
        return y

    def _attention(self, x: Tensor) -> Tensor:
        if self.window_size == 0:
            return self.attn(x)
        if self.window_order() is None:
            return self.attn(x, window=self.window_size)
        windows = Windows(*x.shape[:3], self.window_size, self.window_size)
        tokens, _ = windows.paste(self.attn(windows.cut(x)))
        return tokens.view(x.shape)

    def window_order(self) -> str | None:
        """None when windows run in image order, or why they are cut before the attention."""
        if not runs_as(self.attn, RelPosAttention):
            return f"attn is {kind_of(self.attn)}"
        if altered(self.attn):
            return "attn has hooks or a forward of its own"
        return self.attn.window_order()

    def backends(self) -> dict[str, str]:
        """What a forward would choose here and now, for an x as autocast would have it."""
        if self.block_problem() is not None:
            return {}
        x = autocast_input(self.norm1.weight.detach()[None, :0])
        try:
            return {"sam_block": stages_backend(requested("auto"), x)}
        except RuntimeError as error:
            return {"sam_block": str(error)}

    def extra_repr(self) -> str:
        return f"memory={self.memory}"


def _norm_problem(name: str, norm: nn.Module) -> str | None:
    if type(norm) is not nn.LayerNorm:
        return f"{name} is {kind_of(norm)}"
    if altered(norm):
        return f"{name} has hooks or a forward of its own"
    if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
        return f"{name} is {norm}, not a LayerNorm over the features with weight and bias"
    return None
