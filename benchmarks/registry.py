# SPDX-License-Identifier: Apache-2.0
"""What can be measured: operations, their shapes and who provides them.

A provider is a function of no arguments that runs forward and backward and returns the tensors
named in RESULTS. All providers of a shape share inputs, weights and incoming gradient.
"""

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.shapes import linears
from samfast.functional import lora_linear
from samfast.integrations.torchvision import declare_missing_schemas

RESULTS = ("y", "dx", "dlora_a", "dlora_b")


@dataclasses.dataclass
class Workload:
    """One shape of one operation. providers: name -> call; baseline: what ratios are taken to."""

    name: str
    flops: int
    baseline: str
    stock: str  # the provider whose error sets the budget of the others
    providers: dict[str, Callable]
    exact: Callable  # float64 results
    skipped: dict[str, str]


def lora_linear_workloads(model, batch, rank, device, dtype):
    """LoRA of the given rank on each linear layer of a windowed block, adapters in float32."""
    for shape in linears(model, batch):
        yield _lora_linear(shape, rank, torch.device(device), dtype)


def _lora_linear(shape, rank, device, dtype, scaling=2.0):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=dtype, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    x = draw(shape.tokens, shape.features).requires_grad_()
    weight = draw(shape.out, shape.features, scale=shape.features**-0.5)
    bias, dy = draw(shape.out), draw(shape.tokens, shape.out)
    scale = shape.features**-0.5
    a = draw(rank, shape.features, dtype=torch.float32, scale=scale).requires_grad_()
    b = draw(shape.out, rank, dtype=torch.float32, scale=scale).requires_grad_()

    def gradients(y, leaves):
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    def ours(backend):
        return lambda: gradients(
            lora_linear(x, weight, bias, a, b, scaling, backend=backend), [x, a, b]
        )

    def eager():
        update = F.linear(F.linear(x, a.to(dtype)), b.to(dtype))
        return gradients(F.linear(x, weight, bias) + scaling * update, [x, a, b])

    def exact():
        leaves = [t.detach().double().requires_grad_() for t in (x, a, b)]
        y = lora_linear(
            leaves[0], weight.double(), bias.double(), *leaves[1:], scaling, backend="reference"
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]

    providers = {
        "frozen linear": lambda: gradients(F.linear(x, weight, bias), [x]),
        "samfast": ours("auto"),
        "samfast torch": ours("torch"),
        "eager LoRA": eager,
    }
    skipped = {}
    if importlib.util.find_spec("peft") is None:
        skipped["PEFT"] = "peft is not installed"
    else:
        layer = _peft_layer(weight, bias, a, b, scaling)
        factors = [p for p in layer.parameters() if p.requires_grad]
        providers["PEFT"] = lambda: gradients(layer(x), [x, *factors])
    return Workload(
        f"{shape.layer} {shape.tokens}x{shape.features}->{shape.out} r{rank}",
        shape.flops,
        "frozen linear",
        "eager LoRA",
        providers,
        exact,
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
