# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune SAM on your images
#
# You need a folder with `images/` and `masks/`, whose files have the same names. Without one, this
# notebook draws a few pictures of one bright ellipse each, and a tiny SAM with random weights
# learns to find it. It runs on a CPU.

# %%
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, "..")  # images.py of the examples
import torch
from images import Pictures, dice, write_pictures
from matplotlib import pyplot as plt
from torch.utils.data import DataLoader

import samfast
from samfast.models import build_sam, image_size, pixel_mean, segment
from samfast.training.folders import load_split
from samfast.training.losses import bce_dice_loss

# %% [markdown]
# ## Your data and your weights
#
# For real ones, set `DATA = Path("photos")` and
# `build = lambda: build_sam("vit_b", "sam_vit_b_01ec64.pth")`.

# %%
FOLDER = Path(tempfile.mkdtemp())
DATA = write_pictures(FOLDER / "pictures")


def build():
    return build_sam("vit_tiny", image_size=64, seed=0)


torch.manual_seed(0)
sam = build()
split = load_split(DATA)  # decodes and checks every file
train, val = (Pictures(p, image_size(sam), pixel_mean(sam)) for p in (split.train, split.val))
print(f"{len(train)} images train, {len(val)} validate")


# %%
def show(pictures, masks_of):
    _, axes = plt.subplots(1, len(pictures), figsize=(3 * len(pictures), 3), squeeze=False)
    for axis, sample in zip(axes[0], pictures, strict=True):
        axis.imshow(sample["images"].permute(1, 2, 0) / 255)
        axis.contour(masks_of(sample).float(), [0.5], colors="red")
        axis.set_axis_off()


show(val, lambda sample: sample["masks"])

# %% [markdown]
# ## Freeze SAM, add LoRA, fuse
#
# `attach` freezes SAM and adds adapters; the mask decoder is trained too. `fuse` replaces the
# blocks in place with ones that keep less for the backward. `report` says what runs.

# %%
samfast.attach(sam, samfast.Lora(rank=4))
samfast.fuse(sam)
print(samfast.report(sam))
before = dice(lambda images: segment(sam, images), val)

# %% [markdown]
# ## Train
#
# Any loop and any optimizer will do. With SAM's weights, begin with a learning rate of 2e-4.

# %%
optimizer = torch.optim.AdamW(samfast.parameter_groups(sam, lr=2e-3))
sam.train()
for epoch in range(4):
    losses = []
    for batch in DataLoader(train, batch_size=2, shuffle=True):
        logits = segment(sam, batch["images"])[:, 0]
        loss = bce_dice_loss(logits, batch["masks"], batch["valid"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")

# %%
sam.eval()
after = dice(lambda images: segment(sam, images), val)
print(f"validation Dice {before:.3f} untrained, {after:.3f} trained")
with torch.no_grad():
    show(val, lambda sample: segment(sam, sample["images"][None])[0, 0] > 0)

# %% [markdown]
# ## Save, and load again
#
# The folder holds the trained tensors only. The other model needs the same base weights.

# %%
samfast.save_adapter(sam, FOLDER / "adapter")
other = samfast.load_adapter(build(), FOLDER / "adapter")
again = dice(lambda images: segment(other.eval(), images), val)
print(f"validation Dice of the loaded adapter: {again:.3f}")
assert abs(again - after) < 0.01 and after > before

# %% [markdown]
# The command line does all this, with validation after each epoch, pictures and resuming:
#
# ```sh
# samfast finetune --data photos/ --model vit_b --checkpoint sam_vit_b_01ec64.pth
# ```
