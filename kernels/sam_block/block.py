# SPDX-License-Identifier: Apache-2.0
"""The block forwards and backwards, by hand.

x1 = x + proj(attention(qkv(norm1(x))))   y = x1 + lin2(gelu(lin1(norm2(x1)))) + side(norm2(x1))

If samples drop branches, each sample has a factor for what is added to x, and to x1.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samfast.kernels._common.ranges import stage
from samfast.kernels._common.windows import Windows
from samfast.kernels.lora_linear.engine import Sums
from samfast.kernels.lora_linear.op import TABLE as PRODUCTS
from samfast.kernels.sam_block.attention import Attention
from samfast.kernels.sam_block.joined import Joined
from samfast.kernels.sam_block.layer import Activated, Given, Layer, Normed
from samfast.kernels.sam_block.plan import DROPS, Plan
from samfast.kernels.sam_block.side import Side

_AFTER = ("proj", "lin1", "lin2")  # layers that see whole images


class Block:
    """One call: its tensors taken apart.

    needs: which of x and the tensors want gradients
    stages: who runs what is element by element   backend: of all that has one of its own
    """

    def __init__(
        self, x: Tensor, tensors: Sequence[Tensor | None], plan: Plan, backend: str, stages,
        needs: Sequence[bool] | None = None,
    ):  # fmt: skip
        self.x, self.plan, self.stages = x, plan, stages
        self.rows = x.reshape(-1, x.shape[3])
        self.windows, whole = plan.windows(x), Windows.whole(*x.shape[:3])
        self.dtype = plan.compute_dtype(x)
        needs = [False] * (1 + len(tensors)) if needs is None else list(needs)
        self.need_x = needs[0]
        self.head, parts = plan.split(tensors)
        self.head_needs, part_needs = plan.split(needs[1:])
        self.attention = Attention(plan, self.windows, self.head[4:], backend)
        backend, self.sums = PRODUCTS.part(backend), Sums()
        *into, self.proj, self.lin1, self.lin2 = (
            Layer(name, layer, parts[name], whole if name in _AFTER else self.windows, backend,
                  part_needs[name], self.sums, stages)
            for name, layer in zip(plan.names, plan.layers, strict=True)
        )  # fmt: skip
        self.qkv = Joined("qkv", into) if plan.apart else into[0]
        self.layers = [self.qkv, self.proj, self.lin1, self.lin2]
        self.drops = parts.get("drops", (None, None))
        self.left: dict[str, Tensor] = {}
        self.side = None
        if plan.side is not None:
            self.side = Side(plan.side, parts["side"], backend, part_needs["side"])

    def forward(
        self, memory: str | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[list[Tensor]]]:
        """y, aux of the layers, and what is kept: of the block, and of each layer and the side.

        memory: "fast" keeps [out, lse, x1, qkv, u], u as lin1 leaves it. "balanced" keeps neither
            the last two nor what their layers keep. "minimal" and None keep nothing.
        """
        self._leave(self.proj, self.lin2)
        x1, u, lacks, aux, kept, of_layers, z = self._up_to_gelu(memory)
        with stage("sam_block", "gelu"):
            g, h = self.stages.gelu(u, self.lin2.fused_down, lacks)
        del u, lacks
        bias = None if self.side is None else self.side.bias(self.lin2.bias, g.dtype)
        update, aux_lin2, kept_lin2 = self.lin2.forward(g, h, bias, "lin2" in self.left)
        del g, h
        if self.side is not None:
            self.side.add_(update, *z)
        self._drop_(update, 1)
        with stage("sam_block", "add"):
            y = self.stages.add(x1, update, self._up(self.lin2, kept_lin2)).view(self.x.shape)
        some = memory in ("fast", "balanced")
        return (
            y,
            [*_each(aux[0]), *aux[1:], aux_lin2],
            kept,
            [*of_layers, *([kept_lin2, z] if some else [[], []])],
        )

    def _up_to_gelu(self, memory: str | None):
        """x1, u and what it lacks, aux of three layers, and what is kept: of the block, of these
        layers, and [z] of the side, where there is one."""
        stages, some, every = self.stages, memory in ("fast", "balanced"), memory == "fast"
        qkv, aux_qkv, kept_qkv = self._project()
        late = [qkv] if every else []
        out, lse = self.attention.forward(qkv, self._padding(kept_qkv))
        del qkv
        update, aux_proj, kept_proj = self.proj.forward(
            self._as_rows(out), None, leave="proj" in self.left
        )
        self._drop_(update, 0)
        kept = [out, lse] if some else []
        del out, lse
        room = self._room(self.lin1)
        with stage("sam_block", "norm2"):
            x1, n, h = stages.add_norm(
                self.rows, update, *self.head[2:4], self.plan.eps[1], self.dtype,
                self.lin1.fused_down, self._up(self.proj, kept_proj), room,
            )  # fmt: skip
        del update
        kept += [x1] if some else []
        z = [] if self.side is None else [self.side.forward(n)]
        u, aux_lin1, kept_lin1 = self.lin1.forward(n, h, None, self._leaves_to_gelu, room)
        late += [u] if every else []
        of_layers = [
            kept_qkv if every else [],
            kept_proj if some else [],
            kept_lin1 if every else [],
        ]
        aux = [aux_qkv, aux_proj, aux_lin1]
        return x1, u, self._lacks(kept_lin1), aux, [*kept, *late], of_layers, z

    def _again(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """What forward("fast") keeps, without the product that gives y."""
        self._leave(self.proj)
        _, u, lacks, _, kept, of_layers, z = self._up_to_gelu("fast")
        kept_lin2 = []
        if self.lin2.plan.adapted:
            with stage("sam_block", "gelu"):
                g, h = self.stages.gelu(u, self.lin2.fused_down, lacks)
            kept_lin2 = self.lin2.keep(g, h)
        return kept, [*of_layers, kept_lin2, z]

    def backward(
        self, dy: Tensor, daux: Sequence[Tensor | None], kept: list[Tensor],
        of_layers: list[list[Tensor]],
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of x and of the tensors in their order, None where not needed."""
        if not kept:
            kept, of_layers = self._again()
        out, lse, x1, *late = kept
        qkv, u = late or (None, None)
        kept_qkv, kept_proj, kept_lin1, kept_lin2, kept_side = of_layers
        del kept, late, of_layers
        norm1, norm2, tables = (self.head_needs[i : i + 2] for i in (0, 2, 4))
        need_n1 = self.need_x or any(norm1)
        need_qkv = need_n1 or any(self.qkv.needs)
        need_out = need_qkv or any(tables)
        need_x1 = need_out or any(self.proj.needs)
        need_n2 = need_x1 or any(norm2)
        need_u = need_n2 or any(self.lin1.needs)

        dy, daux = dy.reshape(self.rows.shape), self._of_layers(daux)
        dupdate = self._dropped(dy, 1)
        if u is None:
            u, kept_lin1 = self._widen(x1)
        beside = self._beside(dupdate, *kept_side, need_n2)
        dh = self.lin2.up(dupdate, daux[3], None, kept_lin2, need_u)
        source = Activated(
            self.stages, u, self.lin1.along(kept_lin1, need_n2), self.sums, self._lacks(kept_lin1)
        )
        du = self.lin2.through(dupdate, dh, need_u, source)
        made = source.made
        del u, dupdate, dh, source
        head = [None] * len(self.head)
        dx1 = dx = None
        if need_u:
            source = self._normed(x1, 1, dy, norm2)
            dh = self.lin1.up(du, daux[2], None, kept_lin1, need_n2, made)
            dx1 = self.lin1.through(du, dh, need_n2, source, beside)
            head[2:4] = source.grads
            del source  # which holds x1 and dy
        elif beside is not None:
            beside(None, self._normed(x1, 1, dy, norm2).rows())
        del du, dy, x1, beside, made
        if need_x1:
            dupdate = self._dropped(dx1, 0)
            dh = self.proj.up(dupdate, daux[1], None, kept_proj, need_out)
            dout = self.proj.through(dupdate, dh, need_out, Given(self._as_rows(out)))
            del dupdate, dh
        if need_out:
            if qkv is None:
                qkv, _, kept_qkv = self._project()
            pads, pad_needs = self._padding(kept_qkv), self.qkv.padding_needs(need_n1)
            dqkv, (dbias, dz_pad, dfactors), head[4:] = self.attention.backward(
                dout, out, lse, qkv, pads, pad_needs, tables
            )
            dqkv = dqkv.flatten(3).flatten(0, 2)
            del dout, qkv, pads
        if need_qkv:
            source = self._normed(self.rows, 0, dx1, norm1)
            dh = self.qkv.up(dqkv, daux[0], dz_pad, kept_qkv, need_n1)
            self.qkv.add_padding_grads(dbias, dfactors)
            dx = self.qkv.through(dqkv, dh, need_n1, source)
            head[:2] = source.grads
        if self.sums.waiting:
            with stage("sam_block", "sums"):
                self.sums.finish()
        dx = dx.view(self.x.shape) if self.need_x else None
        rest = [] if self.side is None else list(self.side.grads)
        rest += [None] * len(DROPS) if self.plan.drops else []
        return [dx, *head, *(g for layer in self.layers for g in layer.grads), *rest]

    def _project(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """qkv (B, H, W, 3, heads, head_dim), its aux, and what its layer keeps."""
        room = self._room(self.qkv)
        with stage("sam_block", "norm1"):
            n, h = self.stages.norm(
                self.rows, *self.head[:2], self.plan.eps[0], self.dtype, self.qkv.fused_down, room
            )
        qkv, aux, kept = self.qkv.forward(n, h, room=room)
        size = qkv.shape[1] // 3 // self.plan.heads
        qkv = qkv.view(*self.x.shape[:3], 3, self.plan.heads, size)
        self.attention.rotate_(qkv)
        return qkv, aux, kept

    def _widen(self, x1: Tensor) -> tuple[Tensor, list[Tensor]]:
        """u, or u without lin1's update where that is left to GELU, and what its layer keeps."""
        room = self._room(self.lin1)
        with stage("sam_block", "norm2"):
            n, h = self.stages.norm(
                x1, *self.head[2:4], self.plan.eps[1], self.dtype, self.lin1.fused_down, room
            )
        u, _, kept = self.lin1.forward(n, h, None, self._leaves_to_gelu, room)
        return u, kept

    def _room(self, layer: Layer | Joined) -> int:
        """Columns behind the rows of a layer after a norm, for its z."""
        # A side reads lin1's rows as well.
        if layer is self.lin1 and (self._leaves_to_gelu or self.side is not None):
            return 0
        return layer.room(len(self.rows), self.dtype)

    def _beside(
        self, dupdate: Tensor, *z_and_need
    ) -> Callable[[Tensor | None, Tensor], None] | None:
        """What the side does with n, and with its gradient if needed; None without a side."""
        if self.side is None:
            return None
        z, need_n2 = z_and_need
        dz = self.side.back_to_z(dupdate, z, need_n2)
        if not (need_n2 or self.side.need_low):
            return None
        return lambda dn, n: self.side.back_to_n(dn, dz, z, n)

    def _normed(self, x: Tensor, which: int, residual: Tensor, needs) -> Normed:
        weight, bias = self.head[2 * which : 2 * which + 2]
        eps = self.plan.eps[which]
        name = f"norm{which + 1}"
        return Normed(
            name, self.stages, x, weight, bias, eps, self.dtype, residual, needs, self.sums
        )

    def _as_rows(self, out: Tensor) -> Tensor:
        return out.view(len(self.rows), out.shape[3] * out.shape[4])

    def _padding(self, kept: list[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """qkv at the padding of windows: its bias, and the two factors of its update."""
        return (None, None, None) if self.windows.pads == 0 else self.qkv.padding(kept)

    def _leave(self, *layers: Layer) -> None:
        """Let the sums after these layers add their updates, if they can.

        left: each such layer's lora_b, transposed
        """
        some = [layer for layer in layers if self._takes_up(layer)]
        if some:
            factors = torch.cat([layer.lora_b.t() for layer in some])
            parts = factors.split([layer.lora_b.shape[1] for layer in some])
            self.left = {layer.name: part for layer, part in zip(some, parts, strict=True)}

    def _takes_up(self, layer: Layer) -> bool:
        """Whether all columns get the update, and nothing comes between it and the sum."""
        first = layer is self.proj
        dropped = self.drops[0 if first else 1] is not None
        if dropped or not layer.plan.adapted or layer.plan.starts:
            return False
        return self.stages.takes_up(layer.lora_b, self.lin1.fused_down if first else None)

    @property
    def _leaves_to_gelu(self) -> bool:
        """Whether GELU adds lin1's update to u, here and in the backward; all columns get it."""
        lin1 = self.lin1
        return lin1.plan.adapted and not lin1.plan.starts and self.stages.left_to_gelu(lin1.lora_b)

    def _lacks(self, kept_lin1: list[Tensor]) -> tuple[Tensor, Tensor, float] | None:
        """The update that u lacks, as GELU takes it."""
        lin1 = self.lin1
        return (kept_lin1[0], lin1.lora_b, lin1.plan.scaling) if self._leaves_to_gelu else None

    def _up(self, layer: Layer, kept: list[Tensor]) -> tuple[Tensor, Tensor, float] | None:
        """The update that a layer has left, as the sums take it."""
        factor = self.left.get(layer.name)
        return None if factor is None else (kept[0], factor, layer.plan.scaling)

    def _drop_(self, update: Tensor, which: int) -> None:
        """Multiply what a branch gives by the factors of its samples, where there are some."""
        if self.drops[which] is not None:
            with stage("sam_block", "drop"):
                update.view(len(self.x), -1).mul_(self.drops[which].to(update.dtype)[:, None])

    def _dropped(self, d: Tensor, which: int) -> Tensor:
        """The gradient of what a branch gives, in the dtype of the products."""
        if self.drops[which] is None:
            return d.to(self.dtype)
        with stage("sam_block", "drop"):
            factors = self.drops[which].to(d.dtype)[:, None]
            return (d.view(len(self.x), -1) * factors).view(d.shape).to(self.dtype)

    def _of_layers(self, daux: Sequence[Tensor | None]) -> list:
        """Sort the gradients of aux by layer; three may stand in qkv's place."""
        before = daux[:-3]
        return [before if self.plan.apart else before[0], *daux[-3:]]


def _each(aux: Tensor | list[Tensor]) -> list[Tensor]:
    return aux if isinstance(aux, list) else [aux]
