# SPDX-License-Identifier: Apache-2.0
"""One step of fine-tuning SAM on this CPU: seconds, and the most memory the process ever had.

python -m benchmarks.step --model vit_h
python -m benchmarks.step --model vit_h --provider eager
python -m benchmarks.step --record              adds a row to benchmarks/results/steps.csv
"""

import datetime
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import samfast
from benchmarks import machine
from benchmarks.operations import segment_anything_missing
from benchmarks.options import parsed
from benchmarks.peers import eager_adapter, exchange
from benchmarks.run import append
from benchmarks.shapes import ENCODERS
from samfast.kernels.sam_block.plan import MEMORY
from samfast.models import build_sam, segment

RESULTS = Path(__file__).with_name("results") / "steps.csv"
COLUMNS = (
    "model provider memory batch image_size seconds peak_gib note machine torch samfast date"
).split()


@dataclass
class Settings:
    """LoRA on qkv, proj, lin1 and lin2 and the mask decoder, float32, random weights, AdamW."""

    model: Literal[tuple(ENCODERS)] = "vit_b"
    provider: Literal["samfast", "eager"] = "samfast"
    memory: Literal[MEMORY] = "fast"
    batch: int = 1
    rank: int = 4
    image_size: int = 1024
    record: bool = field(default=False, metadata={"help": "add the row to benchmarks/results"})


def main(settings: Settings) -> int:
    if (missing := segment_anything_missing("step")) is not None:
        print(missing, file=sys.stderr)
        return 2
    torch.manual_seed(0)  # of the adapters
    sam = build_sam(settings.model, random_init=True, image_size=settings.image_size, seed=0)
    target = ("qkv", "proj", "lin1", "lin2")
    samfast.attach(sam, samfast.Lora(rank=settings.rank, target=target))
    if settings.provider == "samfast":
        samfast.fuse(sam, memory=settings.memory)
    else:
        exchange(sam, eager_adapter)
    sam.train()
    trained = [p for p in sam.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    shape = settings.batch, 3, settings.image_size, settings.image_size
    images = 255 * torch.rand(shape, generator=generator)
    masks = (torch.rand(settings.batch, 1, *shape[2:], generator=generator) < 0.3).float()
    before, start = _peak(), time.perf_counter()
    loss = F.binary_cross_entropy_with_logits(segment(sam, images), masks)
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    norm = torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm()
    who = f"samfast, {settings.memory}" if settings.provider == "samfast" else "eager"
    print(f"{machine.name('cpu')}, torch {torch.__version__}, float32")
    print(
        f"{settings.model} at {settings.image_size}, batch {settings.batch}, {who}: loss "
        f"{loss.item():.6f}, gradient norm {norm.item():.6f}, {seconds:.1f} s, "
        f"peak RSS {_peak() / 2**30:.2f} GiB ({before / 2**30:.2f} before the step)"
    )
    if settings.record:
        append(RESULTS, [recorded(settings, seconds, _peak() / 2**30)], COLUMNS)
    return 0


def recorded(settings: Settings, seconds: float, peak_gib: float) -> dict:
    """A row of RESULTS."""
    ours = settings.provider == "samfast"
    return {
        "model": settings.model, "provider": settings.provider,
        "memory": settings.memory if ours else "", "batch": settings.batch,
        "image_size": settings.image_size, "seconds": seconds, "peak_gib": peak_gib,
        "machine": machine.name("cpu"), "torch": torch.__version__,
        "samfast": samfast.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _peak() -> int:
    """Bytes of the largest resident set this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


if __name__ == "__main__":
    raise SystemExit(main(parsed(Settings)))
