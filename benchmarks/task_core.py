# SPDX-License-Identifier: Apache-2.0
"""TA-LoRA on packed qkv beside LoRA of its rank, and beside the update tensor written out."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.registry import Provider, Workload, forward_backward
from benchmarks.shapes import linears
from samfast.functional import lora_linear, task_cores
from samfast.kernels.lora_linear import costs as lora_costs
from samfast.kernels.lora_linear.op import low_rank_linear
from samfast.kernels.task_core import costs, middle_key

TASKS, DEPTH, SCALING = 3, 4, 0.5


def task_core_workloads(model, batch, rank, device, dtype, compiled=False) -> Iterator[Workload]:
    """One task for a batch, all tasks with the batch repeated for each, and a task a sample."""
    shape = linears(model, batch)[0]
    for name, task in (("one task", [1]), ("all tasks", [0, 1, 2]), ("mixed tasks", [2, 0, 2])):
        tokens = shape.tokens * len(task)
        yield _workload(name, task, tokens, shape.features, shape.out, rank, device, dtype)


def _workload(name, task, tokens, width, out, rank, device, dtype) -> Workload:
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=dtype, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    def trained(*size, scale=1.0):
        return draw(*size, dtype=torch.float32, scale=scale).requires_grad_()

    x, dy = draw(tokens, width).requires_grad_(), draw(tokens, out)
    weight, bias = draw(out, width, scale=width**-0.5), draw(out)
    a, b = trained(rank, width, scale=width**-0.5), trained(out, rank)
    core, factor = trained(rank, rank, DEPTH, scale=rank**-0.5), trained(TASKS, DEPTH)
    leaves, entries = [x, a, b, core, factor], torch.tensor(task, device=device)

    def lora():
        return lora_linear(x, weight, bias, a, b, SCALING)

    def ours(backend):
        def call():
            (m,) = task_cores([core], [factor], backend=backend)
            y, _, _ = low_rank_linear(
                x, weight, bias, a, b, SCALING, middle=middle_key(backend), params=[m, entries],
                backend=backend,
            )  # fmt: skip
            return y

        return call

    def literal(x=x, a=a, b=b, core=core, factor=factor, weight=weight, bias=bias):
        delta = torch.einsum("rd,rsv,tv,os->tod", a, core, factor, b).to(x.dtype)
        parts = zip(x.chunk(len(task)), task, strict=True)
        update = torch.cat([F.linear(part, delta[t]) for part, t in parts])
        return F.linear(x, weight, bias) + SCALING * update

    def exact():
        wide = [t.detach().double().requires_grad_() for t in leaves]
        frozen = weight.double(), bias.double()
        return forward_backward(Provider(lambda: literal(*wide, *frozen), wide), dy.double())

    sizes = tokens, width, out
    design = costs.stages(*sizes, (rank, rank, DEPTH), TASKS, dtype.itemsize)
    providers = {
        "LoRA": Provider(
            lora, [x, a, b], lora_costs.stages(*sizes, rank, dtype.itemsize), checked=False
        ),
        "frozen linear": Provider(
            lambda: F.linear(x, weight, bias),
            [x],
            lora_costs.frozen(*sizes, dtype.itemsize),
            checked=False,
        ),
        "samfast": Provider(ours("auto"), leaves, design),
        "samfast torch": Provider(ours("torch"), leaves),
        "literal TA-LoRA": Provider(literal, leaves),
    }
    return Workload(
        f"TA-LoRA r{rank} {name} of {TASKS}, qkv {tokens}x{width}->{out}",
        ("y", "dx", "da", "db", "dcore", "dfactor"),
        "LoRA",
        ("literal TA-LoRA",),
        providers,
        exact,
        dy,
        [*leaves, weight, bias],
    )
