# SPDX-License-Identifier: Apache-2.0
"""A SAM-like transformer block as one operator, for the classes of any library."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from samfast.adapters.block_layer import block_layer, layer_problem
from samfast.adapters.foreign import ForeignModule
from samfast.adapters.stand_in import altered, kind_of, leaving_alone, runs_as
from samfast.backends import requested, resolve
from samfast.fused.attention import FusedAttention
from samfast.fused.families import family_of
from samfast.fused.parts import Family
from samfast.fused.proof import objection, stock_code_watch
from samfast.fused.remembered import Remembered
from samfast.kernels._common.autocast import autocast_dtype, autocast_input
from samfast.kernels._common.windows import Windows
from samfast.kernels.rope.engine import supports as rope_supports
from samfast.kernels.sam_block.op import SamBlock as Operator
from samfast.kernels.sam_block.op import sam_block, stages_backend
from samfast.kernels.sam_block.plan import LAYERS, Plan, check_memory
from samfast.kernels.window_attention.op import supports as plain_supports

__all__ = ["BlockInParts", "FusedBlock", "WholeBlock", "check_memory"]


class FusedBlock(ForeignModule):
    """Mixin of a block that runs as one operator if nothing prevents it.

    x: (B, H, W, D) -> (B, H, W, D), token by token, whatever the layout of x

    memory: what the node saves for its backward, in elements per token. "fast": 10 · D, and only
        norms and GELU are recomputed; "balanced": 3 · D, qkv and lin1 are recomputed too;
        "minimal": D, the whole block is recomputed. Gradients are the same.
    """

    memory: str = "fast"
    _family: ClassVar[Family]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._family = family_of(cls)  # type: ignore[assignment]  # None for the mixins below

    def block_problem(self) -> str | None:
        """Say why the block does not run as one node; None if it does.

        If its class is not what its name says, its own forward runs.
        """
        if (reason := objection(self)) is not None:
            return reason
        if requested("auto") == "reference":
            return "the reference backend runs its submodules one by one"
        if (reason := self._attention_problem()) is not None:
            return reason
        parts = self._family.parts
        for name, norm in parts.norms(self).items():
            if (reason := _norm_problem(name, norm)) is not None:
                return reason
        mlp = parts.mlp(self)
        if type(mlp) is not self._family.mlp and not hasattr(mlp, "block_side"):
            return f"mlp is {kind_of(mlp)}"
        inside = getattr(mlp, "mlp_inside", None)  # of an adapter around an MLP
        if inside is not None and type(inside) is not self._family.mlp:
            return f"mlp has {kind_of(inside)} inside"
        act = parts.activation(self)
        if altered(mlp) or altered(act):
            return "mlp or its activation has hooks or a forward of its own"
        if (reason := parts.activation_problem(act)) is not None:
            return reason
        if hasattr(mlp, "side_problem") and (reason := mlp.side_problem()) is not None:
            return reason
        problems = (layer_problem(name, layer) for name, layer in parts.linears(self).items())
        return next((p for p in problems if p is not None), parts.option_problem(self))

    def _attention_problem(self) -> str | None:
        """Say what keeps the attention out of the node."""
        raise NotImplementedError

    def _attention_backend(self) -> str:
        """Backend of only the attention; "" for the block's."""
        return ""

    def _fits(self, x: Tensor) -> bool:
        """True if the norm accepts x; for other x the submodules raise the error."""
        parts = self._family.parts
        width = next(iter(parts.norms(self).values())).normalized_shape
        if x.dim() != 4 or x.shape[3:] != width or 0 in x.shape[1:3]:
            return False
        side = parts.window(self)
        if not parts.fits_positions(self, (side, side) if side else (x.shape[1], x.shape[2])):
            return False
        autocast = autocast_dtype(x.device.type) is not None
        qkv = next(iter(parts.linears(self).values()))
        return x.is_floating_point() and (autocast or x.dtype == qkv.weight.dtype)

    def _fused(self, x: Tensor, remembered: Remembered | None = None) -> Tensor:
        """Run the node. remembered: stores what this finds out"""
        parts = self._family.parts
        attn, side = parts.attention(self), parts.window(self)
        mlp = parts.mlp(self)
        first, second = parts.norms(self).values()
        batch, height, width = x.shape[:3]
        sides = (side, side) if side else (height, width)
        windows = Windows(batch, height, width, *sides)
        whole = Windows.whole(batch, height, width)
        like = autocast_input(x[:0])
        *into, proj, lin1, lin2 = parts.linears(self).values()
        layers = [block_layer(layer, like, windows) for layer in into]
        layers += [block_layer(layer, like, whole) for layer in (proj, lin1, lin2)]
        beside = mlp.block_side(like) if hasattr(mlp, "block_side") else None
        plan = Plan(
            heads=parts.heads(attn),
            window=side,
            scale=float(parts.scale(attn)),
            eps=(float(first.eps), float(second.eps)),
            dtype="" if like.dtype == x.dtype else str(like.dtype).removeprefix("torch."),
            memory=self.memory,
            attention=self._attention_backend(),
            layers=tuple(layer.plan for layer in layers),
            side=None if beside is None else beside.plan,
            kind=parts.KIND,
            halves=parts.HALVES,
            apart=len(into) > 1,
            drops=(chance := parts.drop_chance(self)) > 0.0,
        )
        head = [first.weight, first.bias, second.weight, second.bias]
        tables = parts.tables(self, sides)
        tensors: list[Tensor | None] = [
            *head,
            *tables,
            *(t for layer in layers for t in layer.tensors),
        ]
        tensors += [] if beside is None else beside.tensors
        tensors += _factors(len(x), chance, like) if chance > 0.0 else []
        if remembered is not None:
            code = stock_code_watch(self)
            remembered.keep(self, x, code, plan, tensors, parts.linears(self))
        y, aux = sam_block(x, tensors, plan)
        for layer, value in zip(layers, aux, strict=True):
            if layer.keep is not None:
                y = layer.keep(value, y)
        return y

    def _as_before(self, x: Tensor, remembered: Remembered) -> Tensor | None:
        """Run the node as the last time; return None if it may differ now."""
        if (known := remembered.latest(self, x)) is None:
            return None
        answers, tensors = known
        windows: dict[str, Windows] = {}
        like = x
        if answers.asked:
            like, side = autocast_input(x[:0]), self._family.parts.window(self)
            batch, height, width = x.shape[:3]
            whole = Windows.whole(batch, height, width)
            windows = dict.fromkeys(LAYERS, whole)
            if side:
                windows[LAYERS[0]] = Windows(batch, height, width, side, side)
        if (found := answers.shares(tensors, like, windows)) is None:
            return None
        y, aux = Operator.call(x, tensors, answers.key, answers.numbers, answers.backend)
        for name, share in found.items():
            if share.keep is not None:
                y = share.keep(aux[LAYERS.index(name)], y)
        return y

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        if self.block_problem() is not None:
            return {}
        norm = next(iter(self._family.parts.norms(self).values()))
        x, asked = autocast_input(norm.weight.detach()[None, :0]), requested("auto")
        try:
            found = {"sam_block": stages_backend(asked, x)}
        except RuntimeError as error:
            return {"sam_block": str(error)}
        return (
            found if self._family.parts.KIND == "relpos" else found | self._of_attention(x, asked)
        )

    def _of_attention(self, x: Tensor, asked: str) -> dict[str, str]:
        """Map the operations of an attention without relative positions to their backends."""
        parts = self._family.parts
        heads, side = parts.heads(parts.attention(self)), parts.window(self) or 1
        q = x.new_empty(0, side, side, heads, _width(self) // heads)
        windows = Windows.whole(0, side, side)
        supported: dict[str, Callable[[str], str | None]] = {
            "window_attention": lambda b: plain_supports(b, q, windows)
        }
        if parts.KIND == "rope":
            supported["rope"] = lambda b: rope_supports(b, q[:, :, :, None])
        found = {}
        for name, supports in supported.items():
            try:
                found[name] = resolve(name, asked, x.device, supports)
            except RuntimeError as error:
                found[name] = str(error)
        return found

    def extra_repr(self) -> str:
        return f"memory={self.memory}"


class WholeBlock(FusedBlock):
    """Mixin of a block that runs as one operator, or else its own forward with its attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run x: (B, H, W, D) -> (B, H, W, D); by the stock forward if it cannot be one node."""
        parts = self._family.parts
        if len(args) != 1 or not parts.IDLE.issuperset(kwargs):
            return super().forward(*args, **kwargs)
        x = args[0]
        if not torch.compiler.is_compiling():
            if parts.recording(parts.attention(self)):
                x._samfast_recorded = True  # a checkpoint's recomputation records nothing
            elif getattr(x, "_samfast_recorded", False):
                return super().forward(x, **kwargs)
        if self.block_problem() is None and self._fits(x):
            return self._fused(x)
        return super().forward(x, **kwargs)

    def _attention_problem(self) -> str | None:
        parts = self._family.parts
        attn = parts.attention(self)
        if type(attn) is not self._family.attention_of(self):
            return f"attn is {kind_of(attn)}"
        if parts.attention_altered(attn):
            return "attn has hooks or a forward of its own"
        return parts.positions_problem(self)


class BlockInParts(FusedBlock):
    """Mixin of a block with segment_anything's code, which can also run in parts.

    ``block_problem`` says what prevents one node. The submodules then run one by one and save their
    own tensors; the attention is fused if possible.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Run x: (B, H, W, D) -> (B, H, W, D); in parts if it cannot be one node."""
        remembered = None
        if not torch.compiler.is_compiling() and self._family.parts.WATCHED:
            remembered = Remembered.of(self)
            if remembered is not None and (y := self._as_before(x, remembered)) is not None:
                return y
        problem = self.block_problem()
        if problem is None and self._fits(x):
            return self._fused(x, remembered)
        if problem is not None and objection(self) is not None:
            return self._stock(x)
        first, second = self._family.parts.norms(self).values()
        x = x + self._attention(first(x))
        return x + self._family.parts.mlp(self)(second(x))

    def _attention_problem(self) -> str | None:
        parts = self._family.parts
        attn = parts.attention(self)
        if (reason := self.window_order()) is not None and (
            parts.window(self) > 0 or not runs_as(attn, FusedAttention) or altered(attn)
        ):
            return reason
        if (reason := parts.positions_problem(self)) is not None:
            return reason
        if attn.backend == "reference":
            return "attn has the reference backend, which is plain autograd"
        return None

    def _attention_backend(self) -> str:
        attn = self._family.parts.attention(self)
        return "" if attn.backend == "auto" else requested(attn.backend)

    def _stock(self, x: Tensor) -> Tensor:
        """Run the stock class bit for bit, with its stock attention."""
        attn = self._family.parts.attention(self)
        if not runs_as(attn, FusedAttention):
            return super().forward(x)
        if not torch.compiler.is_compiling():
            with leaving_alone(attn):
                return super().forward(x)
        attn.left_alone = True
        try:
            return super().forward(x)
        finally:
            attn.left_alone = False

    def _attention(self, x: Tensor) -> Tensor:
        attn = self._family.parts.attention(self)
        side = self._family.parts.window(self)
        if side == 0:
            return attn(x)
        if self.window_order() is None:
            return attn(x, window=side)
        batch, height, width = x.shape[:3]
        windows = Windows(batch, height, width, side, side)
        tokens, _ = windows.paste(attn(windows.cut(x)))
        return tokens.view(x.shape)

    def window_order(self) -> str | None:
        """Say why windows are cut before the attention; None if they run in image order."""
        attn = self._family.parts.attention(self)
        if not runs_as(attn, FusedAttention):
            return f"attn is {kind_of(attn)}"
        if altered(attn):
            return "attn has hooks or a forward of its own"
        return attn.window_order()


def _width(block: FusedBlock) -> int:
    """The number of features that the block's norms take."""
    norm = next(iter(block._family.parts.norms(block).values()))
    return norm.normalized_shape[0]


def _factors(samples: int, chance: float, like: Tensor) -> list[Tensor]:
    """Draw factors per sample for the results of proj and lin2, as timm's DropPath does."""
    kept = 1.0 - chance
    drawn = (like.new_empty(samples, 1, 1, 1).bernoulli_(kept) for _ in range(2))
    return [(d.div_(kept) if kept > 0.0 else d).view(samples) for d in drawn]


def _norm_problem(name: str, norm: nn.Module) -> str | None:
    if type(norm) is not nn.LayerNorm:
        return f"{name} is {kind_of(norm)}"
    if altered(norm):
        return f"{name} has hooks or a forward of its own"
    if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
        return f"{name} is {norm}, not a LayerNorm over the features with weight and bias"
    return None
