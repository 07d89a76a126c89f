# SPDX-License-Identifier: Apache-2.0
"""The most bytes that tensors take during a real optimizer step on a CPU, as its allocator says.

torch's profiler sees every allocation of the step, those inside operators of C++ too; what was
alive before is counted by storages. Not seen is what a library takes by itself, without torch.
"""

import gc

import torch
from torch.profiler import ProfilerActivity, profile

import samfast
from samfast.models import image_size
from samfast.training.build import attach_method, build_base
from samfast.training.losses import LOSSES
from samfast.training.many_tasks import tasks_loss
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.recipe import with_recipe
from samfast.training.segmenters import Segmenter, TaskSegmenter
from samfast.training.step_counts import _batch, _task_batch
from samfast.training.tasks import read_tasks
from samfast.training.watch import clip_gradients

CPU = torch.device("cpu")


class Allocations:
    """The most bytes that calls inside had allocated at once, less what they freed."""

    def __enter__(self):
        self._profile = profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        now = self.most = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            now += change
            self.most = max(self.most, now)
        assert self.most > 0, "the profiler saw no allocation"


def storage_bytes(tensors) -> int:
    storages = [t.untyped_storage() for t in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class MeasuredStep:
    """A step as finetune makes it, with real tensors: forward, backward, clip, AdamW."""

    def __init__(self, settings):
        self.settings = settings = with_recipe(settings)
        dtype = autocast_dtype(settings.precision, CPU)
        self.specs = None if settings.tasks is None else read_tasks(settings.tasks)
        tasks = None if self.specs is None else [spec.task for spec in self.specs]
        base = base_dtype(settings.base_dtype, dtype, CPU)
        self.sam = attach_method(build_base(settings, tasks), settings, base)
        kind = Segmenter if tasks is None else TaskSegmenter
        self.model = kind(self.sam, dtype, settings.decoder_chunk).train()
        self.parameters = [p for _, p in samfast.trainable_parameters(self.sam)]
        self.optimizer = torch.optim.AdamW(samfast.parameter_groups(self.sam, 1e-4), fused=True)
        self.batches = [self.batch() for _ in range(2)]  # the loader reads one ahead

    def batch(self):
        count, side = self.settings.batch_size, image_size(self.sam)
        if self.specs is None:
            batch = _batch(count, side, CPU, self.settings.prompt)
            if self.settings.prompt == "box":
                batch.boxes[:, 2:] = side
        else:
            batch = _task_batch(count, side, CPU, self.specs)
        batch.sizes.fill_(side)
        return batch

    def loss(self, batch):
        if self.specs is not None:
            return tasks_loss(self.model, batch, self.specs) + samfast.aux_loss(self.sam)
        logits, valid = self.model(batch.images, batch.sizes, batch.boxes)
        loss = LOSSES[self.settings.loss](logits, batch.masks, valid)
        return loss + samfast.aux_loss(self.sam)

    def step(self):
        for number in range(self.settings.accumulate):
            self.loss(self.batches[number % 2]).backward()
        clip_gradients(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak(self) -> int:
        """Bytes of the second step, whose optimizer has its moments."""
        self.step()
        gc.collect()
        own = [*self.sam.parameters(), *self.sam.buffers()]
        own += [t for state in self.optimizer.state.values() for t in state.values()]
        for batch in self.batches:
            values = [v for v in batch._asdict().values() if isinstance(v, torch.Tensor)]
            own += [*values, *getattr(batch, "targets", {}).values()]
        with Allocations() as allocations:
            self.step()
        return storage_bytes(own) + allocations.most
