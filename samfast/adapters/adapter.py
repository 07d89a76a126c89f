# SPDX-License-Identifier: Apache-2.0
"""The base class of all adapted modules, and functions that find them in a model."""

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

    unmergeable: why the module cannot be merged; the end of a sentence that starts with its name
    token_wise: True if each token is processed on its own and a token of zeros gives the bias
    window_wise: True if ``forward_windows`` reads the windows of an image without copying them
    """

    unmergeable = "whose update depends on its input"
    token_wise = False
    window_wise = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Reset both flags: a subclass may run differently, so each class sets its own."""
        super().__init_subclass__(**options)
        for word in ("token_wise", "window_wise"):
            setattr(cls, word, vars(cls).get(word, False))

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in this module, parameter) for each tensor that the adapter adds."""
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """Build a module of torch operators that computes the same in eval mode, for export.

        Raises ValueError with the end of a sentence that starts with the layer's name.
        """
        raise ValueError(f"is a {type(self).__name__}, which has no export form")

    def adapter_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name in the state dict, tensor) for each entry that the adapter adds."""
        return self.adapter_parameters()

    def state_problem(self, state: Mapping[str, torch.Tensor]) -> str | None:
        """Say why these state-dict entries would mean something else here; None if they fit."""
        return None

    def biases(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters that count as biases, whatever their shape."""
        return iter(())

    def relation_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters that may have a learning rate of their own."""
        return iter(())

    def latest_loss(self) -> "LatestLoss | None":
        """Return the holder of this layer's loss term; None if the method has no such term."""
        return None

    @classmethod
    def joint_loss(cls, layers: Sequence[Any]) -> torch.Tensor | None:
        """Return the loss term that depends only on the parameters of all these layers."""
        return None

    @property
    def merged(self) -> bool:
        """True while the adapter is folded into the weight."""
        return False

    def backends(self) -> dict[str, str]:
        """Map the name of each operation to the backend that runs it here."""
        return {}


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Map full names to the adapted modules of the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}


def adapter_parameter_names(model: nn.Module) -> set[str]:
    """Return the full names of all tensors that adapters added."""
    return {
        f"{layer}.{name}" if layer else name
        for layer, module in adapters(model).items()
        for name, _ in module.adapter_parameters()
    }


def adapter_state(adapted: Mapping[str, Adapter]) -> dict[str, torch.Tensor]:
    """Map full names to what adapters add to the state dict; list shared Parameters once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for layer, module in adapted.items():
        for name, value in module.adapter_state():
            if id(value) not in seen:
                found[f"{layer}.{name}" if layer else name] = value
            if isinstance(value, nn.Parameter):
                seen.add(id(value))
    return found
