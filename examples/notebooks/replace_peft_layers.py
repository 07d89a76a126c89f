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
# # Replace PEFT's layers and measure
#
# You have a SAM with PEFT's LoRA. `samfast.fuse` replaces its modules in place; parameters, names
# and PEFT's own methods stay. This notebook compares results, memory and time before and after.

# %%
import sys
import time

sys.path.insert(0, "..")  # images.py of the examples, before peft
import images  # noqa: F401
import torch
from peft import LoraConfig, get_peft_model

import samfast
from samfast.counters import saved_bytes
from samfast.models import build_sam, segment

# %% [markdown]
# ## A model of PEFT's
#
# Tiny and random here. For a real one, take `build_sam("vit_b", "sam_vit_b_01ec64.pth")` or
# segment_anything's `sam_model_registry`, and images of 1024 pixels.

# %%
torch.manual_seed(0)
sam = build_sam("vit_tiny", image_size=128, seed=0)
model = get_peft_model(sam, LoraConfig(r=4, lora_alpha=4, target_modules=["qkv"]))
batch = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
model.print_trainable_parameters()

# %% [markdown]
# ## What is measured
#
# The logits and the gradients; the bytes that one forward keeps for its backward; and the time of
# forward and backward, of which the shortest of five.


# %%
def measure(model):
    def step():
        model.zero_grad()
        logits = segment(model, batch)
        logits.square().mean().backward()
        return logits.detach()

    logits = step()
    names = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    kept = saved_bytes(lambda: segment(model, batch), model.parameters()).living
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"logits": logits, "gradients": names, "MB": kept / 1e6, "ms": 1000 * min(times)}


results = {"PEFT's modules": measure(model)}

# %% [markdown]
# ## Fuse
#
# `memory="minimal"` keeps only the input of each block, and computes the rest again.

# %%
samfast.fuse(model)
print(samfast.report(model))
results["fused"] = measure(model)
samfast.fuse(model, memory="minimal")
results["fused, minimal"] = measure(model)

# %%
stock = results["PEFT's modules"]
for name, result in results.items():
    same = (result["logits"] - stock["logits"]).abs().max() / stock["logits"].abs().max()
    print(f"{name:15} {result['MB']:7.1f} MB {result['ms']:7.1f} ms, logits differ by {same:.1e}")

# %% [markdown]
# On a model this small, time says little: the mask decoder, which is not fused, takes most of it.
# What the *encoder* keeps shrinks at any size.

# %%
assert results["fused"]["MB"] < stock["MB"]
assert results["fused, minimal"]["MB"] < results["fused"]["MB"]
for result in results.values():
    assert result["gradients"].keys() == stock["gradients"].keys()

# %% [markdown]
# ## Back again
#
# `unfuse` gives PEFT's classes back, with the same parameters. `merge_and_unload`,
# `save_pretrained` and the rest work either way.

# %%
samfast.unfuse(model)
with torch.no_grad():
    difference = (segment(model, batch) - stock["logits"]).abs().max().item()
print(f"logits of the unfused model differ by {difference:.1e}")
