# SPDX-License-Identifier: Apache-2.0
"""What one training step needs, counted on tensors without memory.

The model of the settings is built, and one forward and backward run, on torch's fake tensors: meta
tensors that know which device they stand for, so that autocast casts as it will. A batch is
``batch_size`` images padded to the square that the model sees, whatever the files' sizes, each
with the one object that is trained, with a box or without, with ``objects`` of them that have
prompts, or with the truth of every task; so no file is needed but that of the tasks.

Counted is samfast's torch path, which keeps the same tensors as all others. Where C++ or Triton
runs, attention, Conv-LoRA's experts and the product with TA-LoRA's cores are one kernel each that
makes nothing but its results; the FLOP of experts and cores, less than a hundredth, are left out.
Peak memory is what is alive at the worst moment of a step whose optimizer has its moments:

    model       parameters and buffers
    + gradients of the trained parameters that exist at that moment: all of them where batches are
                accumulated or the optimizer's step is that moment, else those made so far
    + optimizer AdamW's two moments of every trained parameter and its step
    + batch     images, masks, sizes, boxes
    + next batch   on a CPU, where the loader has it at hand
    + saved     of what autograd keeps at the end of the forward, the loss included
    + transient what else is alive then

A device that is not here is stood for by a CPU that computes in its dtypes. The peak is that of
tensors: within a tenth of what torch's profiler sees of all allocations, those inside operators
included. It is blind to what libraries take by other ways, to what an allocator wastes, to the
process itself (Python and torch: some 300 MB on a CPU, CUDA's context on a GPU), to a loader's
processes, and to copies for several GPUs. ``samfast.training.card`` has a reserve for these.
"""

from collections.abc import Sequence

import torch

from samfast import report
from samfast.adapters.trained import trained_state
from samfast.models import Task, image_size
from samfast.training.card import readable
from samfast.training.checks import check_settings
from samfast.training.chosen_tasks import has_prompted_objects, specs_of
from samfast.training.embeddings import embedding_bytes, keeps_embeddings
from samfast.training.plan import planned
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.recipe import method_of, with_recipe
from samfast.training.run_folder import files_of_run
from samfast.training.settings import MEMORY, FinetuneSettings
from samfast.training.step_counts import KERNELS, CountedStep, counted_step
from samfast.training.try_out import backend_asked_for

__all__ = ["KERNELS", "dry_run", "text"]


def dry_run(settings: FinetuneSettings) -> dict:
    """Return the settings that matter and what a step needs: bytes, parameters and FLOP.

    FLOP are for one batch; an optimizer step has ``accumulate`` batches. With ``fit``, the device
    is a GPU even if there is none, and the settings are those of the plan. Raises ValueError for
    wrong settings, as ``finetune`` does. Opens only the tasks file.
    """
    check_settings(settings)
    settings = with_recipe(settings)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = here if settings.fit in (None, "auto") else torch.device("cuda")
    dtype = autocast_dtype(settings.precision, device)
    base = base_dtype(settings.base_dtype, dtype, device)
    specs = specs_of(settings)
    tasks = None if specs is None else [spec.task for spec in specs]
    method = method_of(settings, tasks)
    if device == here:
        with backend_asked_for(settings.backend, method, settings.fuse, device, dtype):
            pass
    settings, plan = planned(settings, device)
    with counted_step(settings, device) as step:
        fused = "fused" in report(step.model.sam).blocks.values()
        counts = _counts(step)
    return {
        "model": settings.model,
        "image_size": image_size(step.model.sam),
        "method": settings.method,
        "prompt": settings.prompt,
        "batch_size": settings.batch_size,
        "accumulate": settings.accumulate,
        "tasks": None if tasks is None else {task.name: task.channels for task in tasks},
        "objects_per_image": _objects(settings, tasks),
        "fuse": fused,
        "memory": (settings.memory or MEMORY[0]) if fused else None,
        "decoder_chunk": settings.decoder_chunk,
        "device": device.type,
        "precision": _name(dtype),
        "base_dtype": _name(base or torch.float32),
        "plan": None if plan is None else plan.record(),
        **counts,
    }


def _objects(settings: FinetuneSettings, tasks: Sequence[Task] | None) -> int:
    """How many objects of an image the mask decoder works on."""
    if has_prompted_objects(settings):
        assert settings.objects is not None  # the recipe fills it in
        return settings.objects
    return 1 if tasks is None else sum(task.channels for task in tasks)


def _counts(step: CountedStep) -> dict:
    settings, model = step.settings, step.model
    saved = step.saved()
    worst = step.worst(saved["step"])
    keeps = keeps_embeddings(model.sam, settings)
    adapter = sum(t.nbytes for t in trained_state(model.sam).values())
    return {
        "trained_parameters": sum(p.numel() for p in step.trained),
        "saved_bytes": saved,
        "peak_bytes": {**worst.peak, "total": worst.total},
        "flop": {"forward": worst.forward.flops, "backward": worst.backward.flops},
        "embedding_bytes": embedding_bytes(model) if keeps else None,
        "embeddings_of": ("validation" if settings.changes_images else "all") if keeps else None,
        "disk_bytes": sum(files_of_run(adapter, settings.keep)),
    }


def text(result: dict) -> str:
    """``dry_run``'s result for readers."""
    chunk, peak = result["decoder_chunk"], result["peak_bytes"]
    encoder = f"fused, memory {result['memory']}" if result["fuse"] else "not fused"
    accumulated = f", {result['accumulate']} batches per step" if result["accumulate"] > 1 else ""
    number = result["objects_per_image"]
    objects = f"{number} object{'s' if number > 1 else ''} per image"
    objects += "" if result["prompt"] == "none" else f" and {_prompt(result['prompt'], number)}"
    if result["tasks"] is not None:
        channels = ", ".join(f"{name} {count}" for name, count in result["tasks"].items())
        objects = f"channels of tasks: {channels}"
    head = (
        f"{result['model']} at {result['image_size']} pixels, {result['method']}, batches of "
        f"{result['batch_size']}{accumulated}, {objects}, encoder "
        f"{encoder}, base {result['base_dtype']}, precision {result['precision']} on "
        f"{result['device']}" + (f", decoder in chunks of {chunk}" if chunk else "")
    )
    parts = {name: size for name, size in peak.items() if name != "total"}
    if parts["next_batch"] == 0:
        del parts["next_batch"]
    rows = [
        ("trained parameters", f"{result['trained_parameters']:,}"),
        ("saved by the encoder", readable(result["saved_bytes"]["encoder"])),
        ("saved by the step", readable(result["saved_bytes"]["step"])),
        ("peak memory", readable(peak["total"])),
        *((f"  {name.replace('_', ' ')}", readable(size)) for name, size in parts.items()),
        *((f"FLOP {way}", f"{flop / 1e12:.3f} T") for way, flop in result["flop"].items()),
    ]
    if result["embedding_bytes"] is not None:
        images = "images" if result["embeddings_of"] == "all" else "validation images"
        size = f"{readable(result['embedding_bytes'])} for each of the {images}"
        rows.append(("kept in main memory", size))
    rows.append(("disk, with states", readable(result["disk_bytes"])))
    lines = [f"  {name:<22}{value:>16}" for name, value in rows]
    plan = [] if result["plan"] is None else [result["plan"]["sentence"]]
    return "\n".join([*plan, head, *lines])


def _prompt(prompt: str, number: int) -> str:
    """The prompts of so many objects, in words."""
    one, many = {
        "box": ("box", "boxes"),
        "point": ("point", "points"),
        "mixed": ("box or point", "boxes or points"),
    }[prompt]
    return f"its {one}" if number == 1 else f"their {many}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
