# SPDX-License-Identifier: Apache-2.0
"""segment_anything's attention, or a copy's, without its bias tensor and copied windows."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from samfast.adapters.adapter import Adapter
from samfast.adapters.block_layer import layer_problem
from samfast.adapters.foreign import Foreign, ForeignModule
from samfast.adapters.stand_in import altered, kind_of, left_alone
from samfast.backends import requested, resolve
from samfast.functional import window_relpos_attention
from samfast.fused.families import family_of
from samfast.fused.parts import Family
from samfast.fused.proof import objection, signature
from samfast.kernels._common.autocast import autocast_input
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention.op import supports


class FusedAttention(ForeignModule):
    """Mixin of a fused multi-head attention with decomposed relative positions (ViTDet, SAM).

    x: (B, H, W, D) -> (B, H, W, D), as the stock module; with ``window``, as the stock module
    between window_partition and window_unpartition. Parameters, submodules and the state dict are
    the stock module's.

    Windows run in image order: padding is not projected, and no window is copied. This needs layers
    that process each token on its own; ``window_order`` says what prevents it. Otherwise the
    windows are cut before the projection, as in the stock block.

    backend: which kernel runs the attention, see ``samfast.backends``
    left_alone: True if the stock forward must run, in a compiled block that runs its own forward

    If the stock class does not compute what it should, its own forward runs; see
    ``samfast.fused.proof``.
    """

    backend: str = "auto"
    left_alone: bool = False
    _family: ClassVar[Family]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._family = family_of(cls)  # type: ignore[assignment]  # None for this class itself

    def forward(self, x: Tensor, window: int | None = None, *more: Any, **others: Any) -> Tensor:
        """Run the attention. window: side of the windows; None for the whole map.

        more, others: arguments of a changed stock class; the fused one takes none.
        """
        stock = self.left_alone or left_alone(self) or objection(self) is not None
        if more or others or (stock and (window is None or self._takes_more())):
            return super().forward(x, *(() if window is None else (window,)), *more, **others)
        if window is not None:
            return self.forward_windows(x, window)
        before, after = self._family.parts.projections(self).values()
        qkv = before(x)
        batch, height, width = x.shape[:3]
        if self._family.parts.has_tables(self):
            qkv = qkv.reshape(batch, height, width, qkv.shape[-1])
            return after(self._attend(qkv, (height, width)))
        heads = self._family.parts.heads(self)
        head_dim = qkv.shape[-1] // (3 * heads)
        qkv = qkv.reshape(batch, height * width, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=self._family.parts.scale(self))
        return after(out.transpose(1, 2).reshape(batch, height, width, heads * head_dim))

    def forward_windows(self, x: Tensor, window: int) -> Tensor:
        """Run x (B, H, W, D) in image order; pad with zeros at the bottom and right if needed."""
        if self.window_order() is None and objection(self) is None:
            before, after = self._family.parts.projections(self).values()
            qkv, pad_h, pad_b = _project(before, x, window)
            return after(
                self._attend(qkv, (window, window), pad_bias=before.bias, pad_h=pad_h, pad_b=pad_b)
            )
        batch, height, width = x.shape[:3]
        windows = Windows(batch, height, width, window, window)
        tokens, _ = windows.paste(self.forward(windows.cut(x)))
        return tokens.view(batch, height, width, tokens.shape[1])

    def window_order(self) -> str | None:
        """Say why windows are cut before the projection; None if they run in image order."""
        if not self._family.parts.has_tables(self):
            return "it has no relative positions"
        qkv = self._family.parts.IN_ATTENTION[0]
        for name, layer in self._family.parts.projections(self).items():
            if altered(layer):
                return f"{name} has hooks or a forward of its own"
            if type(layer) is nn.Linear or getattr(layer, "token_wise", False):
                continue
            if name == qkv and isinstance(layer, Adapter) and layer.window_wise:
                continue
            problem = layer_problem(name, layer) if hasattr(layer, "block_problem") else None
            return problem or f"{name} is {kind_of(layer)}, which may look at whole windows"
        return None

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        if not self._family.parts.has_tables(self):
            return {}
        tables = self._family.parts.relative_positions(self)
        sides = [(len(table) + 1) // 2 for table in tables]
        table = autocast_input(tables[0].detach())
        q = table.new_empty(0, *sides, self._family.parts.heads(self), table.shape[1])
        windows = Windows.whole(0, *sides)
        try:
            name = resolve(
                "relpos_attention", self._backend(), q.device, lambda b: supports(b, q, windows)
            )
        except RuntimeError as error:
            return {"relpos_attention": str(error)}
        return {"relpos_attention": name}

    def _attend(self, qkv: Tensor, window: tuple[int, int], **pads: Any) -> Tensor:
        return window_relpos_attention(
            qkv,
            self._family.parts.heads(self),
            window,
            *self._family.parts.relative_positions(self),
            scale=self._family.parts.scale(self),
            backend=self._backend(),
            **pads,
        )

    def _takes_more(self) -> bool:
        """True if the stock class was changed and takes other arguments than x."""
        return signature(self._family.attention) != self._family.parts.takes

    def _backend(self) -> str:
        name = requested(self.backend)
        # SAMFAST_BACKEND applies to the whole model, but attention has no CUDA source.
        return "triton" if name == "cuda" and self.backend == "auto" else name

    def extra_repr(self) -> str:
        text = f"num_heads={self._family.parts.heads(self)}"
        return text if self.backend == "auto" else f"{text}, backend={self.backend}"


def _project(layer: Foreign, x: Tensor, window: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return qkv (B, H, W, 3 · D), and the two factors that padding adds to the bias."""
    windowed = isinstance(layer, Adapter) and layer.window_wise
    return layer.forward_windows(x, window) if windowed else (layer(x), None, None)
