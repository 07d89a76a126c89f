# SPDX-License-Identifier: Apache-2.0
"""nn.Linear with trainable tensors added, sharing the weight of the layer it replaces."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from samfast.adapters.adapter import Adapter

Layer = TypeVar("Layer", bound="AdaptedLinear")


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a frozen nn.Linear that holds these tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer.eval()


class AdaptedLinear(Adapter, nn.Linear):
    """Linear layer with an adapter next to its weight.

    A subclass adds its tensors with ``add_adapter`` and fills them in ``reset_adapter``.
    """

    def add_adapter(self, **shapes: tuple[int, ...]) -> None:
        """Add one uninitialised parameter per name: float32 unless the weight is float64."""
        wide = self.weight.dtype == torch.float64
        dtype, device = torch.float64 if wide else torch.float32, self.weight.device
        for name, shape in shapes.items():
            fresh = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(fresh))

    @classmethod
    def _from_linear(cls: type[Layer], linear: nn.Linear, **options: Any) -> Layer:
        """Wrap the Parameters of ``linear`` in this class; allocate no other weight."""
        if type(linear) is not nn.Linear:
            raise TypeError(f"expected a plain nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        module = cls(
            linear.in_features,
            linear.out_features,
            **options,
            bias=linear.bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        module.weight, module.bias = weight, linear.bias
        module.add_adapter(**{name: p.shape for name, p in module.adapter_parameters()})
        module.reset_adapter()
        return module.train(linear.training)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.named_parameters():
            if name not in ("weight", "bias"):
                yield name, parameter

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "lora_A" in self._parameters:  # nn.Linear calls this before the adapter exists
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialise the adapter's parameters anew."""
        raise NotImplementedError
