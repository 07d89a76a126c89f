# SPDX-License-Identifier: Apache-2.0
"""What can be measured: operations, their shapes, who provides them and what they should cost.

All providers of a workload share inputs, weights and incoming gradient.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.shapes import linears
from samfast.functional import lora_linear
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.kernels.lora_linear import costs


@dataclasses.dataclass
class Provider:
    """forward() makes y; leaves are what gradients are taken of, x first."""

    forward: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    stages: list = dataclasses.field(default_factory=list)  # cost by design, where known
    checked: bool = True  # against float64; the baseline computes something else


@dataclasses.dataclass
class Workload:
    """One shape of one operation; ratios are taken to the baseline, the budget from stock."""

    name: str
    results: tuple[str, ...]
    baseline: str
    stock: str
    providers: dict[str, Provider]
    exact: Callable[[], list[torch.Tensor]]
    dy: torch.Tensor
    known: list[torch.Tensor]  # inputs and parameters, not counted as saved
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def run(self, name: str) -> list[torch.Tensor]:
        """Forward and backward of one provider: y and the gradients of its leaves."""
        provider = self.providers[name]
        y = provider.forward()
        return [y.detach(), *torch.autograd.grad(y, provider.leaves, self.dy)]


def lora_linear_workloads(model, batch, rank, device, dtype, compiled=False) -> Iterator[Workload]:
    """LoRA of the given rank on each linear layer of a windowed block, adapters in float32."""
    for shape in linears(model, batch):
        yield lora_linear_workload(shape, rank, device, dtype, compiled)


def lora_linear_workload(shape, rank, device, dtype, compiled=False, scaling=2.0) -> Workload:
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=dtype, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    scale = shape.features**-0.5
    x = draw(shape.tokens, shape.features).requires_grad_()
    weight, bias = draw(shape.out, shape.features, scale=scale), draw(shape.out)
    dy = draw(shape.tokens, shape.out)
    a = draw(rank, shape.features, dtype=torch.float32, scale=scale).requires_grad_()
    b = draw(shape.out, rank, dtype=torch.float32, scale=scale).requires_grad_()
    sizes = (shape.tokens, shape.features, shape.out)

    def ours(backend):
        return lambda: lora_linear(x, weight, bias, a, b, scaling, backend=backend)

    def eager():
        update = F.linear(F.linear(x, a.to(dtype)), b.to(dtype))
        return F.linear(x, weight, bias) + scaling * update

    def exact():
        leaves = [t.detach().double().requires_grad_() for t in (x, a, b)]
        y = lora_linear(
            leaves[0], weight.double(), bias.double(), *leaves[1:], scaling, backend="reference"
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]

    frozen = costs.frozen(*sizes, dtype.itemsize)
    design = costs.stages(*sizes, rank, dtype.itemsize)
    providers = {
        "frozen linear": Provider(lambda: F.linear(x, weight, bias), [x], frozen, checked=False),
        "samfast": Provider(ours("auto"), [x, a, b], design),
        "samfast torch": Provider(ours("torch"), [x, a, b]),
        "eager LoRA": Provider(eager, [x, a, b]),
    }
    known, skipped = [x, weight, bias, a, b], {}
    if importlib.util.find_spec("peft") is None:
        skipped["PEFT"] = "peft is not installed"
    else:
        layer = _peft_layer(weight, bias, a, b, scaling)
        factors = [p for p in layer.parameters() if p.requires_grad]
        known += [*layer.parameters()]
        providers["PEFT"] = Provider(lambda: layer(x), [x, *factors])
    if compiled:
        for name in ("eager LoRA", "PEFT"):
            if (provider := providers.get(name)) is not None:
                call = torch.compile(provider.forward)
                providers[f"{name} compiled"] = Provider(call, provider.leaves)
    return Workload(
        f"{shape.layer} {shape.tokens}x{shape.features}->{shape.out} r{rank}",
        ("y", "dx", "dlora_a", "dlora_b"),
        "frozen linear",
        "eager LoRA",
        providers,
        exact,
        dy,
        known,
        skipped,
    )


def _peft_layer(weight, bias, a, b, scaling):
    """PEFT's own LoRA layer over the same numbers."""
    declare_missing_schemas()
    import peft

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(*reversed(weight.shape), device="meta")
            self.layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.layer.bias = torch.nn.Parameter(bias, requires_grad=False)

    rank = a.shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["layer"])
    layer = peft.get_peft_model(Holder(), config).base_model.model.layer
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    return layer


OPERATIONS = {"lora_linear": lora_linear_workloads}
