# SPDX-License-Identifier: Apache-2.0
"""Keep your PEFT model and loop: replace its modules with fused ones, and measure the step.

python examples/peft_model.py
python examples/peft_model.py --data photos/ --checkpoint sam_vit_b_01ec64.pth
"""

import time

import torch
from images import build, dice, find_pictures, read_options
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import samfast
from samfast.counters import saved_bytes
from samfast.models import segment
from samfast.training.losses import bce_dice_loss

OUTPUT = ("--output", {"default": "runs/peft_model", "help": "PEFT's folder (%(default)s)"})


def train(name, model, pictures, options, epochs: int) -> None:
    """Train, then print what a step takes: the quickest step, and the bytes kept for a backward."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), options.lr)
    times = []
    model.train()
    for _ in range(epochs):
        for batch in DataLoader(pictures, batch_size=2, shuffle=True):
            batch = {name: values.to(options.device) for name, values in batch.items()}
            start = time.perf_counter()
            logits = segment(model, batch["images"])[:, 0]
            loss = bce_dice_loss(logits, batch["masks"], batch["valid"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # waits for a GPU
            times.append(1000 * (time.perf_counter() - start))
    kept = saved_bytes(lambda: segment(model, batch["images"]), model.parameters()).living
    print(f"{name}: a step takes {min(times):.0f} ms and keeps {kept / 1e6:.1f} MB")


def main() -> None:
    options = read_options(__doc__, OUTPUT)
    sam = build(options)
    pictures, val = find_pictures(options, sam)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["qkv"], modules_to_save=["mask_decoder"])
    model = get_peft_model(sam, config).to(options.device)
    train("PEFT", model, pictures, options, epochs=1)
    samfast.fuse(model)  # the only new line: same parameters, same names, same results
    print(samfast.report(model))
    train("fused", model, pictures, options, options.epochs)
    score = dice(lambda images: segment(model.eval(), images), val, options.device)
    model.save_pretrained(options.output)  # PEFT's own files, with or without samfast
    print(f"validation Dice {score:.3f}; PEFT's adapter is in {options.output}")


if __name__ == "__main__":
    main()
