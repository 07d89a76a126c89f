# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` asks of a method.

A method is a frozen dataclass: its options, their checks and their JSON form. It says which class
of layer it replaces, checks a layer before anything is changed, and builds the module that takes
its place. It imports torch and its layers on use, so that its options can be read without them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from samfast.adapters.options import Option, options_of

if TYPE_CHECKING:
    from torch import nn

    from samfast.adapters.adapter import Adapter
    from samfast.adapters.foreign import Foreign


@dataclasses.dataclass(frozen=True)
class Relation:
    """Parameters that relate blocks or tasks, and may have a learning rate of their own.

    what: which they are   share: their rate as a share of all others'; None for the same
    """

    what: str
    share: float | None = None


class _LinearLayer:
    """nn.Linear, of the class too, imported when it is first asked for."""

    def __get__(self, method: Any, owner: type) -> "type[nn.Module]":
        from torch import nn

        return nn.Linear


class Method:
    """What ``attach`` and training ask of a method.

    name: how files call it, and the command line unless ``variants`` says more
    target: which layers, see ``attach``
    replaces: the class of the layers it takes the place of
    recipe: what training takes where the settings leave it open
    checkpoint_lr: likewise the learning rate, from a checkpoint
    binary_head: whether the mask decoder gets one mask token in place of four for training
    needs_tasks: whether it is for several tasks only, and has a field ``tasks``
    lacks: by option of another method, what to say of this one in place of ``lacks_all``
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    name: ClassVar[str]
    target: str | tuple[str, ...]
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"schedule": "cosine", "loss": "bce-dice"}
    )
    checkpoint_lr: ClassVar[float] = 2e-4
    binary_head: ClassVar[bool] = False
    needs_tasks: ClassVar[bool] = False
    lacks: ClassVar[Mapping[str, str]] = MappingProxyType({})
    lacks_all: ClassVar[str] = "has none"
    replaces = _LinearLayer()

    @classmethod
    def variants(cls) -> "dict[str, Method]":
        """What the command line offers, by name; options that are not given stay as here."""
        return {cls.name: cls()}

    def summary(self) -> str:
        """A line for the command line's help: the first one of the class."""
        return (type(self).__doc__ or "").partition("\n")[0].rstrip(".")

    @property
    def relation(self) -> Relation | None:
        """The parameters that ``--relation-lr`` is for, if there are any."""
        return None

    def options(self) -> tuple[Option, ...]:
        """The options that the command line gives this method, with its values as defaults."""
        relation = self.relation
        if relation is None:
            return options_of(self)
        share = "" if relation.share is None else f" / {1 / relation.share:g}"
        rate = Option(
            help=f"Peak learning rate of {relation.what}",
            name="relation_lr",
            type=float,
            hint=f"default: --lr{share}",
        )
        return (*options_of(self), rate)

    def with_options(self, options: Mapping[str, Any], tasks: tuple[str, ...] = ()) -> "Method":
        """The method with the command line's values; tasks: the names of several tasks."""
        fields = {o.field: o.as_field(options[o.name]) for o in self.options() if o.field}
        if self.needs_tasks:
            fields["tasks"] = tasks
        return dataclasses.replace(self, **fields)

    def check_options(self, find_layers: "Callable[[Method], Mapping[str, Foreign]]") -> None:
        """Raise ValueError, by the options' names, for layers that the method cannot adapt.

        find_layers: the layers of the model that a method would adapt, each checked
        """

    def smallest_layer(self) -> "tuple[nn.Module, int] | None":
        """A small layer that these options fit, and its number of inputs, to try them out."""
        from torch import nn

        width = self.smallest_width
        return nn.Linear(width, 3 * width), width

    @property
    def smallest_width(self) -> int:
        """Inputs of ``smallest_layer``."""
        return max(16, getattr(self, "rank", 1))

    def check(self, layer: "Foreign") -> None:
        """Raise ValueError when this layer cannot be adapted; changes nothing."""

    def check_model(self, model: "nn.Module", layers: "Mapping[str, Foreign]") -> None:
        """Raise ValueError when these layers of the model cannot be adapted together."""

    def wrap(self, layer: "Foreign") -> "Adapter":
        """The adapted module that takes the place of one layer, sharing its Parameters."""
        raise NotImplementedError

    def build(self, layers: "Mapping[str, Foreign]") -> "Mapping[str, Adapter]":
        """The adapted modules of all layers by full name; override it to share tensors."""
        return {name: self.wrap(layer) for name, layer in layers.items()}

    def attached(self, model: "nn.Module", adapted: "Mapping[str, Adapter]") -> None:
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
