# SPDX-License-Identifier: Apache-2.0
"""MultiTaskSam with TA-LoRA, fused, against SAM's own parts in a loop over tasks, images and
channels, through the black-box checks."""

import copy

import black_box
import pytest
import torch
import torch.nn.functional as F
from black_box import Subject
from torch import nn

import samfast
from samfast.models import MultiTaskSam, Task, build_sam

TASKS = (Task("classes", "semantic", 2), Task("depth", "regression"))
SIZE = (60, 57)
TRAINED = ("no_mask_embeds", "image_encoder.neck.3", "mask_decoders.depth.mask_tokens")


class Joined(nn.Module):
    """All tasks' maps as one tensor [B, channels of all tasks, H, W]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return torch.cat(list(self.model(images).values()), 1)


class LiteralTaskQkv(nn.Linear):
    """qkv with the weight of the task at hand (TA-LoRA), in plain PyTorch."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features)
        for name, parameter in like.adapter_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty_like(parameter)))
        self.scaling, self.task = like.scaling, 0

    def forward(self, x):
        core = self.td_G @ self.td_U3[self.task]  # (R1, R2)
        return super().forward(x) + self.scaling * x @ self.td_U1 @ core @ self.td_U2.t()


class LiteralTasks(nn.Module):
    """segment_anything's modules, one task, image and channel at a time."""

    def __init__(self, sam, like):
        super().__init__()
        self.image_encoder = copy.deepcopy(sam.image_encoder)
        for own, other in zip(self.image_encoder.blocks, like.image_encoder.blocks, strict=True):
            own.attn.qkv = LiteralTaskQkv(other.attn.qkv)
        for name in ("pe_layer", "no_mask_embeds", "mask_decoders"):
            setattr(self, name, copy.deepcopy(getattr(like, name)))
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, getattr(like, name).clone(), persistent=False)
        self.train(like.training)

    def forward(self, images):
        return {task.name: self.of_task(i, task.name, images) for i, task in enumerate(TASKS)}

    def of_task(self, i, name, images):
        for block in self.image_encoder.blocks:
            block.attn.qkv.task = i
        side, wide = self.image_encoder.img_size, torch.promote_types(images.dtype, torch.float32)
        pixels = (images.to(wide) - self.pixel_mean.to(wide)) / self.pixel_std.to(wide)
        height, width = images.shape[2:]
        pixels = F.pad(pixels, (0, side - width, 0, side - height))
        dtype = self.image_encoder.patch_embed.proj.weight.dtype
        results = []
        for embedding in self.image_encoder(pixels.to(dtype)):
            masks = [self.masks(name, embedding, row) for row in self.no_mask_embeds[name]]
            masks = F.interpolate(torch.cat(masks, 1).to(wide), (side, side), mode="bilinear")
            results.append(masks[0, :, :height, :width])
        return torch.stack(results)

    def masks(self, name, embedding, row):
        decoder = self.mask_decoders[name]
        dtype = decoder.mask_tokens.weight.dtype
        count = embedding.shape[1]
        wide = torch.promote_types(dtype, torch.float32)
        centres = (torch.arange(count, dtype=wide) + 0.5) / count
        grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)
        matrix = self.pe_layer.positional_encoding_gaussian_matrix
        with torch.autocast("cpu", enabled=False):
            angles = 2 * torch.pi * ((2 * grid - 1) @ matrix.to(wide))
        positions = torch.cat([angles.sin(), angles.cos()], -1).permute(2, 0, 1)[None]
        masks, _ = decoder(
            image_embeddings=embedding[None].to(dtype),
            image_pe=positions.to(dtype),
            sparse_prompt_embeddings=row.new_empty(1, 0, len(row)),
            dense_prompt_embeddings=row.view(1, -1, 1, 1).expand(1, -1, count, count),
            multimask_output=False,
        )
        return masks


@pytest.fixture(scope="module")
def subject():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sam = build_sam("vit_tiny", image_size=64, seed=1)
        sam.image_encoder.blocks = sam.image_encoder.blocks[2:3]
        model = MultiTaskSam(copy.deepcopy(sam), TASKS)
        method = samfast.TaLora(tasks=("classes", "depth"), ranks=(5, 4, 2), dropout=0.0)
        samfast.attach(model, method, train=TRAINED)
        with torch.no_grad():
            for _, parameter in samfast.trainable_parameters(model):
                parameter.add_(0.1 * torch.randn_like(parameter))
        literal = LiteralTasks(sam, model)
        x = torch.rand(2, 3, *SIZE, dtype=torch.float64) * 255
        ours = Joined(samfast.fuse(model)).double()
        return Subject(ours, Joined(literal).double(), x)


# An empty batch has no graph, as in ``segment``: nothing is run. The compiler's code for a whole
# decoder takes minutes to write.
LEFT_OUT = ("empty_batch", "generated")
SHORT = ("nothing_mutated", "accumulation", "frozen", "copies")
CASES = [
    pytest.param(
        check, id=check.__name__, marks=() if check.__name__ in SHORT else pytest.mark.slow
    )
    for check in black_box.CHECKS
    if check.__name__ not in LEFT_OUT
]


@pytest.mark.parametrize("check", CASES)
def test_black_box(subject, check):
    check(subject)
