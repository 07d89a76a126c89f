# SPDX-License-Identifier: Apache-2.0
"""Three linear layers on the same rows as one: q, k and v side by side in one buffer.

No weight is copied: each layer's product goes to its columns. Adapters of one kind run as one with
three times the rank, so that they read the rows and the buffer's gradient once.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from samfast.kernels._common.middle import IDENTITY, find, no_aux
from samfast.kernels._common.ranges import stage
from samfast.kernels.adapt_former.engine import column_sum
from samfast.kernels.lora_linear import engine
from samfast.kernels.sam_block.layer import Layer, linear
from samfast.kernels.sam_block.plan import LayerPlan

_A, _B = 2, 3  # where lora_a and lora_b are among a layer's tensors


class Joined:
    """What ``Layer`` is, of layers whose results are the columns of one matrix.

    layers: all with as many outputs   kept: of their adapters, one after another
    """

    def __init__(self, name: str, layers: Sequence[Layer]):
        self.name, self.layers = name, list(layers)
        self.length = self.layers[0].weight.shape[0]
        adapted = [(i, layer) for i, layer in enumerate(self.layers) if layer.plan.adapted]
        self.together = len(adapted) > 1 and len({_kind(layer) for _, layer in adapted}) == 1
        self.together = self.together and _kind(adapted[0][1]) is not None
        self.adapters = [_of_one(layer, i * self.length) for i, layer in adapted]
        self.sources = [[layer] for _, layer in adapted]
        if self.together:
            self.adapters = [_of_several(adapted, self.length)]
            self.sources = [[layer for _, layer in adapted]]

    @property
    def needs(self) -> list[bool]:
        return [need for layer in self.layers for need in layer.needs]

    @property
    def grads(self) -> list[Tensor | None]:
        return [grad for layer in self.layers for grad in layer.grads]

    @property
    def pads_vary(self) -> bool:
        return any(layer.plan.pads_vary for layer in self.layers)

    @property
    def fused_down(self) -> Tensor | None:
        """lora_a of all adapters, for a stage that makes h with the rows; None where it cannot."""
        every = [adapter.fused_down for adapter in self.adapters]
        if not every or any(lora_a is None for lora_a in every):
            return None
        return every[0] if len(every) == 1 else torch.cat(every)

    def room(self, tokens: int, dtype: torch.dtype) -> int:
        """As ``Layer.room``: none, for three products would each copy z."""
        return 0

    def forward(
        self, rows: Tensor, h: Tensor | None, room: int = 0
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The matrix, aux of each layer, and what the backward needs."""
        with stage("sam_block", self.name):
            y = rows.new_empty(len(rows), len(self.layers) * self.length)
            for part, layer in zip(self._columns(y), self.layers, strict=True):
                linear(rows, layer.weight, layer.bias, part)
            aux, kept = {}, []
            for (adapter, sources), own in zip(self._each(), self._of_each(h), strict=True):
                z, found, z_pad, saved = engine.low(
                    adapter.path(rows), rows, adapter.lora_a, adapter.params, adapter.seed,
                    adapter.options, own,
                )  # fmt: skip
                adapter.add_(y, z)
                aux[id(sources[0])] = found
                kept += [z, z_pad, *saved]
            every = [aux.get(id(layer), no_aux(rows)) for layer in self.layers]
        return y, every, kept

    def keep(self, rows: Tensor, h: Tensor | None) -> list[Tensor]:
        """What the backward needs, without the result."""
        each = zip(self.adapters, self._of_each(h), strict=True)
        return [t for adapter, own in each for t in adapter.keep(rows, own)]

    def up(
        self, dy: Tensor, daux: Sequence[Tensor | None], dz_pad: Tensor | None,
        kept: list[Tensor], need_rows: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        """Everything that follows from dy; returns dh of each adapter if it is needed."""
        for part, layer in zip(self._columns(dy), self.layers, strict=True):
            if layer.needs[1]:
                with stage("sam_block", self.name):
                    layer.grads[1] = column_sum(part, layer.bias)
        found, first = [], 0
        of_layers = dict(zip(map(id, self.layers), daux, strict=True))
        for (adapter, sources), own in zip(self._each(), self._kept(kept), strict=True):
            pads = None
            if dz_pad is not None and adapter.plan.pads_vary:
                pads = dz_pad[:, first : first + adapter.slices.width].contiguous()
                first += adapter.slices.width
            found.append(adapter.up(dy, of_layers[id(sources[0])], pads, own, need_rows))
            self._share(adapter, sources, _B, 0)
            if not self.together:
                sources[0].grads[5:] = adapter.grads[5:]
        return found

    def through(
        self, dy: Tensor, dh: Sequence[Tensor | None], need_rows: bool, source
    ) -> Tensor | None:
        """As ``Layer.through``."""
        drows, low = None, [(d, a) for d, a in zip(dh, self.adapters, strict=True) if d is not None]
        with stage("sam_block", self.name):
            for part, layer in zip(self._columns(dy), self.layers, strict=True):
                if need_rows and drows is None:
                    drows = torch.mm(part, layer.weight.to(dy.dtype))
                elif need_rows:
                    drows.addmm_(part, layer.weight.to(dy.dtype))
        need_a = any(adapter.needs[_A] for _, adapter in low)
        need_weight = any(layer.needs[0] for layer in self.layers)
        if need_rows and not source.needs_all and all(a.plan.dropout == 0.0 for _, a in low):
            before, rows = self._through_source(drows, low, need_a, need_weight, source)
        else:
            rows = source.rows() if need_a or need_weight else None
            for d, adapter in low:
                self._down_backward(drows, d, rows if adapter.needs[_A] else None, adapter)
            before = None if drows is None else source.backward(drows, None, False)[0]
        for adapter, sources in self._each():
            self._share(adapter, sources, _A, 0)
        for part, layer in zip(self._columns(dy), self.layers, strict=True):
            if layer.needs[0]:
                with stage("sam_block", self.name):
                    layer.grads[0] = torch.mm(part.t(), rows).to(layer.weight.dtype)
        return before

    def _through_source(self, drows, low, need_a, need_weight, source):
        """The gradient before the source, which makes the adapters' too, and rows or None."""
        if not low:
            return source.backward(drows, None, need_weight)[:2]
        dh, lora_a = (torch.cat(parts, dim) if len(low) > 1 else parts[0] for parts, dim in (
            ([d for d, _ in low], 1), ([adapter.lora_a for _, adapter in low], 0)
        ))  # fmt: skip
        if any(adapter.lora_a.dtype != lora_a.dtype for _, adapter in low):
            source.sums = None  # parts of the gradient are cast, which cannot wait
        before, rows, da = source.backward(drows, (dh, lora_a, need_a), need_weight)
        parts = [None] * len(low) if da is None else da.split([len(a.lora_a) for _, a in low])
        for (d, adapter), part in zip(low, parts, strict=True):
            adapter.grads[_A] = part
            if adapter.needs[_A] and part is None:
                self._down_backward(None, d, rows, adapter)
        return before, rows

    def padding(self, kept: list[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The matrix at rows of zeros: its bias, and the two factors of its update."""
        bias = None
        if any(layer.bias is not None for layer in self.layers):
            bias = torch.cat([_bias_of(layer) for layer in self.layers])
        if not self.pads_vary:
            return bias, None, None
        vary = [
            (adapter, own)
            for adapter, own in zip(self.adapters, self._kept(kept), strict=True)
            if adapter.plan.pads_vary
        ]
        rows = torch.cat([own[1] for _, own in vary], 1)
        factors = rows.new_zeros(len(self.layers) * self.length, rows.shape[1])
        first = 0
        for adapter, _ in vary:
            for columns, of_b, ranks in adapter.slices:
                here = slice(first + ranks.start, first + ranks.stop)
                factors[columns, here] = adapter.plan.scaling * adapter.lora_b[of_b].to(rows.dtype)
            first += adapter.slices.width
        return bias, rows, factors

    def padding_needs(self, need_rows: bool) -> list[bool]:
        """Which of ``padding`` want a gradient."""
        each = [layer.padding_needs(need_rows) for layer in self.layers]
        return [any(of_kind) for of_kind in zip(*each, strict=True)]

    def add_padding_grads(self, dbias: Tensor | None, dfactors: Tensor | None) -> None:
        """Add what the padding gives to the gradients of biases and of lora_b."""
        for i, layer in enumerate(self.layers):
            if dbias is not None and layer.needs[1]:
                layer.grads[1] += dbias[i * self.length : (i + 1) * self.length]
        first = 0
        for adapter, sources in self._each() if dfactors is not None else ():
            if not adapter.plan.pads_vary:
                continue
            for columns, of_b, ranks in adapter.slices:
                here = slice(first + ranks.start, first + ranks.stop)
                if sources[0].needs[_B]:
                    sources[0].grads[_B][of_b] += adapter.plan.scaling * dfactors[columns, here]
            first += adapter.slices.width

    def _columns(self, t: Tensor) -> Sequence[Tensor]:
        return t.split(self.length, 1)

    def _each(self) -> Iterator[tuple[Layer, list[Layer]]]:
        """Each adapter and the layers whose it is."""
        return zip(self.adapters, self.sources, strict=True)

    def _of_each(self, h: Tensor | None) -> Sequence[Tensor | None]:
        if h is None or len(self.adapters) == 1:
            return [h] * len(self.adapters)
        widths = [adapter.lora_a.shape[0] for adapter in self.adapters]
        return [part.contiguous() for part in h.split(widths, 1)]

    def _kept(self, kept: list[Tensor]) -> list[list[Tensor]]:
        counts = [2 + find(adapter.plan.middle).saves for adapter in self.adapters]
        assert sum(counts) == len(kept), (counts, len(kept))
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [kept[end - count : end] for count, end in zip(counts, ends, strict=True)]

    def _share(self, adapter: Layer, sources: list[Layer], which: int, dim: int) -> None:
        """Give the layers their parts of a gradient of the adapter that stands for them."""
        grad = adapter.grads[which]
        if grad is None:
            return
        parts = grad.split([layer.tensor(which).shape[dim] for layer in sources], dim)
        for layer, part in zip(sources, parts, strict=True):
            if layer.needs[which]:
                layer.grads[which] = part.to(layer.tensor(which).dtype).contiguous()

    def _down_backward(self, drows, dh, rows, adapter: Layer) -> None:
        with stage("sam_block", self.name):
            adapter.grads[_A] = adapter.path(dh).down_backward_(
                drows, dh, rows, adapter.lora_a, adapter.plan.dropout, adapter.seed, adapter.sums
            )


def _kind(layer: Layer) -> tuple | None:
    """What adapters that run as one have in common; None for one that must run by itself."""
    plan = layer.plan
    if plan.middle != IDENTITY or plan.dropout > 0.0 or plan.starts:
        return None
    return plan.scaling, layer.lora_a.shape[0], layer.lora_a.dtype, layer.lora_b.dtype


def _of_one(layer: Layer, start: int) -> Layer:
    """The layer's adapter, on the columns from ``start`` on."""
    starts = tuple(start + own for own in layer.plan.starts or (0,))
    tensors = [None, None, layer.lora_a, layer.lora_b, layer.seed, *layer.params]
    needs = [False, False, *layer.needs[2:]]
    plan = layer.plan._replace(starts=starts)
    return Layer(layer.name, plan, tensors, layer.windows, layer.backend, needs, layer.sums)


def _of_several(adapted: Sequence[tuple[int, Layer]], length: int) -> Layer:
    """One adapter that does what those of the layers do."""
    layers = [layer for _, layer in adapted]
    first = layers[0]
    plan = LayerPlan(
        True, first.plan.scaling, starts=tuple([i * length for i, _ in adapted]), own=True
    )
    factors = [torch.cat([layer.tensor(which) for layer in layers]) for which in (_A, _B)]
    needs = [any(layer.needs[which] for layer in layers) for which in (_A, _B)]
    tensors = [None, None, *factors, None]
    cast = len({layer.tensor(which).dtype for layer in layers for which in (_A, _B)}) > 1
    return Layer(
        first.name, plan, tensors, first.windows, first.backend, [False, False, *needs, False],
        None if cast else first.sums,
    )  # fmt: skip


def _bias_of(layer: Layer) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
