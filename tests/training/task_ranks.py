# SPDX-License-Identifier: Apache-2.0
"""Two processes train tasks under DistributedDataParallel; run by a test.

python task_ranks.py FOLDER METHOD leaves the gradients of each step in FOLDER/{rank}.pt. Rank 2 is
one process alone, each step of which has the images of both.
"""

import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import samfast
from samfast.models import MultiTaskSam, build_sam
from samfast.training.many_tasks import tasks_loss
from samfast.training.segmenters import TaskSegmenter
from samfast.training.task_data import TaskBatch
from samfast.training.tasks import TaskSpec

SIDE = 64
SPECS = (TaskSpec("classes", "semantic", 2), TaskSpec("depth", "regression", weight=0.5))
# Of each step and rank, the images that have each task.
STEPS = (
    ({"classes": [0, 1], "depth": [0, 1]}, {"classes": [0, 1], "depth": [0, 1]}),
    ({"classes": [0, 1], "depth": []}, {"classes": [1], "depth": [0, 1]}),
    ({"classes": [], "depth": [0, 1]}, {"classes": [0, 1], "depth": []}),
    ({"classes": [0, 1], "depth": []}, {"classes": [0, 1], "depth": []}),
)


def build(method, dtype=torch.float32):
    sam = build_sam("vit_tiny", image_size=SIDE, seed=1)
    sam.image_encoder.blocks = sam.image_encoder.blocks[1:3]
    model = MultiTaskSam(sam, [spec.task for spec in SPECS])
    adapters = samfast.Lora(rank=2)
    if method == "ta-lora":
        names = tuple(spec.name for spec in SPECS)
        adapters = samfast.TaLora(tasks=names, ranks=(4, 3, 2), dropout=0.0, orthogonality=0.1)
    torch.manual_seed(3)  # the adapters' first values
    samfast.attach(model, adapters, train=model.trained_parts())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(model):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return samfast.fuse(model).to(dtype).train()


def batch(number, rank):
    """Of one rank in one step."""
    generator = torch.Generator().manual_seed(10 * number + rank)
    rows = STEPS[number][rank]
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 2, (2, SIDE, SIDE), generator=generator)
    depth = torch.randn(2, 1, SIDE, SIDE, generator=generator)
    targets = {"classes": labels[rows["classes"]], "depth": depth[rows["depth"]]}
    return TaskBatch(images, torch.full((2, 2), SIDE), rows, targets, {})


def gradients(inner, loss):
    inner.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in samfast.trainable_parameters(inner)}


def alone(method, number, dtype=torch.float32):
    """Both ranks' images in one batch; the loss is the mean of the ranks' losses."""
    model, ranks = build(method, dtype), [batch(number, rank) for rank in (0, 1)]
    joined = {
        spec.name: [i + 2 * rank for rank in (0, 1) for i in ranks[rank].rows[spec.name]]
        for spec in SPECS
    }
    logits = model(torch.cat([own.images for own in ranks]).to(dtype), joined)
    loss = samfast.aux_loss(model)
    for rank, own in enumerate(ranks):
        counts = {spec.name: [len(each.rows[spec.name]) for each in ranks] for spec in SPECS}
        parts = {name: logits[name].split(count)[rank] for name, count in counts.items()}
        loss = loss + tasks_loss(lambda *_, parts=parts: parts, own, SPECS) / 2
    return gradients(model, loss)


def work(rank, folder, method):
    torch.set_num_threads(1)
    if rank == 2:
        found = [alone(method, number) for number in range(len(STEPS))]
    else:
        store = f"file://{folder / 'store'}"
        torch.distributed.init_process_group(
            "gloo", store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        inner, found = build(method), []
        model = DistributedDataParallel(TaskSegmenter(inner))
        for number in range(len(STEPS)):
            loss = tasks_loss(model, batch(number, rank), SPECS) + samfast.aux_loss(inner)
            found.append(gradients(inner, loss))
        torch.distributed.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    # Forked after the imports, which take longest, and before autograd, which allows no fork.
    context = multiprocessing.get_context("fork")
    arguments = Path(sys.argv[1]), sys.argv[2]
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
