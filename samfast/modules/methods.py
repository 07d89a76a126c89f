# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning methods as frozen dataclasses: their options, checks and JSON form.

A new method is one dataclass here, registered in ``METHODS``, and one module class. ``attach``
finds the layers, freezes and replaces; the method says which class of layer it replaces, checks a
layer before anything is changed, and builds the module that takes its place.
"""

import dataclasses
import importlib
import re
from typing import Any, ClassVar

from torch import nn

from samfast.modules.cobot import CobotForward, CobotQkvLora, check_width, relation
from samfast.modules.conv_lora import (
    ConvLoraLinear,
    check_choice,
    check_depthwise,
    check_experts,
)
from samfast.modules.kronecker import KroneckerLinear, check_n
from samfast.modules.lora import LoraLinear
from samfast.modules.low_rank import check_alpha, check_bottleneck, check_dropout, check_rank
from samfast.modules.qkv_lora import QKV, QkvLora, checked_slices
from samfast.modules.task_lora import (
    TaskForward,
    TaskLoraLinear,
    check_orthogonality,
    check_ranks,
    check_scaling,
    check_tasks,
)


class Method:
    """What ``attach`` asks of a method.

    name: how files and the command line call it
    target: which layers, see ``attach``
    replaces: the class of the layers it takes the place of
    """

    name: ClassVar[str]
    replaces: ClassVar[type[nn.Module]] = nn.Linear
    target: str | tuple[str, ...]

    def check(self, layer: nn.Module) -> None:
        """Raise ValueError when this layer cannot be adapted; changes nothing."""

    def check_model(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        """Raise ValueError when these layers of the model cannot be adapted together."""

    def wrap(self, layer: nn.Module) -> nn.Module:
        """The adapted module that takes the place of one layer, sharing its Parameters."""
        raise NotImplementedError

    def build(self, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """The adapted modules of all layers by full name; override it to share tensors."""
        return {name: self.wrap(layer) for name, layer in layers.items()}

    def attached(self, model: nn.Module, adapted: dict[str, nn.Module]) -> None:
        """What is left to do once the adapted modules are in the model."""

    def same_update(self, other: "Method") -> bool:
        """Whether tensors of the other method mean the same here, wherever they are placed."""
        mine, theirs = ({**method.config(), "target": None} for method in (self, other))
        return mine == theirs

    def config(self) -> dict[str, Any]:
        """Name and options as JSON values."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        return {"name": self.name, **plain}


@dataclasses.dataclass(frozen=True)
class Lora(Method):
    """LoRA (Hu et al. 2021) on linear layers.

    rank: rank of the update
    alpha: the update is scaled by alpha / rank; None means alpha = rank
    dropout: on the adapter's input, in training
    target: a layer's leaf name ("qkv", "proj", "lin1", "lin2"), a regular expression over full
        names, or a tuple of those
    slices: of ("q", "k", "v"), an own unscaled update on each of these parts of a packed qkv layer
        instead of one on the whole layer
    """

    name: ClassVar[str] = "lora"

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    target: str | tuple[str, ...] = "qkv"
    slices: tuple[str, ...] | None = None

    def __post_init__(self):
        check_rank(self.rank)
        check_alpha(self.alpha)
        check_dropout(self.dropout)
        object.__setattr__(self, "target", _checked_target(self.target))
        if self.slices is None:
            return
        object.__setattr__(self, "slices", checked_slices(self.slices))
        if self.target != "qkv":
            raise ValueError(f"slices are parts of qkv layers, but target is {self.target!r}")
        if self.alpha is not None:
            raise ValueError(f"sliced LoRA is unscaled, so alpha must be None, not {self.alpha!r}")

    def same_update(self, other: Method) -> bool:
        if type(other) is not Lora:
            return False
        scale, theirs = ((m.alpha or m.rank) / m.rank for m in (self, other))
        return (self.rank, self.slices, scale) == (other.rank, other.slices, theirs)

    def check(self, layer: nn.Linear) -> None:
        kind = LoraLinear if self.slices is None else QkvLora
        kind.check_sizes(layer.in_features, layer.out_features, self.rank)

    def wrap(self, layer: nn.Linear) -> nn.Module:
        if self.slices is None:
            return LoraLinear.from_linear(layer, self.rank, self.alpha, self.dropout)
        return QkvLora.from_linear(layer, self.rank, self.slices, self.dropout)


@dataclasses.dataclass(frozen=True)
class ConvLora(Method):
    """Conv-LoRA (ICLR 2024) on linear layers that see maps of tokens.

    rank, alpha: the update is scaled by alpha / rank; alpha None means alpha = rank
    experts: number of convolutions, the i-th on the map enlarged i times
    depthwise: each channel of the bottleneck has a convolution of its own
    dropout: on the adapter's input, in training
    target: as in ``Lora``
    top_k: experts that a map passes   formula: "code", what the authors run, or "paper", what
        their article writes; other choices than 1 and "code" are slow
    """

    name: ClassVar[str] = "conv-lora"

    rank: int = 3
    alpha: float | None = 32
    experts: int = 8
    depthwise: bool = False
    dropout: float = 0.0
    target: str | tuple[str, ...] = "qkv"
    top_k: int = 1
    formula: str = "code"

    def __post_init__(self):
        check_rank(self.rank)
        check_alpha(self.alpha)
        check_experts(self.experts)
        check_depthwise(self.depthwise)
        check_dropout(self.dropout)
        check_choice(self.top_k, self.experts, self.formula)
        object.__setattr__(self, "target", _checked_target(self.target))

    def same_update(self, other: Method) -> bool:
        if type(other) is not ConvLora:
            return False
        mine, theirs = (
            (m.rank, (m.alpha or m.rank) / m.rank, m.experts, m.depthwise, m.top_k, m.formula)
            for m in (self, other)
        )
        return mine == theirs

    def check(self, layer: nn.Linear) -> None:
        ConvLoraLinear.check_sizes(layer.in_features, layer.out_features, self.rank)

    def wrap(self, layer: nn.Linear) -> nn.Module:
        return ConvLoraLinear.from_linear(
            layer,
            self.rank,
            self.alpha,
            self.experts,
            depthwise=self.depthwise,
            dropout=self.dropout,
            top_k=self.top_k,
            formula=self.formula,
        )


@dataclasses.dataclass(frozen=True)
class CobotLora(Method):
    """SAM-COBOT (CVPR 2024) on LoRA of q and v: coefficients that all blocks share, and heads.

    rank: of the updates, which are unscaled; four must divide it
    zero_start: start at the frozen model, with B zeros; as published it starts off it
    target: as in ``Lora``, of packed qkv layers
    """

    name: ClassVar[str] = "cobot-lora"

    rank: int = 4
    zero_start: bool = False
    target: str | tuple[str, ...] = "qkv"

    def __post_init__(self):
        check_width("rank", self.rank)
        if not isinstance(self.zero_start, bool):
            raise ValueError(f"zero_start is {self.zero_start!r}; it must be True or False")
        object.__setattr__(self, "target", _checked_target(self.target))

    def same_update(self, other: Method) -> bool:
        return type(other) is CobotLora and self.rank == other.rank

    def check(self, layer: nn.Linear) -> None:
        if layer.out_features != 3 * layer.in_features:
            raise ValueError(
                f"a packed qkv layer has three outputs for each input, but this one has "
                f"{layer.out_features} for {layer.in_features}"
            )
        CobotQkvLora.check_sizes(layer.in_features, layer.out_features, self.rank)

    def build(self, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """In the order of the model, which numbers the slices: q and v of each layer."""
        weight = next(iter(layers.values())).weight
        shared = relation(self.rank, 2 * len(layers), weight)
        return {
            name: CobotQkvLora.from_linear(layer, self.rank, shared, index, self.zero_start)
            for index, (name, layer) in enumerate(layers.items())
        }

    def attached(self, model: nn.Module, adapted: dict[str, nn.Module]) -> None:
        CobotForward(list(adapted.values())).install(getattr(model, "image_encoder", model))


@dataclasses.dataclass(frozen=True)
class AdaptFormer(Method):
    """AdaptFormer (NeurIPS 2022) beside the MLPs of transformer blocks, segment_anything's.

    bottleneck: width of the branch
    dropout: on the bottleneck, in training
    cobot: the branches' coefficients are related across blocks as in SAM-COBOT (CVPR 2024)
    target: as in ``Lora``, of MLPs
    """

    name: ClassVar[str] = "adaptformer"

    bottleneck: int = 16
    dropout: float = 0.1
    cobot: bool = False
    target: str | tuple[str, ...] = "mlp"

    def __post_init__(self):
        check_bottleneck(self.bottleneck)
        check_dropout(self.dropout)
        if not isinstance(self.cobot, bool):
            raise ValueError(f"cobot is {self.cobot!r}; it must be True or False")
        if self.cobot:
            check_width("bottleneck", self.bottleneck)
        object.__setattr__(self, "target", _checked_target(self.target))

    @property
    def replaces(self) -> type[nn.Module]:
        """segment_anything's MLPBlock, which is imported when it is first asked for."""
        return importlib.import_module("samfast.modules.adapt_former").MLPBlock

    def same_update(self, other: Method) -> bool:
        if type(other) is not AdaptFormer:
            return False
        return (self.bottleneck, self.cobot) == (other.bottleneck, other.cobot)

    def check(self, layer: nn.Module) -> None:
        importlib.import_module("samfast.modules.adapt_former").AdaptFormerMlp.check_mlp(layer)

    def build(self, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """With ``cobot``, in the order of the model, which numbers the layers that share."""
        options = self.bottleneck, self.dropout
        if not self.cobot:
            kind = importlib.import_module("samfast.modules.adapt_former").AdaptFormerMlp
            return {name: kind.from_mlp(layer, *options) for name, layer in layers.items()}
        kind = importlib.import_module("samfast.modules.cobot_adapt_former").CobotAdaptFormerMlp
        weight = next(iter(layers.values())).lin1.weight
        shared = relation(self.bottleneck, len(layers), weight)
        return {
            name: kind.from_mlp(layer, *options, shared, index)
            for index, (name, layer) in enumerate(layers.items())
        }

    def attached(self, model: nn.Module, adapted: dict[str, nn.Module]) -> None:
        if self.cobot:
            CobotForward(list(adapted.values())).install(getattr(model, "image_encoder", model))


@dataclasses.dataclass(frozen=True)
class Kronecker(Method):
    """Sums of Kronecker products of low rank on linear layers (PHM, Compacter), from zero on.

    n: number of products, and side of their rules; it divides the layers' sizes
    rank: of the large factor of each product; the update is LoRA's of rank n · n · rank
    alpha: the update is scaled by alpha / rank; None means alpha = rank
    dropout: on the adapter's input, in training
    target: as in ``Lora``
    """

    name: ClassVar[str] = "kronecker"

    n: int = 4
    rank: int = 1
    alpha: float | None = None
    dropout: float = 0.0
    target: str | tuple[str, ...] = ("qkv", "proj")

    def __post_init__(self):
        check_n(self.n)
        check_rank(self.rank)
        check_alpha(self.alpha)
        check_dropout(self.dropout)
        object.__setattr__(self, "target", _checked_target(self.target))

    def same_update(self, other: Method) -> bool:
        if type(other) is not Kronecker:
            return False
        mine, theirs = ((m.n, m.rank, (m.alpha or m.rank) / m.rank) for m in (self, other))
        return mine == theirs

    def check(self, layer: nn.Linear) -> None:
        KroneckerLinear.check_sizes(layer.in_features, layer.out_features, self.n, self.rank)

    def wrap(self, layer: nn.Linear) -> nn.Module:
        return KroneckerLinear.from_linear(layer, self.n, self.rank, self.alpha, self.dropout)


@dataclasses.dataclass(frozen=True)
class TaLora(Method):
    """TA-LoRA: low-rank updates for several tasks, which share the factors of one Tucker tensor.

    tasks: how many, or their names   ranks: of the inputs, the outputs and the tasks
    scaling: of the update   dropout: on the adapter's input, in training
    enabled: which of ("q", "k", "v") get an update; of all three, layers of other kinds do too
    orthogonality: weight of the penalty in ``aux_loss``, 0 for none
    target: as in ``Lora``
    The authors' article gives no ranks, scaling and dropout; these are their later method's.
    """

    name: ClassVar[str] = "ta-lora"

    tasks: int | tuple[str, ...] = 2
    ranks: tuple[int, int, int] = (32, 32, 4)
    scaling: float = 0.5
    dropout: float = 0.1
    enabled: tuple[str, ...] = QKV
    orthogonality: float = 0.0
    target: str | tuple[str, ...] = "qkv"

    def __post_init__(self):
        if isinstance(self.tasks, (tuple, list)):
            _check_names(self.tasks)
            object.__setattr__(self, "tasks", tuple(self.tasks))
        else:
            check_tasks(self.tasks)
        check_ranks(self.ranks)
        object.__setattr__(self, "ranks", tuple(self.ranks))
        check_scaling(self.scaling)
        check_dropout(self.dropout)
        object.__setattr__(self, "enabled", checked_slices(self.enabled))
        check_orthogonality(self.orthogonality)
        object.__setattr__(self, "target", _checked_target(self.target))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks, () where they have numbers alone."""
        return self.tasks if isinstance(self.tasks, tuple) else ()

    @property
    def count(self) -> int:
        return len(self.tasks) if isinstance(self.tasks, tuple) else self.tasks

    def same_update(self, other: Method) -> bool:
        if type(other) is not TaLora:
            return False
        mine, theirs = ((m.count, m.names, m.ranks, m.scaling, m.enabled) for m in (self, other))
        return mine == theirs

    def check_model(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        """The tasks are those of a MultiTaskSam, and the layers in the encoder."""
        known = getattr(model, "tasks", None)
        if known is None:
            return
        names = tuple(task.name for task in known)
        if self.count != len(names) or (self.names and self.names != names):
            given = ", ".join(self.names) or f"{self.count} of them"
            raise ValueError(
                f"the tasks of ta-lora are {given}, but those of the model {', '.join(names)}; "
                "they must be the same, in the same order"
            )
        for name in layers:
            if not name.startswith("image_encoder."):
                raise ValueError(f"{name} is outside the image encoder, where no task is set")

    def check(self, layer: nn.Linear) -> None:
        sizes = layer.in_features, layer.out_features
        TaskLoraLinear.check_sizes(*sizes, self.count, self.ranks, self.enabled)

    def wrap(self, layer: nn.Linear) -> nn.Module:
        return TaskLoraLinear.from_linear(
            layer, self.count, self.ranks, self.scaling, self.dropout, self.enabled,
            self.orthogonality,
        )  # fmt: skip

    def attached(self, model: nn.Module, adapted: dict[str, nn.Module]) -> None:
        TaskForward(list(adapted.values())).install(getattr(model, "image_encoder", model))


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(name, str) or not name or name == "all":
            raise ValueError(f"tasks has {name!r}, which is no name of a task")
        if list(names).count(name) > 1:
            raise ValueError(f"tasks names {name!r} twice")
    if not names:
        raise ValueError("tasks is empty; it must name at least one")


@dataclasses.dataclass(frozen=True)
class DecoderOnly(Method):
    """No adapter at all: what ``attach`` is told to train is all that is trained."""

    name: ClassVar[str] = "decoder"
    target: ClassVar[tuple[str, ...]] = ()


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Lora, ConvLora, CobotLora, AdaptFormer, Kronecker, TaLora, DecoderOnly)
}


def method_from_config(config: Any) -> Method:
    """The method that ``Method.config`` describes; ValueError when it describes none."""
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise ValueError(f"{config!r} does not describe a method")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    options = {key: value for key, value in values.items() if key != "name"}
    kind = METHODS.get(config["name"])
    if kind is None:
        raise ValueError(f"unknown method {config['name']!r}; known are {', '.join(METHODS)}")
    unknown = sorted(set(options) - {f.name for f in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"method {kind.name!r} has no option {unknown[0]!r}")
    return kind(**options)


def _checked_target(target) -> str | tuple[str, ...]:
    entries = (target,) if isinstance(target, str) else target
    entries = tuple(entries) if isinstance(entries, list) else entries
    if not isinstance(entries, tuple) or not entries:
        raise ValueError(f"target is {target!r}; it must name at least one layer")
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise ValueError(f"target has {entry!r}, which is not a layer's name")
        try:
            re.compile(entry)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"target {entry!r} is neither a layer's name nor a regular expression: {error}"
            ) from None
    return target if isinstance(target, str) else entries
