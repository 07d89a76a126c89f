# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on a data folder, from checks to saved adapters; runs on accelerate."""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import samfast
from samfast.adapters.finite import not_finite
from samfast.adapters.trained import trained_state
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models import image_size
from samfast.training.build import attach_method, build_base
from samfast.training.checks import check_settings
from samfast.training.data import EpochSampler
from samfast.training.dry_run import dry_run
from samfast.training.embeddings import keep_embeddings
from samfast.training.goal import Goal
from samfast.training.joined import JoinedBatches, own_loader
from samfast.training.launched import Launched
from samfast.training.many_tasks import ManyTasks
from samfast.training.one_mask import OneMask
from samfast.training.pictures import curves_png
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.progress import Losses, Progress, peak_memory_mib
from samfast.training.ranks import check_kind, own_random_numbers, start
from samfast.training.recipe import method_of, with_recipe
from samfast.training.records import RunFolder, output_folder
from samfast.training.run_record import run_record
from samfast.training.settings import STEPS_PER_EPOCH, FinetuneSettings
from samfast.training.try_out import backend_asked_for

if TYPE_CHECKING:
    from accelerate import Accelerator

Say = Callable[[str], None]


def finetune(settings: FinetuneSettings, command: Sequence[str] | None = None) -> dict:
    """Fine-tune a SAM as the settings say; returns the summary that ``summary.json`` holds.

    command: the words of the command line, for settings.json

    Everything that can be wrong with the settings, the data and the model is found before
    training begins and before anything is written: ValueError or FileNotFoundError with one
    sentence. A loss that is not finite ends in FloatingPointError and keeps the last good adapter.
    With ``dry_run``, nothing of this happens: the result is that of samfast.training.dry_run.
    """
    if settings.dry_run:
        return dry_run(settings)
    check_settings(settings)
    settings = with_recipe(settings)
    output = output_folder(settings)
    goal: Goal = (OneMask if settings.tasks is None else ManyTasks)(settings)
    declare_missing_schemas()  # torchmetrics imports torchvision where it finds it
    accelerator, dtype = _accelerator(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        check_kind(accelerator.distributed_type.value)
        method = method_of(settings, goal.tasks)
        with (
            backend_asked_for(settings.backend, method, settings.fuse, accelerator.device, dtype),
            _run_folder(settings, goal, output, accelerator, command) as folder,
        ):
            return _finetune(settings, goal, folder, accelerator, dtype)
    finally:
        _release(accelerator)


def _finetune(
    settings: FinetuneSettings,
    goal: Goal,
    folder: RunFolder,
    accelerator: "Accelerator",
    dtype: torch.dtype,
) -> dict:
    say = _speaker(settings, accelerator)
    base = base_dtype(settings.base_dtype, dtype, accelerator.device)
    sam = build_base(settings, goal.tasks)
    seed_everything(settings.seed)
    attach_method(sam, settings, base)
    own_random_numbers(settings.seed)
    goal.check()
    trainable = sum(parameter.numel() for _, parameter in samfast.trainable_parameters(sam))
    say(
        f"{settings.model} at {image_size(sam)} pixels, {settings.method}, {trainable:,} trained "
        f"parameters, {str(dtype).removeprefix('torch.')} on {accelerator.device.type}"
    )
    for sentence in goal.sentences():
        say(sentence)
    run = Run(settings, accelerator, sam, dtype, goal, say)
    folder.check_room(sum(t.nbytes for t in trained_state(sam).values()))
    try:
        return run.train(folder)
    except KeyboardInterrupt:
        kept = f"{folder.folder} keeps epoch {len(folder.rows)}"
        kept = kept if folder.rows else "nothing was saved"
        raise KeyboardInterrupt(f"interrupted; {kept}") from None


def _run_folder(
    settings: FinetuneSettings,
    goal: Goal,
    output: Path,
    accelerator: "Accelerator",
    command: Sequence[str] | None,
) -> RunFolder:
    """The output folder, which opening claims and tries out before the model is built."""
    saved = {
        **dataclasses.asdict(settings),
        "train": [pair.stem for pair in goal.split.train],
        "val": [pair.stem for pair in goal.split.val],
        **run_record(accelerator.device, accelerator.num_processes, command),
    }

    def draw(rows: list[dict]) -> bytes:
        return curves_png(rows, goal.loss_name, goal.curves, goal.baseline_line())

    return RunFolder(
        output,
        saved,
        goal.columns,
        draw,
        overwrite=settings.overwrite,
        decoders=len(goal.tasks or (None,)),
        main=accelerator.is_main_process,
    )


class Run:
    """One fine-tuning run: model, optimizer, loaders and the best score so far."""

    def __init__(
        self,
        settings: FinetuneSettings,
        accelerator: "Accelerator",
        sam: nn.Module,
        dtype: torch.dtype,
        goal: Goal,
        say: Say,
    ):
        self.settings = settings
        self.accelerator = accelerator
        self.say = say
        self.sam = sam
        self.dtype = dtype
        self.goal = goal
        side = image_size(sam)
        self.parameters = [parameter for _, parameter in samfast.trainable_parameters(sam)]
        groups = samfast.parameter_groups(
            sam, settings.lr, settings.weight_decay, relation_lr=settings.relation_lr
        )
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
        workers = _workers(settings, accelerator.device)
        data, collate = goal.training_data(side)
        place = Launched(accelerator.process_index, accelerator.num_processes)
        repeats = _repeats(settings, len(data), place.processes)
        sampler = EpochSampler(len(data), settings.seed, repeats)
        self.batches = JoinedBatches(sampler, settings.batch_size, place)
        loader = DataLoader(
            data,
            batch_sampler=self.batches,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=workers > 0,
        )
        self.plain_model = goal.segmenter(sam, dtype)
        self.model, self.optimizer = accelerator.prepare(self.plain_model, optimizer)
        keep_embeddings(self.plain_model, settings, goal.split, say)
        self.loader = own_loader(loader, accelerator.device)
        steps = settings.epochs * math.ceil(len(self.loader) / settings.accumulate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, _schedule(settings.schedule, steps)
        )
        # Not prepared: a loader evened out over processes would repeat images and falsify scores.
        mine = goal.split.val[place.rank :: place.processes]
        self.val_loader = goal.validation_loader(mine, side, settings.batch_size, workers)
        self.step = 0
        self.best: dict | None = None

    def train(self, folder: RunFolder) -> dict:
        settings, goal, main = self.settings, self.goal, self.accelerator.is_main_process
        began = time.perf_counter()
        for epoch in range(1, settings.epochs + 1):
            row = self.train_epoch(epoch)
            row.update(goal.scores(self.plain_model, self.val_loader))
            improved = self.best is None or row[goal.score] > self.best[goal.score]
            if improved:
                self.best = row
            if main:
                folder.begin()
                self.save(folder.folder / "adapter" / "last", row)
                if improved:
                    self.save(folder.folder / "adapter" / "best", row)
                folder.add_epoch(row)
                if improved:
                    self.draw_overlays(folder)
            self.accelerator.wait_for_everyone()
            self.say(
                f"epoch {epoch}/{settings.epochs}  loss {row['train_loss']:.4f}  "
                f"{goal.epoch_text(row)}  {row['images_per_second']:.1f} images/s"
                f"{'  best' if improved else ''}"
            )
        summary = {
            "output": str(folder.folder),
            "best_epoch": self.best["epoch"],
            **goal.summary(self.best),
            "epochs": settings.epochs,
            "steps": self.step,
            "trained_parameters": sum(parameter.numel() for parameter in self.parameters),
            "images_per_second": row["images_per_second"],
            "peak_memory_mib": row["peak_memory_mib"],
            "seconds": round(time.perf_counter() - began, 2),
            "device": str(self.accelerator.device),
            "precision": str(self.dtype).removeprefix("torch."),
        }
        if main:
            folder.write_json("summary.json", summary)
        self.say(f"{goal.closing(self.best)}; results are in {folder.folder}")
        return summary

    def train_epoch(self, epoch: int) -> dict:
        """One pass over the training images; returns its row of the table, without scores."""
        accelerator, settings = self.accelerator, self.settings
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        self.loader.set_epoch(epoch)
        parts = zip(self.batches.counts(), self.batches.weights(self.goal.counts), strict=True)
        self.model.train()
        total = len(self.loader) * settings.batch_size
        progress = Progress(
            f"epoch {epoch}/{settings.epochs}", total, main=accelerator.is_main_process
        )
        losses = Losses(self.step)
        lr = self.schedule.get_last_lr()[0]
        with progress:
            for batch, (images, weights) in zip(self.loader, parts, strict=True):
                with accelerator.accumulate(self.model):
                    loss = self.loss(batch, weights)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and settings.clip > 0:
                        accelerator.clip_grad_norm_(self.parameters, settings.clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if accelerator.sync_gradients:
                    self.step += 1
                    lr = self.schedule.get_last_lr()[0]
                    if not accelerator.optimizer_step_was_skipped:
                        self.schedule.step()
                losses.add(loss, images)
                if progress.advance(len(batch.images)):
                    progress.show(losses.mean())
            losses.join(accelerator.reduce)
            mean = losses.mean()  # waits for the device, so the clock below is right
            rate = torch.tensor(progress.images_per_second(), device=accelerator.device)
        rate = accelerator.reduce(rate, reduction="sum").item()
        if (bad := not_finite(trained_state(self.sam))) is not None:  # all that save() would write
            raise FloatingPointError(
                f"{bad} is no longer finite after epoch {epoch}; the results of earlier epochs are "
                "kept, a smaller --lr may help"
            )
        return {
            "epoch": epoch,
            "step": self.step,
            "train_loss": mean,
            "images_per_second": round(rate, 3),
            "peak_memory_mib": peak_memory_mib(accelerator.device),
            "lr": lr,
        }

    def loss(self, batch, weights: Sequence[float] | None = None) -> Tensor:
        """The goal's loss, and what the adapters add to it.

        weights: of this process's means in the mean over processes, the images' first
        """
        if weights is None:
            return self.goal.loss(self.model, batch) + samfast.aux_loss(self.sam)
        loss = self.goal.loss(self.model, batch, weights[1:])
        return loss + weights[0] * samfast.aux_loss(self.sam)

    def save(self, folder: Path, row: dict) -> None:
        scores = {name: row[name] for name in ("epoch", *self.goal.columns)}
        samfast.save_adapter(self.sam, folder, **scores, **self.goal.remembered())

    def draw_overlays(self, folder: RunFolder) -> None:
        """image | truth | prediction of a few validation images, spread over the set."""
        val = self.goal.split.val
        count = min(self.settings.overlays, len(val))
        if count == 0:
            return
        chosen = [val[i * len(val) // count] for i in range(count)]
        for name, panel in self.goal.overlays(self.plain_model, chosen, image_size(self.sam)):
            folder.add_overlay(name, panel)


def seed_everything(seed: int) -> None:
    """Seed what draws the adapters' first values and their dropout."""
    from accelerate.utils import set_seed

    set_seed(seed)


def _accelerator(settings: FinetuneSettings) -> tuple["Accelerator", torch.dtype]:
    from accelerate import Accelerator
    from accelerate.state import is_initialized

    if is_initialized():
        raise RuntimeError(
            "accelerate is already initialised in this process; finetune starts its own"
        )
    dtype = autocast_dtype(settings.precision, start().device)
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
    accelerator = Accelerator(
        mixed_precision=names[dtype], gradient_accumulation_steps=settings.accumulate
    )
    return accelerator, dtype


def _release(accelerator: "Accelerator") -> None:
    """Leave accelerate as if it had not been used, so that another run may choose otherwise."""
    from accelerate.state import AcceleratorState, GradientState

    accelerator.free_memory()
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=accelerator.num_processes == 1)


def _schedule(name: str, steps: int) -> Callable[[int], float]:
    """The learning rate's factor as a function of the optimizer step alone.

    cosine and constant begin with a linear warm-up over 5 % of the steps (at most 50). polynomial
    is that of Conv-LoRA's authors: no warm-up, power 1, end 0.
    """
    warmup = max(1, min(50, steps // 20))

    def factor(step: int) -> float:
        if name == "polynomial":
            return max(0.0, 1.0 - step / max(1, steps))
        if step < warmup or name == "constant":
            return min(1.0, (step + 1) / warmup)
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _repeats(settings: FinetuneSettings, images: int, processes: int) -> int:
    if settings.repeats is not None:
        return settings.repeats
    step = settings.batch_size * settings.accumulate * processes
    return math.ceil(STEPS_PER_EPOCH * step / images)


def _workers(settings: FinetuneSettings, device: torch.device) -> int:
    if settings.workers is not None:
        return settings.workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def _speaker(settings: FinetuneSettings, accelerator: "Accelerator") -> Say:
    def say(sentence: str) -> None:
        if accelerator.is_main_process:
            print(sentence, file=sys.stderr if settings.json else sys.stdout, flush=True)

    return say
