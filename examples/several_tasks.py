# SPDX-License-Identifier: Apache-2.0
"""Two tasks on one encoder with TA-LoRA: objects, and the distance to the nearest object.

python examples/several_tasks.py
python examples/several_tasks.py --data photos/ --checkpoint sam_vit_b_01ec64.pth
"""

import numpy as np
import torch
from images import build, dice, find_pictures, read_options
from scipy.ndimage import distance_transform_edt
from torch.utils.data import DataLoader

import samfast
from samfast.models import MultiTaskSam, Task
from samfast.training.losses import bce_dice_loss, value_loss

OUTPUT = ("--output", {"default": "runs/several_tasks", "help": "adapter's folder (%(default)s)"})
TASKS = [Task("objects"), Task("distance", "regression")]


def distances(masks: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, S]: from 0 in an object to 1 at a quarter of the side; NaN where nothing counts."""
    far = np.stack([distance_transform_edt(~mask) for mask in masks.cpu().numpy()])
    values = torch.from_numpy(far * 4 / masks.shape[-1]).float().clamp(max=1).to(masks.device)
    known = valid & masks.flatten(1).any(1)[:, None, None]
    return torch.where(known, values, torch.nan)[:, None]


def main() -> None:
    options = read_options(__doc__, OUTPUT)
    model = MultiTaskSam(build(options), TASKS)
    method = samfast.TaLora(tasks=tuple(task.name for task in TASKS))
    samfast.attach(model, method, train=model.trained_parts())
    samfast.fuse(model).to(options.device)
    train, val = find_pictures(options, model)
    optimizer = torch.optim.AdamW(samfast.parameter_groups(model, lr=options.lr / 2))
    for epoch in range(options.epochs):
        model.train()
        for batch in DataLoader(train, batch_size=2, shuffle=True):
            images, masks, valid = (batch[name].to(options.device) for name in batch)
            logits = model(images)  # of every task; the encoder's first blocks run once
            loss = bce_dice_loss(logits["objects"][:, 0], masks, valid)
            loss = loss + value_loss(logits["distance"], distances(masks, valid))
            optimizer.zero_grad()
            (loss + samfast.aux_loss(model)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")

    score = dice(lambda images: model.eval()(images, task="objects"), val, options.device)
    samfast.save_adapter(model, options.output)
    print(f"validation Dice of objects {score:.3f}; the adapter is in {options.output}")


if __name__ == "__main__":
    main()
