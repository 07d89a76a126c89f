# SPDX-License-Identifier: Apache-2.0
"""Bytes that an encoder with LoRA keeps for its backward, counted on the meta device.

Eager segment_anything's are counted likewise. The floor is 10 · D elements per token and block,
"balanced" 3 · D, "minimal" D and one block that is made again at a time.
"""

import datetime
from pathlib import Path

import torch

import samfast
from benchmarks.peers import eager_adapter, exchange, sharing
from benchmarks.run import append
from benchmarks.shapes import ENCODERS
from samfast.counters import saved_bytes
from samfast.kernels.sam_block.plan import MEMORY
from samfast.models import build_sam

RESULTS = Path(__file__).with_name("results") / "saved_bytes.csv"
COLUMNS = "model provider saved_bytes living_bytes torch samfast date".split()
FLOOR = {"fast": 10, "balanced": 3, "minimal": 1}  # D elements per token and block


def encoder(model: str, dtype: torch.dtype, target=("qkv", "proj", "lin1", "lin2"), rank: int = 4):
    """An image encoder without memory, base and residual stream of ``dtype``."""
    sam = build_sam(model, random_init=True, device="meta")
    samfast.attach(sam, samfast.Lora(rank=rank, target=target), base_dtype=dtype)
    return sam.image_encoder


def counted(module, dtype: torch.dtype, batch: int = 1):
    side = module.img_size
    images = torch.empty(batch, 3, side, side, dtype=dtype, device="meta")
    return saved_bytes(lambda: module(images), [images, *module.parameters(), *module.buffers()])


def floor(module, memory: str, dtype: torch.dtype, batch: int = 1) -> int:
    """Bytes by design: what every block keeps, and for "minimal" one block made again."""
    tokens = batch * (module.img_size // 16) ** 2
    unit = tokens * module.pos_embed.shape[3] * dtype.itemsize
    again = FLOOR["fast"] * unit if memory == "minimal" else 0
    return FLOOR[memory] * unit * len(module.blocks) + again


def main(record: bool = False) -> int:
    """Count and print; record: put the numbers in RESULTS, in place of those that were there."""
    rows, dtype = [], torch.bfloat16
    print("bytes kept by one forward of the image encoder at 1024², batch 1, LoRA r4 on qkv, proj,")
    print("lin1 and lin2, bfloat16 base and residual stream: passed to autograd, and alive after")
    for model in ENCODERS:
        made = encoder(model, dtype)
        stock = exchange(sharing(made), eager_adapter)
        found = counted(stock, dtype)
        least = floor(made, "fast", dtype)
        print(f"\n{model}")
        _row("eager", found, least)
        rows.append(_recorded(model, "eager", found))
        for memory in MEMORY:
            found = counted(samfast.fuse(sharing(made), memory=memory), dtype)
            _row(f"samfast, {memory}", found, floor(made, memory, dtype))
            rows.append(_recorded(model, f"samfast, {memory}", found))
    if record:
        made = RESULTS.with_suffix(".new")
        made.unlink(missing_ok=True)
        append(made, rows, COLUMNS)
        made.replace(RESULTS)
    return 0


def _recorded(model: str, provider: str, found) -> dict:
    numbers = {"saved_bytes": found.hooks, "living_bytes": found.living}
    versions = {"torch": torch.__version__, "samfast": samfast.__version__}
    date = datetime.date.today().isoformat()
    return {"model": model, "provider": provider, **numbers, **versions, "date": date}


def _row(name: str, found, least: int) -> None:
    print(
        f"  {name:18} {found.hooks / 1e9:7.3f} GB, alive {found.living / 1e9:7.3f} GB, "
        f"{max(found.hooks, found.living) / least:5.2f} of the floor {least / 1e9:.3f} GB"
    )


if __name__ == "__main__":
    raise SystemExit(main())
