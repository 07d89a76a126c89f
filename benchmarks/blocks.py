# SPDX-License-Identifier: Apache-2.0
"""SAM's transformer block, windowed and global, with adapters: ours and what others run."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.peers import STOCK, peers, randomise, sharing, trained
from benchmarks.registry import Provider, Workload, forward_backward
from benchmarks.shapes import ENCODERS
from samfast.kernels.sam_block.plan import MEMORY
from samfast.modules.conv_lora import ConvLoraLinear
from samfast.modules.lora import LoraLinear
from samfast.modules.sam_block import Block, SamBlock

WINDOW = 14
ALL = ("qkv", "proj", "lin1", "lin2")
ADAPTERS = {"LoRA on qkv": ("qkv",), "LoRA on all": ALL, "Conv-LoRA on qkv": ("qkv",)}


def block_workloads(
    model, batch, rank, device, dtype, compiled=False, image_size=1024
) -> Iterator[Workload]:
    """A windowed and a global block under each kind of adapter; ratios are to our frozen block."""
    side = image_size // 16
    for window in (WINDOW, 0):
        for adapters in ADAPTERS:
            yield block_workload(
                model, batch, rank, window, adapters, device, dtype, compiled, side
            )


def block_workload(
    model, batch, rank, window, adapters, device, dtype, compiled=False, side=64
) -> Workload:
    encoder = ENCODERS[model]
    generator = torch.Generator().manual_seed(0)
    size = (window or side, window or side)
    block = Block(encoder.width, encoder.heads, window_size=window, use_rel_pos=True,
                  input_size=size).requires_grad_(False)  # fmt: skip
    for name in ADAPTERS[adapters]:
        parent = block.attn if hasattr(block.attn, name) else block.mlp
        setattr(parent, name, _adapted(adapters, getattr(parent, name), rank))
    randomise(block, generator)
    block.eval().to(device)  # Conv-LoRA's gate without noise
    for p in block.parameters():
        p.data = p.data if p.requires_grad else p.data.to(dtype)
    shape = (batch, side, side, encoder.width)
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    dy = torch.randn(shape, generator=generator).to(device, dtype)

    def provider(module: nn.Module, **options) -> Provider:
        return Provider(lambda: module(x), [x, *trained(module)], **options)

    ours = {memory: SamBlock.from_block(sharing(block), memory) for memory in MEMORY}
    frozen = SamBlock.from_block(sharing(block))
    for p in trained(frozen):
        _replace(frozen, p)
    others, missing = peers(block, device)
    providers = {"samfast, frozen": provider(frozen, checked=False)}
    providers |= {name: provider(module) for name, module in others.items()}
    providers |= {f"samfast, {memory}": provider(module) for memory, module in ours.items()}
    if compiled:
        for name in ("eager", "SDPA + mask, PEFT"):
            if name in others:
                providers[f"{name}, compiled"] = provider(torch.compile(others[name]))

    def exact():
        wide = copy.deepcopy(others["eager"]).double()
        leaves = [x.detach().double().requires_grad_(), *trained(wide)]
        return forward_backward(Provider(lambda: wide(leaves[0]), leaves), dy.double())

    names = [name for name, p in others["eager"].named_parameters() if p.requires_grad]
    place = f"windows of {window}" if window else "global"
    return Workload(
        f"{model} block, {place}, {'x'.join(map(str, shape[:3]))}, {adapters} r{rank}",
        ("y", "dx", *(f"d{name}" for name in names)),
        "samfast, frozen",
        tuple(STOCK & others.keys()),
        providers,
        exact,
        dy,
        [x, *block.parameters()],
        missing,
    )


def _adapted(adapters: str, linear: nn.Linear, rank: int) -> nn.Module:
    if adapters.startswith("Conv"):
        return ConvLoraLinear.from_linear(linear, rank)
    return LoraLinear.from_linear(linear, rank, 2 * rank)


def _replace(module: nn.Module, parameter: nn.Parameter) -> None:
    """The parameter by a frozen one of the same values, wherever it is."""
    still = nn.Parameter(parameter.data, requires_grad=False)
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is parameter:
                m._parameters[name] = still
