# SPDX-License-Identifier: Apache-2.0
"""Sums of Kronecker products: a trainable layer compared with nn.Linear, an adapter compared with
LoRA."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.registry import Provider, Workload, forward_backward
from benchmarks.shapes import ENCODERS, linears
from samfast.functional import hypercomplex_linear, lora_linear
from samfast.kernels.hypercomplex import costs, kronecker_factors
from samfast.kernels.lora_linear import costs as lora_costs


def hypercomplex_workloads(model, batch, rank, device, dtype, compiled=False) -> Iterator[Workload]:
    """With n = rank: PHM in place of lin1, and on packed qkv an adapter of as many products, each
    of rank one."""
    encoder = ENCODERS[model]
    tokens, width = batch * encoder.tokens, encoder.width
    yield phm_workload(tokens, width, 4 * width, rank, device, dtype, compiled)
    yield kronecker_workload(linears(model, batch)[0], rank, device, dtype)


class _Draw:
    def __init__(self, device, dtype):
        self.generator = torch.Generator().manual_seed(0)
        self.device, self.dtype = device, dtype

    def __call__(self, *size, dtype=None, scale=1.0):
        values = scale * torch.randn(*size, generator=self.generator)
        return values.to(self.device, dtype or self.dtype)


def kron_sum(rules, weights):
    return sum(torch.kron(a, s) for a, s in zip(rules, weights, strict=True))


def phm_workload(tokens, width, out, n, device, dtype, compiled=False) -> Workload:
    """All trained, parameters float32; the linear layer's in x's dtype, as nobody trains it."""
    draw, single = _Draw(device, dtype), torch.float32
    x, dy = draw(tokens, width).requires_grad_(), draw(tokens, out)
    rules = draw(n, n, n, dtype=single, scale=n**-0.5).requires_grad_()
    weights = draw(n, out // n, width // n, dtype=single, scale=width**-0.5).requires_grad_()
    bias = draw(out, dtype=single).requires_grad_()
    weight = draw(out, width, scale=width**-0.5).requires_grad_()
    own = bias.detach().to(dtype).requires_grad_()
    leaves = [x, rules, weights, bias]

    def literal(x=x, rules=rules, weights=weights, bias=bias):
        return F.linear(x, kron_sum(rules, weights).to(x.dtype), bias.to(x.dtype))

    def ours(backend):
        return lambda: hypercomplex_linear(x, rules, weights, bias, backend=backend)

    def exact():
        wide = [t.detach().double().requires_grad_() for t in leaves]
        return forward_backward(Provider(lambda: literal(*wide), wide), dy.double())

    sizes = tokens, width, out
    providers = {
        "nn.Linear": Provider(
            lambda: F.linear(x, weight, own),
            [x, weight, own],
            costs.linear(*sizes, dtype.itemsize),
            checked=False,
        ),
        "literal PHM": Provider(literal, leaves),
        "samfast": Provider(ours("auto"), leaves, costs.stages(*sizes, n, dtype.itemsize)),
        "samfast torch": Provider(ours("torch"), leaves),
    }
    if compiled:
        providers["literal PHM compiled"] = Provider(torch.compile(literal), leaves)
    return Workload(
        f"PHM n{n} {tokens}x{width}->{out}",
        ("y", "dx", "drules", "dweights", "dbias"),
        "nn.Linear",
        ("literal PHM",),
        providers,
        exact,
        dy,
        [*leaves, weight, own],
    )


def kronecker_workload(shape, n, device, dtype, rank=1, scaling=2.0) -> Workload:
    """The adapter beside LoRA of its bottleneck's rank, n · n · rank; the weight frozen."""
    draw, single = _Draw(device, dtype), torch.float32
    width, out, bottleneck = shape.features, shape.out, n * n * rank
    x, dy = draw(shape.tokens, width).requires_grad_(), draw(shape.tokens, out)
    weight, bias = draw(out, width, scale=width**-0.5), draw(out)
    rules = draw(n, n, n, dtype=single, scale=n**-0.5).requires_grad_()
    left = draw(n, out // n, rank, dtype=single).requires_grad_()
    right = draw(n, width // n, rank, dtype=single, scale=(n / width) ** 0.5).requires_grad_()
    a = draw(bottleneck, width, dtype=single, scale=width**-0.5).requires_grad_()
    b = draw(out, bottleneck, dtype=single).requires_grad_()
    leaves = [x, rules, left, right]

    def ours(backend):
        def call():
            factors = kronecker_factors(rules, left, right, backend)
            return lora_linear(x, weight, bias, *factors, scaling, backend=backend)

        return call

    def literal(x=x, rules=rules, left=left, right=right, weight=weight, bias=bias):
        delta = kron_sum(rules, left @ right.mT)
        return F.linear(x, weight + scaling * delta.to(weight.dtype), bias)

    def bottleneck_form():
        made = kronecker_factors(rules, left, right, "reference")
        lora_a, lora_b = (t.to(dtype) for t in made)
        return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, lora_a), lora_b)

    def exact():
        wide = [t.detach().double().requires_grad_() for t in leaves]
        frozen = weight.double(), bias.double()
        return forward_backward(Provider(lambda: literal(*wide, *frozen), wide), dy.double())

    sizes = shape.tokens, width, out
    lora = lora_costs.stages(*sizes, bottleneck, dtype.itemsize)
    providers = {
        "LoRA": Provider(
            lambda: lora_linear(x, weight, bias, a, b, scaling), [x, a, b], lora, checked=False
        ),
        "frozen linear": Provider(
            lambda: F.linear(x, weight, bias),
            [x],
            lora_costs.frozen(*sizes, dtype.itemsize),
            checked=False,
        ),
        "literal Kronecker": Provider(literal, leaves),
        "literal bottleneck": Provider(bottleneck_form, leaves),
        "samfast": Provider(ours("auto"), leaves, lora + costs.factors(width, out, n, n, rank)),
        "samfast torch": Provider(ours("torch"), leaves),
    }
    return Workload(
        f"Kronecker n{n} rank {rank} {shape.layer} {shape.tokens}x{width}->{out}",
        ("y", "dx", "drules", "dleft", "dright"),
        "LoRA",
        ("literal Kronecker", "literal bottleneck"),
        providers,
        exact,
        dy,
        [*leaves, weight, bias, a, b],
    )
