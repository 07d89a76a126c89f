# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on a data folder, from checks to saved adapters; runs on accelerate."""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import samfast
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models import image_size
from samfast.training import pictures, start
from samfast.training.data import Batch, Collate, EpochSampler, PairDataset, binary_mask
from samfast.training.dry_run import dry_run
from samfast.training.evaluate import evaluate, predicted_masks, validation_loader
from samfast.training.folders import Pair, Split, check_pairs, find_split
from samfast.training.images import read_image, read_mask
from samfast.training.losses import LOSSES
from samfast.training.metrics import all_foreground_scores
from samfast.training.progress import Losses, Progress, peak_memory_mib
from samfast.training.records import RunFolder
from samfast.training.settings import STEPS_PER_EPOCH, FinetuneSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

Say = Callable[[str], None]


def finetune(settings: FinetuneSettings) -> dict:
    """Fine-tune a SAM as the settings say; returns the summary that ``summary.json`` holds.

    Everything that can be wrong with the settings, the data and the model is found before
    training begins and before anything is written: ValueError or FileNotFoundError with one
    sentence. A loss that is not finite ends in FloatingPointError and keeps the last good adapter.
    With ``dry_run``, nothing of this happens: the result is that of samfast.training.dry_run.
    """
    if settings.dry_run:
        return dry_run(settings)
    start.check_settings(settings)
    settings = start.with_recipe(settings)
    output = start.output_folder(settings)
    split = find_split(settings.data, val_fraction=settings.val_fraction, seed=settings.seed)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    declare_missing_schemas()  # torchmetrics imports torchvision where it finds it
    accelerator, dtype = _accelerator(settings)
    try:
        method = start.method_of(settings)
        with start.backend_asked_for(
            settings.backend, method, settings.fuse, accelerator.device, dtype
        ):
            return _finetune(settings, split, output, accelerator, dtype)
    finally:
        _release(accelerator)


def _finetune(
    settings: FinetuneSettings,
    split: Split,
    output: Path,
    accelerator: "Accelerator",
    dtype: torch.dtype,
) -> dict:
    say = _speaker(settings, accelerator)
    base = start.base_dtype(settings.base_dtype, dtype, accelerator.device)
    sam = start.build_base(settings)
    seed_everything(settings.seed)
    start.attach_method(sam, settings, base)
    check_pairs((*split.train, *split.val), settings.foreground)
    truths = (binary_mask(read_mask(pair.mask), settings.foreground) for pair in split.val)
    all_foreground = all_foreground_scores(torch.from_numpy(truth) for truth in truths)
    trainable = sum(parameter.numel() for _, parameter in samfast.trainable_parameters(sam))
    say(
        f"{settings.model} at {image_size(sam)} pixels, {settings.method}, {trainable:,} trained "
        f"parameters, {str(dtype).removeprefix('torch.')} on {accelerator.device.type}"
    )
    if settings.prompt == "box":
        say(
            "each image is prompted by the box around its foreground, whose sides move by up to "
            f"{settings.box_jitter:g} pixels in training"
        )
    say(
        f"{len(split.train)} training and {len(split.val)} validation images; calling everything "
        f"foreground scores Dice {all_foreground[0]:.4f}, IoU {all_foreground[1]:.4f}"
    )
    saved = {
        **dataclasses.asdict(settings),
        "train": [pair.stem for pair in split.train],
        "val": [pair.stem for pair in split.val],
    }
    run = Run(settings, accelerator, sam, dtype, split, say)
    folder = RunFolder(output, saved, all_foreground)
    try:
        return run.train(folder)
    except KeyboardInterrupt:
        kept = f"{output} keeps epoch {len(folder.rows)}" if folder.rows else "nothing was saved"
        raise KeyboardInterrupt(f"interrupted; {kept}") from None
    finally:
        folder.close()


class Run:
    """One fine-tuning run: model, optimizer, loaders and the best score so far."""

    def __init__(
        self,
        settings: FinetuneSettings,
        accelerator: "Accelerator",
        sam: nn.Module,
        dtype: torch.dtype,
        split: Split,
        say: Say,
    ):
        self.settings = settings
        self.accelerator = accelerator
        self.say = say
        self.sam = sam
        self.dtype = dtype
        self.split = split
        side = image_size(sam)
        self.parameters = [parameter for _, parameter in samfast.trainable_parameters(sam)]
        groups = samfast.parameter_groups(
            sam, settings.lr, settings.weight_decay, relation_lr=settings.relation_lr
        )
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
        workers = _workers(settings, accelerator.device)
        data = PairDataset(
            split.train,
            side,
            foreground=settings.foreground,
            flips=settings.flips,
            prompt=settings.prompt,
            box_jitter=settings.box_jitter,
            seed=settings.seed,
        )
        loader = DataLoader(
            data,
            batch_size=settings.batch_size,
            sampler=EpochSampler(
                len(data), settings.seed, _repeats(settings, len(data), accelerator.num_processes)
            ),
            collate_fn=Collate(side, truths=False),
            num_workers=workers,
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=workers > 0,
        )
        self.plain_model = start.Segmenter(sam, dtype, settings.decoder_chunk)
        self.model, self.optimizer, self.loader = accelerator.prepare(
            self.plain_model, optimizer, loader
        )
        steps = settings.epochs * math.ceil(len(self.loader) / settings.accumulate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, _schedule(settings.schedule, steps)
        )
        # Not prepared: a loader evened out over processes would repeat images and falsify scores.
        mine = split.val[accelerator.process_index :: accelerator.num_processes]
        self.val_loader = validation_loader(
            mine, side, settings.batch_size, settings.foreground, workers, settings.prompt
        )
        self.step = 0
        self.best: dict | None = None

    def train(self, folder: RunFolder) -> dict:
        settings, main = self.settings, self.accelerator.is_main_process
        began = time.perf_counter()
        for epoch in range(1, settings.epochs + 1):
            row = self.train_epoch(epoch)
            row["val_dice"], row["val_iou"] = evaluate(self.plain_model, self.val_loader)
            improved = self.best is None or row["val_dice"] > self.best["val_dice"]
            if improved:
                self.best = row
            if main:
                folder.add_epoch(row)
                self.save(folder.folder / "adapter" / "last", row)
                if improved:
                    self.save(folder.folder / "adapter" / "best", row)
                    self.draw_overlays(folder)
            self.accelerator.wait_for_everyone()
            self.say(
                f"epoch {epoch}/{settings.epochs}  loss {row['train_loss']:.4f}  "
                f"val Dice {row['val_dice']:.4f} (all foreground "
                f"{folder.all_foreground[0]:.4f})  IoU {row['val_iou']:.4f}  "
                f"{row['images_per_second']:.1f} images/s{'  best' if improved else ''}"
            )
        summary = {
            "output": str(folder.folder),
            "best_epoch": self.best["epoch"],
            "val_dice": self.best["val_dice"],
            "val_iou": self.best["val_iou"],
            "all_foreground_dice": folder.all_foreground[0],
            "all_foreground_iou": folder.all_foreground[1],
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
        self.say(
            f"best validation Dice {self.best['val_dice']:.4f} in epoch {self.best['epoch']} (all "
            f"foreground {folder.all_foreground[0]:.4f}); results are in {folder.folder}"
        )
        return summary

    def train_epoch(self, epoch: int) -> dict:
        """One pass over the training images; returns its row of the table, without scores."""
        accelerator, settings = self.accelerator, self.settings
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        self.loader.set_epoch(epoch)
        self.model.train()
        total = len(self.loader) * settings.batch_size
        progress = Progress(
            f"epoch {epoch}/{settings.epochs}", total, main=accelerator.is_main_process
        )
        losses = Losses(self.step)
        lr = self.schedule.get_last_lr()[0]
        with progress:
            for batch in self.loader:
                with accelerator.accumulate(self.model):
                    loss = self.loss(batch)
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
                losses.add(loss, len(batch.images))
                if progress.advance(len(batch.images)):
                    progress.show(losses.mean())
            mean = losses.mean()  # waits for the device, so the clock below is right
            rate = progress.images_per_second()
        totals = accelerator.reduce(
            torch.tensor([mean * losses.images, losses.images, rate], device=accelerator.device),
            reduction="sum",
        ).tolist()
        for name, parameter in samfast.trainable_parameters(self.sam):
            if not parameter.isfinite().all():
                raise FloatingPointError(
                    f"{name} is no longer finite after epoch {epoch}; a smaller --lr may help"
                )
        return {
            "epoch": epoch,
            "step": self.step,
            "train_loss": totals[0] / totals[1],
            "images_per_second": round(totals[2], 3),
            "peak_memory_mib": peak_memory_mib(accelerator.device),
            "lr": lr,
        }

    def loss(self, batch: Batch) -> Tensor:
        """The settings' loss, and what the adapters add to it."""
        logits, valid = self.model(batch.images, batch.sizes, batch.boxes)
        loss = LOSSES[self.settings.loss](logits, batch.masks, valid)
        return loss + samfast.aux_loss(self.sam)

    def save(self, folder: Path, row: dict) -> None:
        foreground = self.settings.foreground
        samfast.save_adapter(
            self.sam,
            folder,
            epoch=row["epoch"],
            val_dice=row["val_dice"],
            val_iou=row["val_iou"],
            foreground=None if foreground is None else list(foreground),
            prompt=self.settings.prompt,
            box_jitter=self.settings.box_jitter,
        )

    def draw_overlays(self, folder: RunFolder) -> None:
        """image | truth | prediction of a few validation images, spread over the set."""
        count = min(self.settings.overlays, len(self.split.val))
        if count == 0:
            return
        chosen = [self.split.val[i * len(self.split.val) // count] for i in range(count)]
        settings = self.settings
        panels = overlay_panels(self.plain_model, chosen, settings.foreground, settings.prompt)
        for pair, panel in panels:
            folder.add_overlay(pair.stem, panel)


def overlay_panels(model: start.Segmenter, pairs: list[Pair], foreground=None, prompt="none"):
    """(pair, image | truth | prediction at the image's size) for each pair."""
    loader = validation_loader(pairs, image_size(model.sam), 1, foreground, prompt=prompt)
    for pair, (predicted, truth) in zip(pairs, predicted_masks(model, loader), strict=True):
        image = read_image(pair.image)
        panel = pictures.overlay_panel(image, truth.cpu().numpy(), predicted.cpu().numpy())
        yield pair, panel


def seed_everything(seed: int) -> None:
    """Seed what draws the adapters' first values and their dropout."""
    from accelerate.utils import set_seed

    set_seed(seed)


def _accelerator(settings: FinetuneSettings) -> tuple["Accelerator", torch.dtype]:
    from accelerate import Accelerator, PartialState
    from accelerate.state import is_initialized

    if is_initialized():
        raise RuntimeError(
            "accelerate is already initialised in this process; finetune starts its own"
        )
    dtype = start.autocast_dtype(settings.precision, PartialState().device)
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
