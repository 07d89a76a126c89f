# SPDX-License-Identifier: Apache-2.0
"""TA-LoRA and its options."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, cast

from samfast.adapters.checks import QKV, check_dropout, checked_slices, checked_target
from samfast.adapters.method import Method, Relation
from samfast.adapters.options import dropout_option, option
from samfast.methods.ta_lora.checks import (
    check_names,
    check_orthogonality,
    check_ranks,
    check_scaling,
    check_tasks,
)

if TYPE_CHECKING:
    from torch import nn

    from samfast.adapters.adapter import Adapter
    from samfast.adapters.foreign import Foreign
    from samfast.methods.ta_lora.layer import TaskLoraLinear


@dataclasses.dataclass(frozen=True)
class TaLora(Method):
    """TA-LoRA: low-rank updates for several tasks, which share one Tucker tensor's factors.

    tasks: their number or their names   ranks: for inputs, outputs and tasks
    scaling: factor of the update   dropout: on the adapter's input, in training
    enabled: which of ("q", "k", "v") get an update; with all three, other linear layers can too
    orthogonality: weight of the penalty in ``aux_loss``; 0 for none
    target: as in ``Lora``
    The paper gives no ranks, scaling and dropout. The defaults are those of the authors' later
    method (ToRA).
    """

    name: ClassVar[str] = "ta-lora"
    needs_tasks = True
    lacks = MappingProxyType({"target": "adapts q, k and v of every block"})

    tasks: int | tuple[str, ...] = 2
    ranks: tuple[int, int, int] = option(
        (32, 32, 4),
        "Rank for inputs and for outputs; the rank for tasks is 4",
        name="rank",
        type=int,
        as_option=lambda ranks: ranks[0],
        as_field=lambda rank: (rank, rank, 4),
    )
    scaling: float = 0.5
    dropout: float = dropout_option(0.1)
    enabled: tuple[str, ...] = QKV
    orthogonality: float = option(
        0.0, "Weight of the penalty that keeps the factors nearly orthogonal"
    )
    target: str | tuple[str, ...] = "qkv"

    def __post_init__(self) -> None:
        if isinstance(self.tasks, (tuple, list)):
            check_names(self.tasks)
            object.__setattr__(self, "tasks", tuple(self.tasks))
        else:
            check_tasks(self.tasks)
        check_ranks(self.ranks)
        object.__setattr__(self, "ranks", tuple(self.ranks))
        check_scaling(self.scaling)
        check_dropout(self.dropout)
        object.__setattr__(self, "enabled", checked_slices(self.enabled))
        check_orthogonality(self.orthogonality)
        object.__setattr__(self, "target", checked_target(self.target))

    @property
    def relation(self) -> Relation:
        return Relation("the core", share=0.05)  # see TaskLoraLinear.relation_parameters

    @property
    def smallest_width(self) -> int:
        return max(16, *self.ranks)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tasks; () if they only have numbers."""
        return self.tasks if isinstance(self.tasks, tuple) else ()

    @property
    def count(self) -> int:
        """The number of tasks."""
        return len(self.tasks) if isinstance(self.tasks, tuple) else self.tasks

    def same_update(self, other: Method) -> bool:
        if type(other) is not TaLora:
            return False
        mine, theirs = ((m.count, m.names, m.ranks, m.scaling, m.enabled) for m in (self, other))
        return mine == theirs

    def check_model(self, model: "nn.Module", layers: "Mapping[str, Foreign]") -> None:
        """Raise ValueError if a MultiTaskSam has other tasks, or a layer is outside its encoder."""
        known = getattr(model, "tasks", None)
        if known is None:
            return
        names = tuple(task.name for task in known)
        if self.count != len(names) or (self.names and self.names != names):
            given = ", ".join(self.names) or f"{self.count} of them"
            raise ValueError(
                f"ta-lora has the tasks {given}, but the model has {', '.join(names)}; pass the "
                "same tasks, in the same order"
            )
        for name in layers:
            if not name.startswith("image_encoder."):
                raise ValueError(
                    f"{name} is outside the image encoder, and only there are tasks set; leave it "
                    "out of target"
                )

    def check(self, layer: "nn.Linear") -> None:
        from samfast.methods.ta_lora.layer import TaskLoraLinear

        sizes = layer.in_features, layer.out_features
        TaskLoraLinear.check_sizes(*sizes, self.count, self.ranks, self.enabled)

    def wrap(self, layer: "nn.Linear") -> "Adapter":
        from samfast.methods.ta_lora.layer import TaskLoraLinear

        return TaskLoraLinear.from_linear(
            layer, self.count, self.ranks, self.scaling, self.dropout, self.enabled,
            self.orthogonality,
        )  # fmt: skip

    def attached(self, model: "nn.Module", adapted: "Mapping[str, Adapter]") -> None:
        from samfast.adapters.wrappers import encoder_of
        from samfast.methods.ta_lora.layer import TaskForward

        TaskForward(cast("list[TaskLoraLinear]", list(adapted.values()))).install(encoder_of(model))
