# SPDX-License-Identifier: Apache-2.0
"""What every adapted module has in common, and how a model remembers what was attached to it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from samfast.adapters.latest_loss import LatestLoss

    _Mixin = nn.Module
else:
    _Mixin = object


class Adapter(_Mixin):
    """Mixin of every module that adds trainable tensors to a module it replaces.

    unmergeable: why there is no ``merge``, of a module that has none
    token_wise: it treats every token alone, and gives its bias for a token of zeros
    window_wise: it has ``forward_windows``, which sees windows of images without cutting them out
    """

    unmergeable = "whose update depends on its input"
    token_wise = False
    window_wise = False

    def __init_subclass__(cls, **options: Any) -> None:
        """A subclass may run another way, so each class says these two for itself."""
        super().__init_subclass__(**options)
        for word in ("token_wise", "window_wise"):
            setattr(cls, word, vars(cls).get(word, False))

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name inside this module, parameter) of the tensors that the adapter adds."""
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """A module of torch's own operators that computes the same in evaluation, for export.

        Raises ValueError with the rest of a sentence that begins with the layer.
        """
        raise ValueError(f"is a {type(self).__name__}, for which there is no export form")

    def adapter_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in this module's state dict, tensor) of all that the adapter adds there."""
        return self.adapter_parameters()

    def state_problem(self, state: Mapping[str, torch.Tensor]) -> str | None:
        """Why these tensors, by their names in the state dict, mean something else here."""
        return None

    def biases(self) -> Iterator[nn.Parameter]:
        """The adapter's parameters that are biases whatever their number of dimensions."""
        return iter(())

    def relation_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the adapter's parameters for which the method has a learning rate of its own."""
        return iter(())

    def latest_loss(self) -> "LatestLoss | None":
        """Holder of this layer's own term of the loss, None for a method that has none."""
        return None

    @classmethod
    def joint_loss(cls, layers: Sequence[Any]) -> torch.Tensor | None:
        """What all layers of this class in a model add to the loss by their parameters alone."""
        return None

    @property
    def merged(self) -> bool:
        """Whether the adapter is folded into the weight at the moment."""
        return False

    def backends(self) -> dict[str, str]:
        """What runs each of this module's operations here, by the operation's name."""
        return {}


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapted module of the model by its full name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}


def adapter_parameter_names(model: nn.Module) -> set[str]:
    """Full names of every tensor that adapters added."""
    return {
        f"{layer}.{name}" if layer else name
        for layer, module in adapters(model).items()
        for name, _ in module.adapter_parameters()
    }


def adapter_state(adapted: Mapping[str, Adapter]) -> dict[str, torch.Tensor]:
    """What adapters add to the model's state dict, by full name, shared Parameters once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for layer, module in adapted.items():
        for name, value in module.adapter_state():
            if id(value) not in seen:
                found[f"{layer}.{name}" if layer else name] = value
            if isinstance(value, nn.Parameter):
                seen.add(id(value))
    return found
