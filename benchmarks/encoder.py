# SPDX-License-Identifier: Apache-2.0
"""Steps of SAM's whole image encoder with LoRA: forward and backward, ours and what others run."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

import samfast
from benchmarks import shapes
from benchmarks.peers import INDEXED_BY_HOST, STOCK, peers, sharing, trained
from benchmarks.registry import Provider, Workload, forward_backward
from samfast.kernels.lora_linear.costs import Stage
from samfast.kernels.sam_block.plan import MEMORY
from samfast.models import build_sam

TARGETS = {"LoRA on qkv": "qkv", "LoRA on all": ("qkv", "proj", "lin1", "lin2")}


def encoder_workloads(
    model, batch, rank, device, dtype, compiled=False, image_size=1024
) -> Iterator[Workload]:
    """One workload for each choice of layers; ratios are to segment_anything with eager LoRA."""
    for adapters in TARGETS:
        sam = build_sam(model, random_init=True, image_size=image_size, seed=0)
        method = samfast.Lora(rank=rank, alpha=2 * rank, target=TARGETS[adapters])
        samfast.attach(sam, method, base_dtype=dtype)
        encoder = _prepared(sam.image_encoder, device)
        workload = encoder_workload(encoder, batch, device, compiled)
        workload.name = f"{model} at {image_size}, batch {batch}, {adapters} r{rank}"
        yield workload


def encoder_workload(encoder: nn.Module, batch: int, device: str, compiled: bool) -> Workload:
    """What is verified is one windowed and one global block of it on one image, without the neck:
    its convolutions round by how the map lies, which is token by token after our blocks."""
    made = _workload(encoder, batch, device, compiled)
    small, blocks = sharing(encoder), encoder.blocks
    kinds = {block.window_size: i for i, block in reversed(list(enumerate(blocks)))}
    small.blocks = nn.ModuleList(small.blocks[i] for i in sorted(kinds.values()))
    small.neck = nn.Identity()
    made.verified = _workload(small, 1, device, compiled)
    return made


def _workload(encoder: nn.Module, batch: int, device: str, compiled: bool) -> Workload:
    dtype = encoder.patch_embed.proj.weight.dtype
    generator = torch.Generator().manual_seed(1)
    side = encoder.img_size

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    channels = encoder.pos_embed.shape[3] if isinstance(encoder.neck, nn.Identity) else 256
    images, dy = draw(batch, 3, side, side), draw(batch, channels, side // 16, side // 16)

    def provider(module: nn.Module, **options) -> Provider:
        return Provider(lambda: module(images), trained(module), **options)

    others, missing = peers(encoder, device)
    providers = {
        name: provider(module, captured=name not in INDEXED_BY_HOST)
        for name, module in others.items()
    }
    for memory in MEMORY:
        ours = samfast.fuse(sharing(encoder), memory=memory)
        stages = [Stage("step", step_flops(encoder, batch), 0, 0)] if memory == "fast" else []
        providers[f"samfast, {memory}"] = provider(ours, stages=stages)
    if compiled:
        for name in ("eager", "SDPA + mask, PEFT"):
            if name in others:
                module, captured = _compiled(others[name]), providers[name].captured
                providers[f"{name}, compiled"] = provider(module, captured=captured)

    def exact():
        wide = copy.deepcopy(others["eager"]).double()
        return forward_backward(Provider(lambda: wide(images.double()), trained(wide)), dy.double())

    names = [name for name, p in others["eager"].named_parameters() if p.requires_grad]
    known = [images, *encoder.parameters(), *encoder.buffers()]
    return Workload(
        "",
        ("y", *(f"d{name}" for name in names)),
        "eager",
        tuple(STOCK & others.keys()),
        providers,
        exact,
        dy,
        known,
        missing,
        images=batch,
    )


def _compiled(encoder: nn.Module) -> nn.Module:
    """Block by block: the blocks share two graphs, and the whole would take minutes."""
    made = sharing(encoder)
    for block in made.blocks:
        block.compile()
    return made


def step_flops(encoder: nn.Module, batch: int) -> int:
    """The FLOP of a step's floor, see shapes.step_flops."""
    tokens = (encoder.img_size // 16) ** 2
    keys = [block.window_size**2 or tokens for block in encoder.blocks]
    return shapes.step_flops(encoder.pos_embed.shape[3], keys, batch, tokens)


@torch.no_grad()
def _prepared(encoder: nn.Module, device: str) -> nn.Module:
    """In eval, with updates that are not zero: as in the middle of a training."""
    generator = torch.Generator().manual_seed(2)
    for name, p in encoder.named_parameters():
        if name.endswith("lora_B"):
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return encoder.eval().to(device)
