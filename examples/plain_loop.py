# SPDX-License-Identifier: Apache-2.0
"""Fine-tune SAM with LoRA in a loop of your own.

python examples/plain_loop.py
python examples/plain_loop.py --data photos/ --checkpoint sam_vit_b_01ec64.pth
"""

import torch
from images import build, dice, find_pictures, read_options
from torch.utils.data import DataLoader

import samfast
from samfast.models import segment
from samfast.training.losses import bce_dice_loss

OUTPUT = ("--output", {"default": "runs/plain_loop", "help": "adapter's folder (%(default)s)"})


def main() -> None:
    options = read_options(__doc__, OUTPUT)
    sam = samfast.attach(build(options), samfast.Lora(rank=4))  # freezes SAM, adds adapters
    sam = samfast.fuse(sam).to(options.device)
    train, val = find_pictures(options, sam)
    trained = sum(p.numel() for _, p in samfast.trainable_parameters(sam))
    print(f"{len(train)} images train, {len(val)} validate; {trained:,} parameters are trained")

    optimizer = torch.optim.AdamW(samfast.parameter_groups(sam, lr=options.lr))
    for epoch in range(options.epochs):
        sam.train()
        total = 0.0
        for batch in DataLoader(train, batch_size=2, shuffle=True):
            batch = {name: values.to(options.device) for name, values in batch.items()}
            logits = segment(sam, batch["images"])[:, 0]
            loss = bce_dice_loss(logits, batch["masks"], batch["valid"])
            optimizer.zero_grad()
            (loss + samfast.aux_loss(sam)).backward()  # aux_loss: of Conv-LoRA and TA-LoRA
            optimizer.step()
            total += loss.item() * len(logits)
        print(f"epoch {epoch + 1}: loss {total / len(train):.3f}")

    sam.eval()
    score = dice(lambda images: segment(sam, images), val, options.device)
    samfast.save_adapter(sam, options.output)  # trained tensors only; load_adapter reads them
    print(f"validation Dice {score:.3f}; the adapter is in {options.output}")


if __name__ == "__main__":
    main()
