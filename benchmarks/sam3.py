# SPDX-License-Identifier: Apache-2.0
"""A block of SAM 3, windowed and global, with LoRA on all linear layers: ours and PEFT's.

Of the published size whatever --model says: 1024 features, 16 heads, an MLP of 4736, 72 x 72 tokens
of a picture of 1008 pixels, windows of 24. Ratios are to Hugging Face's eager block under PEFT.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn

import samfast
from benchmarks.peers import randomise, trained
from benchmarks.registry import Provider, Workload, forward_backward
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.kernels.sam_block.plan import MEMORY

WIDTH, HEADS, HIDDEN, SIDE, PATCH, WINDOW = 1024, 16, 4736, 1008, 14, 24
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


def sam3_block_workloads(
    model, batch, rank, device, dtype, compiled=False, image_size=SIDE
) -> Iterator[Workload]:
    for window in (WINDOW, 0):
        yield sam3_block_workload(batch, rank, window, device, dtype)


def sam3_block_workload(batch, rank, window, device, dtype) -> Workload:
    generator = torch.Generator().manual_seed(0)
    side = SIDE // PATCH
    shape = (batch, side, side, WIDTH)
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    dy = torch.randn(shape, generator=generator).to(device, dtype)
    eager = _block("eager", window, rank, device, dtype, generator)
    sdpa = _like(eager, "sdpa")
    others = {"eager + PEFT": eager, "sdpa + PEFT": sdpa}
    fused = {memory: samfast.fuse(_like(sdpa, "sdpa"), memory=memory) for memory in MEMORY}

    def provider(module: nn.Module) -> Provider:
        return Provider(lambda: module(x), [x, *trained(module)])

    providers = {name: provider(module) for name, module in others.items()}
    providers |= {f"samfast, {memory}": provider(module) for memory, module in fused.items()}

    def exact():
        wide = copy.deepcopy(eager).double()
        leaves = [x.detach().double().requires_grad_(), *trained(wide)]
        return forward_backward(Provider(lambda: wide(leaves[0]), leaves), dy.double())

    names = [name for name, p in eager.named_parameters() if p.requires_grad]
    place = f"windows of {window}" if window else "global"
    return Workload(
        f"SAM 3 block, {place}, {'x'.join(map(str, shape[:3]))}, LoRA on all r{rank}",
        ("y", "dx", *(f"d{name}" for name in names)),
        "eager + PEFT",
        ("eager + PEFT", "sdpa + PEFT"),
        providers,
        exact,
        dy,
        [x, *eager.parameters(), *eager.buffers()],
    )


def _block(attention, window, rank, device, dtype, generator) -> nn.Module:
    """transformers' layer, frozen and in dtype, under PEFT's LoRA in float32."""
    declare_missing_schemas()
    import peft
    from transformers import Sam3ViTConfig
    from transformers.models.sam3 import modeling_sam3

    config = Sam3ViTConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_attention_heads=HEADS, image_size=SIDE,
        patch_size=PATCH, window_size=WINDOW, attn_implementation=attention,
    )  # fmt: skip
    layer = nn.Sequential(modeling_sam3.Sam3ViTLayer(config, window))
    adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*LAYERS])
    (layer,) = peft.get_peft_model(layer, adapters).base_model.model
    randomise(layer, generator)
    layer.eval().to(device)
    for p in layer.parameters():
        p.data = p.data if p.requires_grad else p.data.to(dtype)
    return layer


def _like(layer: nn.Module, attention: str) -> nn.Module:
    """Another layer with the same Parameters and this attention."""
    memo = {id(p): p for p in layer.parameters()}
    made = copy.deepcopy(layer, memo)
    made.attention.config._attn_implementation = attention
    return made
