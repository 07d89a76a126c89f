# SPDX-License-Identifier: Apache-2.0
"""One linear layer inside the block, with or without an adapter, in both directions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common.middle import no_aux
from samfast.kernels._common.ranges import stage
from samfast.kernels._common.windows import Windows
from samfast.kernels.adapt_former.engine import column_sum
from samfast.kernels.lora_linear import engine
from samfast.kernels.lora_linear.op import path_of
from samfast.kernels.sam_block.plan import LayerPlan


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """rows Wᵀ + b in ``out``, a matrix or columns of one, in the dtype of both."""
    weight = weight.to(rows.dtype).t()
    if bias is None:
        return torch.mm(rows, weight, out=out)
    return torch.addmm(bias.to(rows.dtype), rows, weight, out=out)


class Layer:
    """The tensors and options of one layer; rows are (tokens, in_features).

    needs, grads: which of its tensors want a gradient, and what a backward has made for them
    sums: where gradients wait until the block's backward ends
    path: who runs the rank-r stages   stages: the block's   name: of its ranges
    """

    def __init__(
        self, name: str, plan: LayerPlan, tensors, windows: Windows, backend: str, needs=None,
        sums: engine.Sums | None = None, stages=None,
    ):  # fmt: skip
        self.name, self.plan, self.windows, self.backend = name, plan, windows, backend
        self.stages = stages
        self.weight, self.bias, self.lora_a, self.lora_b, self.seed, *self.params = tensors
        self.needs = [False] * len(tensors) if needs is None else needs
        self.grads: list[Tensor | None] = [None] * len(tensors)
        self.options, self.sums = plan.options(windows), sums

    @property
    def fused_down(self) -> Tensor | None:
        """lora_a, for a stage that makes h with the rows; None where it cannot."""
        return self.lora_a if self.plan.adapted and self.plan.dropout == 0.0 else None

    @property
    def slices(self) -> engine.Slices:
        return engine.Slices(self.plan.starts, self.lora_b, self.plan.own)

    @property
    def pads_vary(self) -> bool:
        return self.plan.pads_vary

    def tensor(self, which: int) -> Tensor | None:
        """One of its tensors by its place among FACTORS."""
        return (self.weight, self.bias, self.lora_a, self.lora_b, self.seed)[which]

    def path(self, rows: Tensor):
        return path_of(self.backend, rows, self.lora_a, self.lora_b, self.plan.starts)

    def room(self, tokens: int, dtype: torch.dtype) -> int:
        """Columns of rows for z behind them, from which ``forward`` makes result and update by one
        product; 0 where it adds the update."""
        if not self.plan.adapted or self.plan.starts:
            return 0
        return self.stages.room(self.lora_a, self.lora_b, tokens, dtype)

    def forward(
        self, rows: Tensor, h: Tensor | None, bias: Tensor | None = None, leave: bool = False,
        room: int = 0,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """The result, the map's aux, and what the backward needs: z, z_pad, what the map saved.

        bias: in place of the layer's own   leave: the update to the caller, who has z
        room: columns of these rows behind x, which hold h and then zeros; see ``room``
        """
        bias = self.bias if bias is None else bias
        with stage("sam_block", self.name):
            if room:
                return self._joint(rows, h, bias, room)
            if self.plan.adapted and not leave:
                y, z, aux, z_pad, saved = engine.forward(
                    self.path(rows), rows, self.weight, bias, self.lora_a, self.lora_b,
                    self.params, self.seed, self.options, h,
                )  # fmt: skip
                return y, aux, [z, z_pad, *saved]
            kept, aux = self._low(rows, h) if self.plan.adapted else ([], no_aux(rows))
            bias = None if bias is None else bias.to(rows.dtype)
            return F.linear(rows, self.weight.to(rows.dtype), bias), aux, kept

    def _joint(self, wide, h, bias, room):
        columns = wide.shape[1] - room
        kept, aux = self._low(wide[:, :columns], h)
        z = kept[0]
        if z is not h:
            wide[:, columns : columns + z.shape[1]].copy_(z)
        weight = self.stages.joint_weight(
            self.weight, self.lora_b, self.plan.scaling, room, wide.dtype
        )
        bias = None if bias is None else bias.to(wide.dtype)
        return F.linear(wide, weight, bias), aux, kept

    def add_(self, y: Tensor, z: Tensor) -> None:
        """y += s · z Bᵀ on the columns that the adapter updates."""
        self.path(y).up_(y, z, self.lora_b, self.plan.scaling, self.slices)

    def keep(self, rows: Tensor, h: Tensor | None) -> list[Tensor]:
        """What the backward needs, without the result."""
        if not self.plan.adapted:
            return []
        with stage("sam_block", self.name):
            return self._low(rows, h)[0]

    def _low(self, rows, h):
        z, aux, z_pad, saved = engine.low(
            self.path(rows), rows, self.lora_a, self.params, self.seed, self.options, h
        )
        return [z, z_pad, *saved], aux

    def along(self, kept: list[Tensor], need_rows: bool) -> tuple | None:
        """What the producer of dy needs to make dz and dB as well, or None."""
        needs = self._needs(need_rows)
        if not self.plan.adapted or self.plan.starts or not any(needs):
            return None
        return kept[0] if needs[1] else None, self.lora_b, self.plan.scaling

    def _needs(self, need_rows: bool) -> tuple[bool, ...]:
        """Whether gradients are wanted of h, of lora_b and of the map's parameters."""
        return (need_rows or self.needs[2], self.needs[3], *self.needs[5:])

    def up(
        self, dy: Tensor, daux, dz_pad, kept: list[Tensor], need_rows: bool, made=None
    ) -> Tensor | None:
        """Everything that follows from dy (tokens, out_features); returns dh if it is needed.

        made: dz and dB, where the producer of dy has made them
        """
        with stage("sam_block", self.name):
            return self._up(dy, daux, dz_pad, kept, need_rows, made)

    def _up(self, dy, daux, dz_pad, kept, need_rows, made):
        if self.needs[1]:
            self.grads[1] = column_sum(dy, self.bias)
        if not self.plan.adapted:
            return None
        z, _, *saved = kept
        dh, self.grads[3], self.grads[5:] = engine.up(
            self.path(dy), dy, daux, dz_pad, self.lora_b, z, saved, self.params, self.options,
            self._needs(need_rows), made,
            sums=None if self.pads_vary else self.sums,  # padding adds to dB before the end
        )  # fmt: skip
        return dh

    def padding(self, kept: list[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The result at rows of zeros: its bias, and the two factors of its update."""
        if not self.pads_vary:
            return self.bias, None, None
        return self.bias, kept[1], self.plan.scaling * self.lora_b

    def padding_needs(self, need_rows: bool) -> list[bool]:
        """Which of ``padding`` want a gradient."""
        need_bias, need_a, need_b, _, *need_params = self.needs[1:]
        varies = self.pads_vary
        return [need_bias, varies and (need_rows or need_a or any(need_params)), varies and need_b]

    def add_padding_grads(self, dbias: Tensor | None, dfactors: Tensor | None) -> None:
        """Add what the padding gives to the gradients of bias and lora_b."""
        if dbias is not None:
            self.grads[1] += dbias
        if dfactors is not None:
            self.grads[3] += self.plan.scaling * dfactors

    def through(
        self, dy: Tensor, dh: Tensor | None, need_rows: bool, source, beside=None
    ) -> Tensor | None:
        """The gradient before ``source``, which made this layer's rows; and of weight and lora_a.

        A source has rows(), which makes them again; backward(drows, low, want), as in the stages;
        and needs_all: whether drows must already hold the adapter's part.
        beside: given the rows, adds to drows the part of whatever else reads them
        """
        with stage("sam_block", self.name):
            drows = torch.mm(dy, self.weight.to(dy.dtype)) if need_rows else None
        if beside is not None:
            beside(drows, source.rows())
        need_a = self.needs[2] and dh is not None
        if need_rows and self.plan.dropout == 0.0 and not source.needs_all:
            low = None if dh is None else (dh, self.lora_a, need_a)
            before, rows, self.grads[2] = source.backward(drows, low, self.needs[0])
            if need_a and self.grads[2] is None:
                with stage("sam_block", self.name):
                    path, lora_a = self.path(dy), self.lora_a
                    self.grads[2] = path.down_backward_(
                        None, dh, rows, lora_a, 0.0, None, self.sums
                    )
        else:
            rows = source.rows() if need_a or self.needs[0] else None
            if dh is not None:
                with stage("sam_block", self.name):
                    self.grads[2] = self.path(dy).down_backward_(
                        drows, dh, rows if need_a else None, self.lora_a, self.plan.dropout,
                        self.seed, self.sums,
                    )  # fmt: skip
            before = None if drows is None else source.backward(drows, None, False)[0]
        if self.needs[0]:
            with stage("sam_block", self.name):
                self.grads[0] = torch.mm(dy.t(), rows).to(self.weight.dtype)
        return before


class Given:
    """Rows that are there."""

    needs_all = True  # one pass adds to their gradient and makes lora_a's

    def __init__(self, rows: Tensor):
        self.given = rows

    def rows(self) -> Tensor:
        return self.given

    def backward(self, drows, low, want):
        return drows, None, None


class Normed:
    """LayerNorm of x, to be made again, once; its gradient is added to ``residual``.

    name: of its ranges   sums: where lora_a's gradient may wait
    """

    def __init__(self, name, stages, x, weight, bias, eps, dtype, residual, needs, sums=None):
        self.name, self.stages, self.dtype = name, stages, dtype
        self.x, self.residual, self.sums = x, residual, sums
        self.affine, self.needs = (weight, bias, eps), needs
        self.grads: list[Tensor | None] = [None, None]
        self.made: Tensor | None = None

    @property
    def needs_all(self) -> bool:
        """Whether its own parameters want gradients, which all of its gradient makes."""
        return any(self.needs)

    def rows(self) -> Tensor:
        if self.made is None:
            with stage("sam_block", self.name):
                self.made = self.stages.norm(self.x, *self.affine, self.dtype)[0]
        return self.made

    def backward(self, drows, low, want):
        with stage("sam_block", self.name):
            return self._backward(drows, low, want)

    def _backward(self, drows, low, want):
        if self.needs_all:
            self.grads = self.stages.norm_parameters(drows, self.x, *self.affine, self.needs)
        given = drows, self.x, *self.affine, self.residual
        if self.made is None:
            return self.stages.norm_backward(*given, low, want, self.sums)
        low = None if low is None else (*low[:2], False)  # no need of the rows, which are there
        dx, _, _ = self.stages.norm_backward(*given, low, False)
        return dx, self.made, None


class Activated:
    """GELU of u, to be made again.

    back, lacks: of the layer before, as the stages have them
    made: dz and dB of it, where a stage makes them
    """

    needs_all = False

    def __init__(self, stages, u, back, sums, lacks):
        self.stages, self.u, self.back, self.sums, self.lacks = stages, u, back, sums, lacks
        self.made: tuple[Tensor, Tensor | None] | None = None

    def rows(self) -> Tensor:
        with stage("sam_block", "gelu"):
            return self.stages.gelu(self.u, None, self.lacks)[0]

    def backward(self, drows, low, want):
        with stage("sam_block", "gelu"):
            du, g, da, self.made = self.stages.gelu_backward(
                drows, self.u, low, want, self.back, self.sums, self.lacks
            )
        return du, g, da
