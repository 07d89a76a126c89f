# SPDX-License-Identifier: Apache-2.0
"""Small models of segment_anything's classes that PEFT adapted, and what is asked of them."""

import functools

import peft
import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

TARGETS = ["qkv", "attn.proj", "lin1", "lin2"]
DEPTH = 2
OPERATORS = ("samfast::sam_block", "samfast::sam_block_forward")


def config(**options):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **options})


class Trunk(nn.Module):
    """Blocks with padded windows and with the whole map; x: (B, 5, 6, 32), or one of its maps."""

    def __init__(self):
        super().__init__()
        kinds = {"use_rel_pos": True, "mlp_ratio": 2}
        windows = Block(32, 2, window_size=4, input_size=(5, 6), **kinds)
        self.blocks = nn.Sequential(windows, Block(32, 2, input_size=(5, 6), **kinds))

    def forward(self, x):
        return self.blocks(x)


def moved(model, std=0.2):
    """Factors as after training, and tables that matter; the same at every call."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "rel_pos_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(std * noise)
    return model


def trunk():
    torch.manual_seed(0)
    return Trunk()


def adapted(**options):
    """The trunk in a PeftModel."""
    return moved(peft.get_peft_model(trunk(), config(**options)))


def encoder():
    """An image encoder that any process can build; x: (B, 3, 20, 20)."""
    torch.manual_seed(0)
    return ImageEncoderViT(
        img_size=20,
        patch_size=4,
        embed_dim=32,
        depth=DEPTH,
        num_heads=2,
        mlp_ratio=2.0,
        out_chans=4,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )


def adapted_encoder(**options):
    return moved(peft.get_peft_model(encoder(), config(**options)))


def maps(batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 5, 6, 32, generator=generator, dtype=torch.float64).to(dtype)


def images(batch=2):
    return torch.randn(batch, 3, 20, 20, generator=torch.Generator().manual_seed(5))


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in OPERATORS
        return func(*args, **(kwargs or {}))


def block_calls(model, x, **options):
    """How many blocks one forward ran as one operator: counted, not asked."""
    with _Calls() as calls:
        model(x, **options)
    return calls.count


def run(model, x, **options):
    """{"y", "dx", every trained parameter's gradient}."""
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(x, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    leaves = [x, *trained.values()]
    grads = torch.autograd.grad(y, leaves, dy.to(y), materialize_grads=True)
    return dict(zip(["y", "dx", *trained], [y.detach(), *grads], strict=True))
