# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT compared with what it extends: LoRA on q and v, and AdaptFormer."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.registry import Provider, Workload, forward_backward
from benchmarks.shapes import ENCODERS
from samfast.functional import adapt_former, cobot_fold, lora_linear
from samfast.kernels.cobot_fold.reference import quaternion

BOTTLENECK = 16
MLPS = 2  # of a model's, which are alike


def cobot_workloads(model, batch, rank, device, dtype, compiled=False) -> Iterator[Workload]:
    """The packed qkv layers of a whole encoder, and a few MLPs, each with one fold for all."""
    encoder = ENCODERS[model]
    tokens, width = batch * encoder.tokens, encoder.width
    yield qkv_workload(tokens, width, encoder.depth, rank, device, dtype)
    yield mlp_workload(tokens, width, MLPS, BOTTLENECK, device, dtype)


class Draw:
    """Normal numbers from one seed."""

    def __init__(self, device, dtype):
        self.generator = torch.Generator().manual_seed(0)
        self.device, self.dtype = device, dtype

    def __call__(self, *size, dtype=None, scale=1.0):
        drawn = scale * torch.randn(*size, generator=self.generator)
        return drawn.to(self.device, dtype or self.dtype)

    def trained(self, *size, scale=1.0):
        return self(*size, dtype=torch.float32, scale=scale).requires_grad_()


def doubled(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def qkv_workload(tokens, width, layers, rank, device, dtype) -> Workload:
    draw, scale = Draw(device, dtype), width**-0.5
    slices = 2 * layers
    ranges = ((0, width), (2 * width, 3 * width))
    weight, bias = draw(3 * width, width, scale=scale), draw(3 * width)
    dy = draw(tokens, 3 * width)
    x = draw(tokens, width).requires_grad_()
    c, p = draw.trained(1, rank, slices), draw.trained(slices, slices, scale=0.3)
    each = [
        [
            draw.trained(2 * rank, width, scale=scale),
            draw.trained(2 * width, rank),
            draw.trained(2 * rank),
            draw.trained(2, 4, rank // 4, rank // 4),
        ]
        for _ in range(layers)
    ]
    low_rank = [t for layer in each for t in layer[:2]]
    leaves = [x, c, p, *(t for layer in each for t in layer)]

    def lora():
        return tuple(lora_linear(x, weight, bias, a, b, 1.0, slices=ranges) for a, b, _, _ in each)

    def ours(backend):
        def call():
            _, bs, gammas, heads = zip(*each, strict=True)
            folded, _ = cobot_fold(c, p, gammas, heads, bs, backend=backend)
            return tuple(
                lora_linear(x, weight, bias, layer[0], b, 1.0, slices=ranges, backend=backend)
                for layer, b in zip(each, folded, strict=True)
            )

        return call

    def literal(tensors, weight, bias):
        x, c, p, *rest = tensors
        dtype = x.dtype
        coefficients = (c[0] @ p).t()
        made = []
        for i in range(layers):
            a, b, gamma, heads = rest[4 * i : 4 * i + 4]
            updates = []
            for s in range(2):
                lam = (coefficients[2 * i + s] + gamma.chunk(2)[s]).to(dtype)
                h = lam * F.linear(x, a.chunk(2)[s].to(dtype))
                h = h @ quaternion(heads[s]).to(dtype)
                updates.append(F.linear(h, b.chunk(2)[s].to(dtype)))
            zeros = torch.zeros_like(updates[0])
            made.append(F.linear(x, weight, bias) + torch.cat([updates[0], zeros, updates[1]], 1))
        return tuple(made)

    def exact():
        wide = doubled(leaves)
        provider = Provider(lambda: literal(wide, weight.double(), bias.double()), wide)
        return forward_backward(provider, dy.double())

    def frozen():
        return tuple(F.linear(x, weight, bias) for _ in range(layers))

    providers = {
        "LoRA": Provider(lora, [x, *low_rank], checked=False),
        "frozen linear": Provider(frozen, [x], checked=False),
        "literal COBOT": Provider(lambda: literal(leaves, weight, bias), leaves),
        "samfast": Provider(ours("auto"), leaves),
        "samfast torch": Provider(ours("torch"), leaves),
    }
    names = ("dlora_a", "dlora_b", "dgamma", "dheads")
    return Workload(
        f"{layers} qkv of {tokens}x{width}, r{rank} on q and v",
        (
            *(f"y{i}" for i in range(layers)), "dx", "dc", "dp",
            *(f"{name}{i}" for i in range(layers) for name in names),
        ),
        "LoRA",
        ("literal COBOT",),
        providers,
        exact,
        dy,
        [weight, bias, *leaves],
    )  # fmt: skip


def mlp_workload(tokens, width, layers, bottleneck, device, dtype) -> Workload:
    draw, scale = Draw(device, dtype), width**-0.5
    lin1 = draw(4 * width, width, scale=scale), draw(4 * width)
    lin2 = draw(width, 4 * width, scale=scale / 2), draw(width)
    dy = draw(tokens, width)
    x = draw(tokens, width).requires_grad_()
    c = draw.trained(1, bottleneck, layers)
    p = draw.trained(layers, layers, scale=0.3)
    quarter = bottleneck // 4
    each = [
        [
            draw.trained(width),
            draw.trained(width),
            draw.trained(bottleneck, width, scale=scale),
            draw.trained(bottleneck),
            draw.trained(width, bottleneck),
            draw.trained(width),
            draw.trained(bottleneck),
            draw.trained(1, 4, quarter, quarter),
        ]
        for _ in range(layers)
    ]
    plain = [t for layer in each for t in layer[:6]]
    leaves = [x, c, p, *(t for layer in each for t in layer)]

    def mlp(x, lin1=lin1, lin2=lin2):
        return F.linear(F.gelu(F.linear(x, *lin1)), *lin2)

    def adapted(backend="auto"):
        return tuple(adapt_former(x, mlp(x), *layer[:6], backend=backend) for layer in each)

    def ours(backend):
        def call():
            _, _, downs, biases, _, _, gammas, heads = zip(*each, strict=True)
            folded = cobot_fold(c, p, gammas, heads, downs, biases, down=True, backend=backend)
            return tuple(
                adapt_former(x, mlp(x), *layer[:2], down, bias, *layer[4:6], backend=backend)
                for layer, down, bias in zip(each, *folded, strict=True)
            )

        return call

    def literal(tensors, lin1, lin2):
        x, c, p, *rest = tensors
        coefficients, made, dtype = (c[0] @ p).t(), [], x.dtype
        for i in range(layers):
            ln, shift, down, below, up, above, gamma, heads = rest[8 * i : 8 * i + 8]
            n = F.layer_norm(x.to(ln.dtype), (width,), ln, shift, 1e-5)
            h = (coefficients[i] + gamma) * F.linear(n, down, below)
            z = F.relu(h @ quaternion(heads[0]))
            made.append(mlp(x, lin1, lin2) + F.linear(z, up, above).to(dtype))
        return tuple(made)

    def exact():
        wide = doubled(leaves)
        weights = [[t.double() for t in linear] for linear in (lin1, lin2)]
        provider = Provider(lambda: literal(wide, *weights), wide)
        return forward_backward(provider, dy.double())

    providers = {
        "AdaptFormer": Provider(adapted, [x, *plain], checked=False),
        "frozen MLP": Provider(lambda: tuple(mlp(x) for _ in each), [x], checked=False),
        "literal COBOT": Provider(lambda: literal(leaves, lin1, lin2), leaves),
        "samfast": Provider(ours("auto"), leaves),
        "samfast torch": Provider(ours("torch"), leaves),
    }
    names = ("dnorm", "dshift", "ddown", "dbelow", "dup", "dabove", "dgamma", "dheads")
    return Workload(
        f"{layers} MLPs of {tokens}x{width}, bottleneck {bottleneck}",
        (
            *(f"y{i}" for i in range(layers)), "dx", "dc", "dp",
            *(f"{name}{i}" for i in range(layers) for name in names),
        ),
        "AdaptFormer",
        ("literal COBOT",),
        providers,
        exact,
        dy,
        [*lin1, *lin2, *leaves],
    )  # fmt: skip
