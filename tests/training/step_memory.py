# SPDX-License-Identifier: Apache-2.0
"""Runs ``finetune`` and prints, as JSON, what the process holds after every tenth step.

python step_memory.py SETTINGS, a JSON object; each line is [step, storages, their bytes, resident
bytes]. Before it looks, glibc hands back what it has free: how far its heap is in pieces changes
from step to step by megabytes, whatever the program does.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from samfast.training.loop import finetune
from samfast.training.settings import FinetuneSettings

EVERY = 10


def storages() -> dict[int, int]:
    """The bytes of each storage that a tensor of this process shows."""
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def resident() -> int:
    """Bytes of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(settings: FinetuneSettings) -> None:
    trim, steps, rows = ctypes.CDLL(None).malloc_trim, [], []

    def look(*_) -> None:
        steps.append(1)
        if len(steps) % EVERY == 0:
            gc.collect()
            trim(0)
            found = storages()
            rows.append([len(steps), len(found), sum(found.values()), resident()])

    torch.set_num_threads(1)
    handle = register_optimizer_step_post_hook(look)
    finetune(settings)
    handle.remove()
    print(*map(json.dumps, rows), sep="\n")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    paths = {name: Path(given.pop(name)) for name in ("data", "output")}
    main(FinetuneSettings(**paths, **given))
