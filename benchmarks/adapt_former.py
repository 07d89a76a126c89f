# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer's branch with a frozen MLP, compared with the frozen MLP."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.registry import Provider, Workload, forward_backward
from benchmarks.shapes import ENCODERS
from samfast.functional import adapt_former
from samfast.kernels.adapt_former import costs
from samfast.kernels.lora_linear import costs as linear_costs

BOTTLENECKS = (8, 16, 64)
EPS = 1e-5


def adapt_former_workloads(model, batch, rank, device, dtype, compiled=False) -> Iterator[Workload]:
    """The MLP of a block with each bottleneck, the branch in float32."""
    encoder = ENCODERS[model]
    for bottleneck in BOTTLENECKS:
        yield adapt_former_workload(
            batch * encoder.tokens, encoder.width, bottleneck, device, dtype, compiled
        )


def adapt_former_workload(tokens, width, bottleneck, device, dtype, compiled=False) -> Workload:
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=dtype, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    hidden, scale = 4 * width, width**-0.5
    lin1 = (draw(hidden, width, scale=scale), draw(hidden))
    lin2 = (draw(width, hidden, scale=scale / 2), draw(width))
    x, dy = draw(tokens, width).requires_grad_(), draw(tokens, width)
    single = {"dtype": torch.float32}
    side = [draw(width, **single), draw(width, **single)]
    side += [draw(bottleneck, width, scale=scale, **single), draw(bottleneck, **single)]
    side += [draw(width, bottleneck, scale=bottleneck**-0.5, **single), draw(width, **single)]
    leaves = [x, *(t.requires_grad_() for t in side)]

    def mlp(x, lin1=lin1, lin2=lin2):
        return F.linear(F.gelu(F.linear(x, *lin1)), *lin2)

    def ours(backend):
        return lambda: adapt_former(x, mlp(x), *side, eps=EPS, backend=backend)

    def literal(x, base, norm_weight, norm_bias, down, down_bias, up, up_bias):
        n = F.layer_norm(x.to(norm_weight.dtype), x.shape[1:], norm_weight, norm_bias, EPS)
        factors = (t.to(x.dtype) for t in (down, down_bias, up, up_bias))
        down, down_bias, up, up_bias = factors
        return base + F.linear(F.relu(F.linear(n.to(x.dtype), down, down_bias)), up, up_bias)

    def eager():
        return literal(x, mlp(x), *side)

    def exact():
        wide = [t.detach().double().requires_grad_() for t in leaves]
        frozen = [[t.double() for t in layer] for layer in (lin1, lin2)]
        provider = Provider(lambda: literal(wide[0], mlp(wide[0], *frozen), *wide[1:]), wide)
        return forward_backward(provider, dy.double())

    frozen = [
        *linear_costs.frozen(tokens, width, hidden, dtype.itemsize),
        *linear_costs.frozen(tokens, hidden, width, dtype.itemsize),
    ]
    design = [*frozen, *costs.stages(tokens, width, bottleneck, dtype.itemsize)]
    providers = {
        "frozen MLP": Provider(lambda: mlp(x), [x], frozen, checked=False),
        "samfast": Provider(ours("auto"), leaves, design),
        "samfast torch": Provider(ours("torch"), leaves),
        "eager AdaptFormer": Provider(eager, leaves),
    }
    if compiled:
        providers["eager AdaptFormer compiled"] = Provider(torch.compile(eager), leaves)
    names = ("norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias")
    return Workload(
        f"MLP {tokens}x{width} v{bottleneck}",
        ("y", "dx", *(f"d{name}" for name in names)),
        "frozen MLP",
        ("eager AdaptFormer",),
        providers,
        exact,
        dy,
        [*lin1, *lin2, *leaves],
    )
