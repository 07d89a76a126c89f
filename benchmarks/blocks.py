# SPDX-License-Identifier: Apache-2.0
"""SAM's transformer block, windowed and global, with adapters: ours and what others run."""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import INDEXED_BY_HOST, STOCK, peers, randomise, sharing, trained
from benchmarks.registry import Provider, Workload, forward_backward
from benchmarks.shapes import ENCODERS
from samfast.fused.sam_block import Block, SamBlock
from samfast.kernels.sam_block.plan import MEMORY
from samfast.methods.conv_lora.layer import ConvLoraLinear
from samfast.methods.lora.layer import LoraLinear

WINDOW = 14
ALL = ("qkv", "proj", "lin1", "lin2")
ADAPTERS = {"LoRA on qkv": ("qkv",), "LoRA on all": ALL, "Conv-LoRA on qkv": ("qkv",)}


def block_workloads(
    model, batch, rank, device, dtype, compiled=False, image_size=1024
) -> Iterator[Workload]:
    """A windowed and a global block under each kind of adapter; ratios are to our frozen block.
    Conv-LoRA is also compared with LoRA of its rank."""
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
    block = _block(encoder, window, side, adapters, rank, device, dtype, generator)
    shape = (batch, side, side, encoder.width)
    x = torch.randn(shape, generator=generator)
    if adapters.startswith("Conv"):
        x += 4 * _directions(block, shape, window or side, generator)
    x = x.to(device, dtype).requires_grad_()
    dy = torch.randn(shape, generator=generator).to(device, dtype)

    def provider(module: nn.Module, **options) -> Provider:
        return Provider(lambda: module(x), [x, *trained(module)], **options)

    ours = {memory: SamBlock.from_block(sharing(block), memory) for memory in MEMORY}
    frozen = SamBlock.from_block(sharing(block))
    for p in trained(frozen):
        _replace(frozen, p)
    others, missing = peers(block, device)
    providers = {"samfast, frozen": provider(frozen, checked=False)}
    waits = adapters.startswith("Conv")  # the literal method's routing does
    for name, module in others.items():
        providers[name] = provider(module, captured=not waits and name not in INDEXED_BY_HOST)
    providers |= {f"samfast, {memory}": provider(module) for memory, module in ours.items()}
    known = [x, *block.parameters()]
    if adapters.startswith("Conv"):
        plain = _block(encoder, window, side, "LoRA on qkv", rank, device, dtype, generator)
        providers["samfast, LoRA"] = provider(SamBlock.from_block(plain), checked=False)
        known += plain.parameters()
    if compiled:
        for name in ("eager", "SDPA + mask, PEFT"):
            if name in others:
                module, captured = torch.compile(others[name]), providers[name].captured
                providers[f"{name}, compiled"] = provider(module, captured=captured)

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
        known,
        missing,
    )


def _block(encoder, window, side, adapters, rank, device, dtype, generator) -> nn.Module:
    """segment_anything's, frozen and in dtype, with our adapters in float32."""
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
    return block


@torch.no_grad()
def _directions(block, shape, window, generator) -> torch.Tensor:
    """One for each sample of Conv-LoRA, all of which the gate is made to know: a choice that hung
    on rounding would be no measure of anybody's error."""
    batch, height, width, columns = shape
    layer, across = block.attn.qkv, -(-width // window)
    drawn = torch.randn(len(layer.ratios), columns, generator=generator)
    like = block.norm1.weight
    normed = block.norm1(drawn.to(like)).to(layer.lora_A.dtype)
    layer.w_gate.copy_(F.normalize(normed @ layer.lora_A.T).T)
    places = torch.arange(height)[:, None] // window * across + torch.arange(width) // window
    samples = places + across * -(-height // window) * torch.arange(batch)[:, None, None]
    return drawn[samples % len(drawn)]


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
