# SPDX-License-Identifier: Apache-2.0
"""TA-LoRA: a low-rank update of a layer for each task, from one Tucker tensor."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samfast.adapters.block_layer import BlockLayer
from samfast.adapters.checks import QKV, check_dropout, checked_slices
from samfast.adapters.encoder_forward import EncoderForward, SharingLayer
from samfast.adapters.latest_loss import recomputing
from samfast.adapters.low_rank import LowRankLinear
from samfast.backends import requested
from samfast.functional import task_cores
from samfast.kernels._common.autocast import autocast_input
from samfast.kernels._common.windows import Windows
from samfast.kernels.sam_block.plan import LayerPlan
from samfast.kernels.task_core.middle_map import middle_key
from samfast.kernels.task_core.op import core_backend
from samfast.kernels.task_core.task_lora import task_lora_linear
from samfast.methods.ta_lora.checks import (
    Ranks,
    check_orthogonality,
    check_ranks,
    check_scaling,
    check_tasks,
)


class TaskLoraLinear(SharingLayer, LowRankLinear):
    """Linear layer with one update per task, slices of a tensor in Tucker form (TA-LoRA).

    x: (B, …, in_features) -> (B, …, out_features) = x Wᵀ + b + s · ((drop(x) U1) M_t) U2ᵀ with
    M_t = Σ_v td_U3[t, v] td_G[:, :, v] for task t; the update's weight is never formed.

    td_U1: (in_features, R1), td_U2: (n · out_features / 3, R2) for n enabled ones of q, k and v,
        td_U3: (tasks, R3), all standard normal; td_G: (R1, R2, R3), zeros
    ``set_task`` chooses the task: one for the batch, all tasks for a repeated batch, or one per
    sample. Task 0 is set at first. Dropout acts only in training. With ``orthogonality`` λ,
    ``samfast.aux_loss`` adds λ times the mean of ‖U1ᵀU1 − 1‖, ‖U2ᵀU2 − 1‖ and ‖G_vᵀG_v − 1‖.
    Names and form are the authors'. The paper gives no ranks, scaling and dropout; the defaults are
    those of the authors' later method for multi-task SAM (ToRA).
    Saves x, drop(x) U1 and its product with M_t. Raises ValueError for sizes that do not fit.
    """

    token_wise = True
    td_G: nn.Parameter
    td_U1: nn.Parameter
    td_U2: nn.Parameter
    td_U3: nn.Parameter
    chosen: tuple[int, ...]
    entries: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tasks: int,
        ranks: Ranks = (32, 32, 4),
        scaling: float = 0.5,
        dropout: float = 0.1,
        enabled: tuple[str, ...] = QKV,
        orthogonality: float = 0.0,
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ):
        self.check_sizes(in_features, out_features, tasks, ranks, enabled)
        check_scaling(scaling)
        check_dropout(dropout)
        check_orthogonality(orthogonality)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.tasks = tasks
        self.ranks: Ranks = (ranks[0], ranks[1], ranks[2])
        self.scaling, self.dropout, self.orthogonality = scaling, dropout, orthogonality
        self.enabled = checked_slices(enabled)
        length = out_features // 3
        whole = self.enabled == QKV
        self.ranges = (
            None
            if whole
            else tuple(
                (QKV.index(name) * length, (QKV.index(name) + 1) * length) for name in self.enabled
            )
        )
        rows = out_features if whole else len(self.enabled) * length
        rank_in, rank_out, depth = self.ranks
        self.add_adapter(
            td_G=(rank_in, rank_out, depth),
            td_U1=(in_features, rank_in),
            td_U2=(rows, rank_out),
            td_U3=(tasks, depth),
        )
        self.choose((0,))
        self.ran: tuple[
            tuple[tuple[int, ...], Tensor], ...
        ] = ()  # tasks of forwards since a backward last recomputed them, two at most
        self.again = False  # a recomputing backward has begun
        self.repeated = False  # see set_task
        self.reset_adapter()

    @staticmethod
    def check_sizes(
        in_features: int, out_features: int, tasks: int, ranks: Ranks, enabled: tuple[str, ...]
    ) -> None:
        """Raise ValueError if layers of these sizes cannot have this update."""
        check_tasks(tasks)
        check_ranks(ranks)
        if checked_slices(enabled) != QKV and out_features % 3:
            raise ValueError(
                f"a packed qkv layer has three equal parts, but {out_features} outputs do not "
                "divide by 3"
            )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        tasks: int,
        ranks: Ranks = (32, 32, 4),
        scaling: float = 0.5,
        dropout: float = 0.1,
        enabled: tuple[str, ...] = QKV,
        orthogonality: float = 0.0,
    ) -> "TaskLoraLinear":
        """Add TA-LoRA to ``linear``; keep its weight and bias Parameters."""
        module = cls._from_linear(
            linear, tasks=tasks, ranks=ranks, scaling=scaling, dropout=dropout, enabled=enabled,
            orthogonality=orthogonality,
        )  # fmt: skip
        module.choose((0,))
        return module

    def choose(self, tasks: tuple[int, ...], entries: Tensor | None = None) -> None:
        """Work for these tasks from now on; entries: the same as a tensor on the layer's device."""
        if entries is None:
            entries = entries_of(tasks, self.weight.device)
        self.chosen, self.entries = tasks, entries

    def tasks_now(self, samples: int) -> Tensor:
        """Return the task entries for this forward of ``samples`` samples.

        A checkpoint reruns a forward during backward, when other tasks may be set. It then gets the
        tasks of the earlier forwards. Raises RuntimeError if these differ, because it cannot tell
        which forward is rerun.
        """
        if not torch.compiler.is_compiling():
            if self.entries.is_inference():  # from a graph that was compiled in inference mode
                self.choose(self.chosen)
        chosen, entries = self.chosen, self.entries
        if not torch.compiler.is_compiling():
            if recomputing():
                self.again = True
                if len(self.ran) > 1:
                    raise RuntimeError(
                        "a checkpoint reruns a layer with tasks, but other tasks were set and ran "
                        "since its forward; call backward before you set another task, or use "
                        "samfast.fuse(memory='minimal'), which keeps the tasks of each forward"
                    )
                if self.ran:
                    chosen, entries = self.ran[0]
            elif self.training or torch.is_grad_enabled():
                before = () if self.again else self.ran
                self.again = False
                if chosen not in [ran for ran, _ in before]:
                    before = (*before[-1:], (chosen, entries))
                self.ran = before
        count = len(chosen)
        if count > 1 and getattr(self, "_is_replica", False):
            raise RuntimeError(
                f"{count} tasks are set, but DataParallel does not split them with the batch; use "
                "DistributedDataParallel, or set one task at a time"
            )
        if samples % count:
            raise ValueError(f"{count} tasks are set, which do not divide a batch of {samples}")
        return entries if entries.device == self.weight.device else entries.to(self.weight.device)

    def reset_adapter(self) -> None:
        """Initialise the factors anew and set the core to zeros."""
        nn.init.zeros_(self.td_G)
        for factor in (self.td_U1, self.td_U2, self.td_U3):
            nn.init.normal_(factor)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "td_G" in self._parameters:  # nn.Linear calls this before the adapter exists
            self.reset_adapter()

    def relation_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the core, which needs a lower rate than LoRA's factors.

        The factors next to it have unit variance. A step of the core moves the layer about as much
        as a step twenty times as large moves LoRA's factors.
        """
        yield self.td_G

    @property
    def depends_on_task(self) -> bool:
        """True if the output depends on the task (False once merged)."""
        return not self.merged

    def sources(self) -> list[Tensor]:
        return [self.td_G, self.td_U3]

    def alone(self) -> tuple[Tensor, ...]:
        """Return the cores M (P, T, R1, R2) of all tasks, see ``task_cores``."""
        return task_cores([self.td_G], [self.td_U3])

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.td_U1.t(), self.td_U2

    def delta_weight(self) -> Tensor:
        """Return the update of the one task that is set."""
        if len(self.chosen) != 1:
            raise ValueError(
                f"{len(self.chosen)} tasks are set; choose one with merge(model, task=...)"
            )
        wide = torch.promote_types(self.td_G.dtype, torch.float32)
        core, into, out, kinds = (
            t.to(wide) for t in (self.td_G, self.td_U1, self.td_U2, self.td_U3)
        )
        update = self.scaling * out @ (core @ kinds[self.chosen[0]]).t() @ into.t()
        if self.ranges is None:
            return update
        delta = update.new_zeros(self.out_features, self.in_features)
        for (start, stop), part in zip(self.ranges, update.chunk(len(self.ranges)), strict=True):
            delta[start:stop] = part
        return delta

    def forward_adapted(self, x: Tensor) -> Tensor:
        """Run the layer with its update. x: (..., in_features) -> (..., out_features)"""
        return task_lora_linear(
            x, self.weight, self.bias, self.td_U1, self.td_U2, self.share()[0],
            self.tasks_now(x.shape[0] if x.dim() > 1 else 1),
            self.scaling, dropout=self.dropout if self.training else 0.0, slices=self.ranges,
        )  # fmt: skip

    def block_layer(self, x: Tensor, windows: Windows) -> BlockLayer:
        share = super().block_layer(x, windows)
        if self.merged:
            return share
        return dataclasses.replace(share, params=(*self.share(), self.tasks_now(windows.batch)))

    def layer_plan(self, dropout: float) -> LayerPlan:
        starts = () if self.ranges is None else tuple(start for start, _ in self.ranges)
        return LayerPlan(
            adapted=True, scaling=float(self.scaling), dropout=float(dropout), starts=starts,
            middle=middle_key(requested("auto")), params=2,
        )  # fmt: skip

    def backends(self) -> dict[str, str]:
        try:
            own = core_backend("auto", autocast_input(self.weight.detach()[:0]), self.td_G[..., 0])
        except RuntimeError as error:
            own = str(error)
        return {**super().backends(), "task_core": own}

    @classmethod
    def joint_loss(cls, layers: Sequence["TaskLoraLinear"]) -> Tensor | None:
        """Return the orthogonality penalty: the mean over layers of λ times each layer's."""
        if not any(layer.orthogonality for layer in layers):
            return None
        alike: dict[tuple[Any, ...], list[TaskLoraLinear]] = {}
        for layer in layers:
            shapes = layer.td_U1.shape, layer.td_U2.shape, layer.td_G.shape
            alike.setdefault((shapes, layer.td_G.device), []).append(layer)
        terms = [orthogonal_penalty(group).to(layers[0].td_G.device) for group in alike.values()]
        return torch.stack(terms).sum() / len(layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TaskLoraLinear":
        module = super()._apply(fn, recurse)
        if self.entries.device != self.weight.device:
            self.choose(self.chosen)
        return module

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, tasks={self.tasks}, ranks={self.ranks}"
        text += f", scaling={self.scaling}, dropout={self.dropout}"
        if self.ranges is not None:
            text += f", enabled={','.join(self.enabled)}"
        text += f", orthogonality={self.orthogonality}" if self.orthogonality else ""
        return text + (", merged" if self.merged else "")


def entries_of(tasks: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the tasks as int64 (E,), not as an inference tensor, since they outlive a forward."""
    if torch.compiler.is_compiling():
        return torch.tensor(tasks, dtype=torch.int64, device=device)
    with torch.inference_mode(False):
        return torch.tensor(tasks, dtype=torch.int64, device=device)


def orthogonal_penalty(layers: Sequence[TaskLoraLinear]) -> Tensor:
    """Sum λ · mean(‖U1ᵀU1 − 1‖, ‖U2ᵀU2 − 1‖, ‖G_vᵀG_v − 1‖ …) over layers of one shape."""
    into, out = (torch.stack([getattr(layer, n) for layer in layers]) for n in ("td_U1", "td_U2"))
    core = torch.stack([layer.td_G for layer in layers]).permute(0, 3, 1, 2)
    norms = []
    for factor in (into[:, None], out[:, None], core):
        one = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        norms.append(torch.linalg.matrix_norm(factor.mT @ factor - one))
    each = torch.cat(norms, 1).mean(1)
    weights = [layer.orthogonality for layer in layers]
    if len(set(weights)) == 1:  # a CUDA graph cannot capture a tensor made of Python numbers
        return (each * weights[0]).sum()
    return torch.stack([row * weight for row, weight in zip(each, weights, strict=True)]).sum()


class TaskForward(EncoderForward[TaskLoraLinear]):
    """Computes the cores of all layers of one encoder during its forward."""

    def make(self) -> list[tuple[Tensor, ...]]:
        cores, factors = zip(*(layer.sources() for layer in self.layers), strict=True)
        return [(m,) for m in task_cores(cores, factors)]

    def together(self) -> bool:
        """True if none is merged and all are alike."""
        like = [
            (layer.td_G.shape, layer.td_G.dtype, layer.td_G.device, layer.td_U3.dtype)
            for layer in self.layers
        ]
        return not any(layer.merged for layer in self.layers) and len(set(like)) == 1

    def open(self, encoder: nn.Module, args: Any) -> None:
        """Raise ValueError, before the forward, if the tasks do not divide the batch."""
        lead, images = self.layers[0], args[0].shape[0] if args else 0
        if images % len(lead.chosen) and not lead.repeated and not lead.merged:
            raise ValueError(
                f"{len(lead.chosen)} tasks are set, which do not divide a batch of {images}"
            )
        super().open(encoder, args)
