# SPDX-License-Identifier: Apache-2.0
"""Two processes train one Conv-LoRA model under DistributedDataParallel; run by a test.

python two_ranks.py FOLDER leaves the gradients of each step in FOLDER/{rank}.pt: of one without
the balancing loss, of one with it, and of one with it under each kind of checkpoint. Rank 2 is one
process alone that averages both halves of the data.
"""

import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from toy_sam import ToySam

import samfast

STEPS = (None, 0.0, 1.0, "nonreentrant", "reentrant")


class Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.mode = block, None

    def forward(self, x):
        if self.mode is None:
            return self.block(x)
        x = x if x.requires_grad else x.detach().requires_grad_()
        return checkpoint(self.block, x, use_reentrant=self.mode == "reentrant")


def build():
    torch.manual_seed(0)
    model = samfast.attach(ToySam(), samfast.ConvLora(rank=2, experts=4), train="mask_decoder.lin1")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model.image_encoder.blocks = nn.ModuleList(map(Checkpointed, model.image_encoder.blocks))
    return model.train()


def step(model, inner, images, kind):
    """Gradients by name. kind: weight of the balancing loss, or a kind of checkpoint with it."""
    for block in inner.image_encoder.blocks:
        block.mode = kind if isinstance(kind, str) else None
    torch.manual_seed(5)
    inner.zero_grad()
    logits = model(images)
    loss = F.binary_cross_entropy_with_logits(logits, (images[:, 0, 0] > 0).float())
    if kind is not None:
        loss = loss + (1.0 if isinstance(kind, str) else kind) * samfast.aux_loss(model)
    loss.backward()
    return {n: p.grad.clone() for n, p in samfast.trainable_parameters(inner)}


def halves():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).split(2)


def work(rank, folder):
    torch.set_num_threads(1)
    inner = build()
    if rank == 2:
        found = []
        for kind in STEPS:
            first, second = (step(inner, inner, half, kind) for half in halves())
            found.append({name: (first[name] + second[name]) / 2 for name in first})
    else:
        store = f"file://{folder / 'store'}"
        torch.distributed.init_process_group(
            "gloo", store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        model = DistributedDataParallel(inner)
        found = [step(model, inner, halves()[rank], kind) for kind in STEPS]
        torch.distributed.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    # Forked after the imports, which take longest, and before autograd, which allows no fork.
    context = multiprocessing.get_context("fork")
    folder = Path(sys.argv[1])
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
