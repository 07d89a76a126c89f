# SPDX-License-Identifier: Apache-2.0
"""What can be measured: operations, their shapes, who provides them and what they should cost.

All providers of a workload share inputs, weights and incoming gradient.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.shapes import ENCODERS, linears
from samfast.functional import conv_lora_linear, lora_linear
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import costs as experts_costs
from samfast.kernels.lora_linear import costs


@dataclasses.dataclass
class Provider:
    """forward() makes y, or y and a loss; leaves are what gradients are taken of, x first."""

    forward: Callable[[], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
    leaves: list[torch.Tensor]
    stages: list = dataclasses.field(default_factory=list)  # cost by design, where known
    checked: bool = True  # against float64; the baseline computes something else
    captured: bool = True  # as a CUDA graph too; False where it waits for the host


@dataclasses.dataclass
class Workload:
    """One shape of one operation; ratios are taken to the baseline, the budget from stock, of
    several the widest."""

    name: str
    results: tuple[str, ...]
    baseline: str
    stock: tuple[str, ...]
    providers: dict[str, Provider]
    exact: Callable[[], list[torch.Tensor]]
    dy: torch.Tensor
    known: list[torch.Tensor]  # inputs and parameters, not counted as saved
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    logits: int = 0  # bytes; where given, working memory is told beside it
    images: int = 0  # in a call; where given, their rate is told
    verified: "Workload | None" = None  # a smaller one of the same providers, to be checked instead

    def run(self, name: str) -> list[torch.Tensor]:
        """Forward and backward of one provider: y, its loss, and the gradients of its leaves."""
        return forward_backward(self.providers[name], self.dy)


def forward_backward(provider: Provider, dy: torch.Tensor) -> list[torch.Tensor]:
    made = provider.forward()
    outputs = made if isinstance(made, tuple) else (made,)
    incoming = [dy.to(outputs[0].dtype), *(torch.ones_like(loss) for loss in outputs[1:])]
    grads = torch.autograd.grad(outputs, provider.leaves, incoming, materialize_grads=True)
    return [*(t.detach() for t in outputs), *grads]


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
        ("eager LoRA",),
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


def conv_lora_workloads(model, batch, rank, device, dtype, compiled=False) -> Iterator[Workload]:
    """Conv-LoRA with eight experts on packed qkv: a block's windows, each expert in turn, and a
    global block's map, whose expert enlarges it eight times."""
    side, window = 64, 14
    windows = batch * (-(-side // window)) ** 2
    for layout, index in (
        (Windows.whole(windows, window, window), [n % 8 for n in range(windows)]),
        (Windows.whole(batch, side, side), [7] * batch),
    ):
        for depthwise in (False, True):
            yield conv_lora_workload(
                ENCODERS[model].width, layout, index, rank, depthwise, device, dtype
            )


def conv_lora_workload(width, windows, index, rank, depthwise, device, dtype) -> Workload:
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=dtype, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    single, scale, experts = torch.float32, width**-0.5, 8
    shape = (windows.samples, windows.height, windows.width)
    x = draw(*shape, width).requires_grad_()
    weight, bias = draw(3 * width, width, scale=scale), draw(3 * width)
    dy = draw(*shape, 3 * width)
    factors = [
        draw(rank, width, dtype=single, scale=scale),
        draw(3 * width, rank, dtype=single),
        draw(experts, rank, 1 if depthwise else rank, 3, 3, dtype=single, scale=0.3),
        draw(experts, rank, dtype=single),
        draw(rank, experts, dtype=single),
        draw(rank, experts, dtype=single),
    ]
    leaves = [x, *(t.requires_grad_() for t in factors)]
    noise = draw(windows.samples, experts, dtype=single)
    chosen = torch.tensor(index, device=device)
    ratios = tuple(range(1, experts + 1))

    def call(tensors, backend, dtype=None):
        x, *factors = tensors
        frozen = (t if dtype is None else t.to(dtype) for t in (weight, bias))
        return conv_lora_linear(
            x, *frozen, *factors, 32 / rank, ratios, windows=windows,
            noise=noise if dtype is None else noise.to(dtype), expert_index=chosen,
            backend=backend,
        )  # fmt: skip

    def exact():
        wide = [t.detach().double().requires_grad_() for t in leaves]
        provider = Provider(lambda: call(wide, "reference", torch.float64), wide)
        return forward_backward(provider, dy.double())

    sizes = (windows.tokens, width, 3 * width)
    frozen = costs.frozen(*sizes, dtype.itemsize)
    design = costs.stages(*sizes, rank, dtype.itemsize)
    design += experts_costs.stages(windows, index, ratios, rank, depthwise, dtype.itemsize)
    providers = {
        "frozen linear": Provider(lambda: F.linear(x, weight, bias), [x], frozen, checked=False),
        "literal Conv-LoRA": Provider(lambda: call(leaves, "reference"), leaves, captured=False),
        "samfast": Provider(lambda: call(leaves, "auto"), leaves, design),
        "samfast torch": Provider(lambda: call(leaves, "torch"), leaves),
    }
    kind = "depthwise" if depthwise else "full"
    return Workload(
        f"qkv {'x'.join(map(str, shape))}x{width}->{3 * width} r{rank} {kind}",
        ("y", "loss", "dx", "dlora_a", "dlora_b", "dweight", "dbias", "dw_gate", "dw_noise"),
        "frozen linear",
        ("literal Conv-LoRA",),
        providers,
        exact,
        dy,
        [weight, bias, noise, chosen, *leaves],
    )
