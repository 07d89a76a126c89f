# SPDX-License-Identifier: Apache-2.0
"""Embeddings of a frozen encoder, computed once per image and kept in main memory."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from samfast.adapters.foreign import Foreign
from samfast.models import encode
from samfast.models.sam3 import is_tracker
from samfast.training.chosen_tasks import has_tasks
from samfast.training.segmenters import SamSegmenter
from samfast.training.settings import FinetuneSettings

_SHARE = 2  # at most one half of what is free
_CGROUP = Path("/sys/fs/cgroup")


class KeptEmbeddings:
    """``encode`` that keeps its results by the images' names.

    sam, images (B, 3, S, S), names of B images -> embeddings (B, 256, n, n) on the images' device.
    Without names nothing is kept. Each image is encoded by itself, so an embedding does not depend
    on the batch it was first met in: a matrix product rounds by the number of its rows.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}

    def __call__(self, sam: nn.Module, images: Tensor, names: Sequence[str]) -> Tensor:
        if not names:
            return encode(sam, images)
        for image, name in zip(images, names, strict=True):
            if name not in self.by_name:
                with torch.no_grad():
                    self.by_name[name] = encode(sam, image[None]).cpu()
        kept = [self.by_name[name] for name in names]
        return torch.cat(kept).to(images.device)  # with the encoder's strides, unlike stack


def keep_embeddings(
    model: SamSegmenter,
    settings: FinetuneSettings,
    steady: int,
    val: int,
    say: Callable[[str], None],
) -> None:
    """Let the model keep embeddings that never change if they fit into memory, and say so.

    steady: how many training images are the same in every pass   val: how many images validate
    That is with a frozen encoder. With several tasks the encoder's norms are trained, so nothing
    is kept.
    """
    if not keeps_embeddings(model.sam, settings):
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each meets all training images in time
    count = here * steady + val
    size, free = count * embedding_bytes(model), free_memory()
    what = f"{count} embeddings" if count > 1 else "1 embedding"
    if free is not None and size > free / _SHARE:
        say(
            f"recomputes {what} each time: they would take {_readable(size)}, more than half of "
            f"the free main memory ({_readable(free)})"
        )
        return
    model.kept = KeptEmbeddings()
    say(f"keeps {what}, {_readable(size)} in main memory; --no-cache recomputes them each time")


def keeps_embeddings(sam: nn.Module, settings: FinetuneSettings) -> bool:
    """True if a run may keep embeddings: its encoder is frozen."""
    if is_tracker(sam):  # its decoder has a part in them
        return False
    encoder: Foreign = sam.image_encoder
    frozen = not any(p.requires_grad for p in encoder.parameters())
    return settings.cache and not has_tasks(settings) and frozen


def keeps_training_images(sam: nn.Module, settings: FinetuneSettings) -> bool:
    """True if embeddings of training images are kept too; flips and --augment change them."""
    return keeps_embeddings(sam, settings) and not settings.changes_images


@torch.no_grad()
def embedding_bytes(model: SamSegmenter) -> int:
    """Return the size of one image's embedding, in the dtype that the encoder gives."""
    encoder: Foreign = model.sam.image_encoder
    dtype = model.dtype
    weight = encoder.patch_embed.proj.weight
    cell = weight.new_zeros(1, weight.shape[0], 1, 1)
    with torch.autocast(cell.device.type, dtype=dtype, enabled=dtype != torch.float32):
        cell = encoder.neck(cell)
    side = encoder.img_size // encoder.patch_embed.proj.stride[0]
    size: int = side * side * cell.nbytes
    return size


def free_memory() -> int | None:
    """Return the bytes of main memory that this process may still use; None if unknown."""
    found = [size for size in (_of_machine(), _of_container()) if size is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):  # with what the system keeps of files
                return 1024 * int(line.split()[1])
    except OSError:  # not Linux
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _of_container() -> int | None:
    """What a control group leaves, of the second version."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))


def _readable(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"
