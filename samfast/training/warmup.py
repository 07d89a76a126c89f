# SPDX-License-Identifier: Apache-2.0
"""``samfast warmup``: compile the kernels of a training run before its first step.

The model is built as ``finetune`` does it, with random weights. Steps of training and validation
run with every launch left out, which says what they would launch. That is compiled in parallel.
A real step then loads all of it, and compiles what depends on values.

The whole encoder runs: its first block needs no gradient of its input, and SAM-COBOT's kernels
depend on how many blocks there are. The last batch of an epoch may be smaller, so all sizes count.
"""

import dataclasses
import os
import time
from typing import Any

import torch

from samfast import backends
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models import image_size
from samfast.training.build import attach_method, build_base
from samfast.training.checks import check_settings
from samfast.training.chosen_tasks import specs_of
from samfast.training.evaluate import scoring
from samfast.training.kernel_cache import Form, compile_forms, noting_compiles, recording
from samfast.training.plan import planned
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.progress import duration
from samfast.training.recipe import with_recipe
from samfast.training.segmenters import Segmenter, TaskSegmenter
from samfast.training.settings import MEMORY, FinetuneSettings, WarmupSettings
from samfast.training.step_counts import CountedStep, MaskStep, TaskStep


def warmup(settings: WarmupSettings) -> dict[str, Any]:
    """Fill Triton's cache for ``finetune`` with these settings; the result that ``--json`` prints.

    kernels: how many forms of kernels the steps launch   compiled: those that were not in the cache
    found: those that were   cache: the cache's folder

    Raises ValueError, with one sentence, for settings that are wrong and where no GPU is.

    Example:
        print(text(warmup(WarmupSettings(model="vit_h", batch_size=4))))
    """
    training = FinetuneSettings(**vars(settings), random_init=True)
    check_settings(training, needs_data=False)
    device = _device()
    began = time.perf_counter()
    declare_missing_schemas()
    training, _ = planned(with_recipe(training), device)
    steps = Steps(training, device)
    forms = steps.forms()
    if not forms:
        raise ValueError(
            "expected steps that launch Triton kernels, got none; leave out --no-fuse and unset "
            "SAMFAST_BACKEND"
        )
    there = _compile(forms)
    with noting_compiles() as late:
        steps.run(training.batch_size)
        torch.cuda.synchronize()
    compiled = there.count(False) + late.count(False)
    return {
        "model": training.model,
        "image_size": image_size(steps.model.sam),
        "method": training.method,
        "batch_size": training.batch_size,
        "precision": str(steps.dtype).removeprefix("torch."),
        "memory": (training.memory or MEMORY[0]) if training.fuse else None,
        "gpu": torch.cuda.get_device_name(),
        "kernels": len(forms) + late.count(False),
        "compiled": compiled,
        "found": there.count(True),
        "seconds": round(time.perf_counter() - began, 1),
        "cache": _folder(),
    }


def text(result: dict[str, Any]) -> str:
    """``warmup``'s result for readers."""
    return (
        f"{result['model']} at {result['image_size']} pixels, {result['method']}, batches of "
        f"{result['batch_size']}, {result['precision']} on {result['gpu']}\n"
        f"{result['kernels']} kernels: {result['compiled']} compiled, {result['found']} found in "
        f"the cache, in {duration(result['seconds'])}\n"
        f"they are in {result['cache']}; samfast finetune with the same options compiles none"
    )


class Steps:
    """The steps that ``finetune`` makes of settings with their recipe, at any batch size."""

    def __init__(self, settings: FinetuneSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.dtype = autocast_dtype(settings.precision, device)
        self.specs = specs_of(settings)
        tasks = None if self.specs is None else [spec.task for spec in self.specs]
        sam = build_base(settings, tasks)
        attach_method(sam, settings, base_dtype(settings.base_dtype, self.dtype, device))
        kind = Segmenter if self.specs is None else TaskSegmenter
        model: Segmenter | TaskSegmenter = kind(sam, self.dtype, settings.decoder_chunk)
        self.model = model.to(device).train()

    def run(self, count: int) -> None:
        """One batch of ``count`` images: forward, backward, and once more as in validation."""
        step = self._step(count)
        step.loss().backward()
        for parameter in step.trained:
            parameter.grad = None
        with scoring(self.model):
            step.loss()

    def forms(self) -> list[Form]:
        """What batches of all sizes launch, found without a launch."""
        with recording() as forms:
            for count in range(self.settings.batch_size, 0, -1):
                self.run(count)
        return list(forms.values())

    def _step(self, count: int) -> CountedStep[Any]:
        settings = dataclasses.replace(self.settings, batch_size=count)
        if isinstance(self.model, Segmenter):
            return MaskStep(self.model, settings, self.device)
        assert self.specs is not None, self.model
        return TaskStep(self.model, settings, self.device, self.specs)


def _device() -> torch.device:
    """The GPU; raises ValueError if kernels cannot be compiled for one."""
    device = torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError(
            "TRITON_INTERPRET is 1, but interpreted kernels are not compiled; unset it"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "expected a GPU to compile kernels for, found none; run samfast warmup on the machine "
            "that trains"
        )
    if (sentence := backends.triton_missing(device)) is not None:
        raise ValueError(f"{sentence}; without Triton there are no kernels to compile")
    return device


def _compile(forms: list[Form]) -> list[bool]:
    """Compile all, with a bar on a terminal; of each, whether the cache had it."""
    from tqdm import tqdm
    from triton.runtime import driver

    there: list[bool] = []
    with tqdm(desc="compile", total=len(forms), unit=" kernels", leave=False, disable=None) as bar:

        def done(form: Form, found: bool) -> None:
            there.append(found)
            bar.set_postfix_str(form.kernel, refresh=False)
            bar.update()

        compile_forms(forms, driver.active.get_current_target(), done)
    return there


def _folder() -> str:
    import triton

    return str(triton.knobs.cache.dir)
