# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` asks of a method.

A method is a frozen dataclass: its options, their checks and their JSON form. It says which class
of layer it replaces, checks a layer before anything is changed, and builds the module that takes
its place. It imports torch and its layers on use, so that its options can be read without them.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import nn


class Method:
    """What ``attach`` asks of a method.

    name: how files and the command line call it
    target: which layers, see ``attach``
    replaces: the class of the layers it takes the place of
    """

    name: ClassVar[str]
    target: str | tuple[str, ...]

    @property
    def replaces(self) -> "type[nn.Module]":
        from torch import nn

        return nn.Linear

    def check(self, layer: "nn.Module") -> None:
        """Raise ValueError when this layer cannot be adapted; changes nothing."""

    def check_model(self, model: "nn.Module", layers: "dict[str, nn.Module]") -> None:
        """Raise ValueError when these layers of the model cannot be adapted together."""

    def wrap(self, layer: "nn.Module") -> "nn.Module":
        """The adapted module that takes the place of one layer, sharing its Parameters."""
        raise NotImplementedError

    def build(self, layers: "dict[str, nn.Module]") -> "dict[str, nn.Module]":
        """The adapted modules of all layers by full name; override it to share tensors."""
        return {name: self.wrap(layer) for name, layer in layers.items()}

    def attached(self, model: "nn.Module", adapted: "dict[str, nn.Module]") -> None:
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
