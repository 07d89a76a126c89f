# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` asks of a method.

A method is a frozen dataclass of options, with their checks and their JSON form. It names the class
of layer that it replaces, checks a layer before anything changes, and builds the replacement. It
imports torch and its layers on use, so that its options can be read without them.
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

    what: names them   share: their default rate as a fraction of --lr; None for --lr itself
    """

    what: str
    share: float | None = None


class _LinearLayer:
    """nn.Linear, on the class as well, imported on first access."""

    def __get__(self, method: Any, owner: type) -> "type[nn.Module]":
        from torch import nn

        return nn.Linear


class Method:
    """What ``attach`` and training ask of a method.

    name: its name in files, and on the command line unless ``variants`` says otherwise
    target: which layers to adapt, see ``attach``
    replaces: the class of those layers
    recipe: training settings that apply if the user gives none
    checkpoint_lr: default learning rate when training starts from a checkpoint
    binary_head: True if training gives the mask decoder one mask token instead of four
    needs_tasks: True if it only works for several tasks and has a field ``tasks``
    lacks: for options of other methods, what to say instead of ``lacks_all``
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
        """Variants that the command line offers, by name; options not given keep these values."""
        return {cls.name: cls()}

    def summary(self) -> str:
        """The first line of the class's docstring, for the command line's help."""
        return (type(self).__doc__ or "").partition("\n")[0].rstrip(".")

    @property
    def relation(self) -> Relation | None:
        """The parameters that ``--relation-lr`` applies to, if any."""
        return None

    def options(self) -> tuple[Option, ...]:
        """The command-line options of this method, with its values as defaults."""
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
        """Build the method from the command line's values; tasks: the names of several tasks."""
        fields = {o.field: o.as_field(options[o.name]) for o in self.options() if o.field}
        if self.needs_tasks:
            fields["tasks"] = tasks
        return dataclasses.replace(self, **fields)

    def check_options(self, find_layers: "Callable[[Method], Mapping[str, Foreign]]") -> None:
        """Raise ValueError, with the options' names, for layers that the method cannot adapt.

        find_layers: returns the layers of the model that a method would adapt, each checked
        """

    def smallest_layer(self) -> "tuple[nn.Module, int] | None":
        """Return a small layer that fits these options, and its number of inputs, for a trial."""
        from torch import nn

        width = self.smallest_width
        return nn.Linear(width, 3 * width), width

    @property
    def smallest_width(self) -> int:
        """Inputs of ``smallest_layer``."""
        return max(16, getattr(self, "rank", 1))

    def check(self, layer: "Foreign") -> None:
        """Raise ValueError if this layer cannot be adapted; change nothing."""

    def check_model(self, model: "nn.Module", layers: "Mapping[str, Foreign]") -> None:
        """Raise ValueError if these layers of the model cannot be adapted together."""

    def wrap(self, layer: "Foreign") -> "Adapter":
        """Build the adapted module that replaces one layer and shares its Parameters."""
        raise NotImplementedError

    def build(self, layers: "Mapping[str, Foreign]") -> "Mapping[str, Adapter]":
        """Build the adapted modules of all layers, by full name; override it to share tensors."""
        return {name: self.wrap(layer) for name, layer in layers.items()}

    def attached(self, model: "nn.Module", adapted: "Mapping[str, Adapter]") -> None:
        """Finish, once the adapted modules are in the model."""

    def same_update(self, other: "Method") -> bool:
        """True if tensors of the other method mean the same here, wherever they are placed."""
        mine, theirs = ({**method.config(), "target": None} for method in (self, other))
        return mine == theirs

    def config(self) -> dict[str, Any]:
        """Return the name and options as JSON values."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        return {"name": self.name, **plain}
