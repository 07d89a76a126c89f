# SPDX-License-Identifier: Apache-2.0
"""One fine-tuning run: its steps, its epochs, what it saves and where it goes on from."""

import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import samfast
from samfast.adapters.finite import not_finite
from samfast.adapters.trained import trained_state
from samfast.files.adapter_files import adapter_files
from samfast.files.format import read_adapter
from samfast.files.placing import write_together
from samfast.models import image_size
from samfast.training.callbacks import Callback
from samfast.training.data import EpochSampler
from samfast.training.embeddings import keep_embeddings
from samfast.training.goal import Goal
from samfast.training.graphs import graphed
from samfast.training.joined import JoinedBatches, own_loader
from samfast.training.launched import Launched
from samfast.training.progress import Progress, peak_memory_mib, time_left
from samfast.training.records import RunFolder
from samfast.training.run_card import files_with_card
from samfast.training.run_state import record_of, restore
from samfast.training.schedules import Schedule, check_schedule
from samfast.training.scored import Scored
from samfast.training.settings import STEPS_PER_EPOCH, FinetuneSettings
from samfast.training.states import State
from samfast.training.stopping import Interrupted, StopAsked, ignore_signals
from samfast.training.watch import Losses, NotFinite, clip_gradients

if TYPE_CHECKING:
    from accelerate import Accelerator

Say = Callable[[str], None]


class _Stopping(Exception):
    """A signal came while validation went on."""


class Run:
    """Model, optimizer, loaders, and how far the run is.

    epoch, batch: the epoch at hand and how many of its batches are done   step: optimizer steps
    rows: the lines of the table so far   best: the one with the best score, of which scored is
    """

    def __init__(
        self,
        settings: FinetuneSettings,
        accelerator: "Accelerator",
        sam: nn.Module,
        dtype: torch.dtype,
        goal: Goal,
        say: Say,
        callbacks: Sequence[Callback] = (),
    ):
        self.settings = settings
        self.accelerator = accelerator
        self.say = say
        self.sam = sam
        self.dtype = dtype
        self.goal = goal
        self.callbacks = tuple(callbacks)
        side = image_size(sam)
        named = list(samfast.trainable_parameters(sam))
        names = tuple(name for name, _ in named)
        self.parameters = tuple(parameter for _, parameter in named)
        assert settings.lr is not None and settings.schedule is not None  # the recipe has them
        groups = samfast.parameter_groups(
            sam, settings.lr, settings.weight_decay, relation_lr=settings.relation_lr
        )
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
        workers = _workers(settings, accelerator.device)
        data, collate = goal.training_data(side)
        place = Launched(accelerator.process_index, accelerator.num_processes)
        images = len(cast("Sized", data))
        repeats = _repeats(settings, images, place.processes)
        sampler = EpochSampler(images, settings.seed, repeats)
        self.batches = JoinedBatches(sampler, settings.batch_size, place)
        loader = DataLoader(
            data,
            batch_sampler=self.batches,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals,
            generator=torch.Generator().manual_seed(settings.seed),  # draws nothing of training's
        )
        self.plain_model = goal.segmenter(sam, dtype)
        self.model, self.optimizer = accelerator.prepare(self.plain_model, optimizer)
        keep_embeddings(self.plain_model, settings, goal.steady(), len(goal.views("val")), say)
        self.graph = graphed(sam, settings, say)
        self.loader = own_loader(loader, accelerator.device)
        steps = settings.epochs * math.ceil(len(self.batches) / settings.accumulate)
        check_schedule(settings.schedule, steps)
        self.schedule = Schedule(optimizer, settings.schedule, steps)
        # Not prepared: a loader evened out over processes would repeat images and falsify scores.
        mine = goal.split.val[place.rank :: place.processes]
        self.val_loader = goal.validation_loader(mine, side, settings.batch_size, workers)
        self.losses = Losses(names, accelerator.reduce)
        self.epoch, self.batch, self.step = 1, 0, 0
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.scored: Scored | None = None
        self.lr = self.schedule.lr()
        self.seconds = 0.0  # of earlier processes
        self.trained = (0, 0.0)  # images and seconds of the epoch at hand, in earlier processes
        self._began = time.perf_counter()
        self._progress: Progress | None = None
        self._place: tuple[int, int] | None = None  # of the newest state
        self.stop_reason = ""
        self.origin: dict[str, Any] = {}  # kept with each state: settings, and other facts
        self._saved_at = "nothing was saved"

    def elapsed(self) -> float:
        """Seconds that the run has trained, in all processes one after the other."""
        return self.seconds + time.perf_counter() - self._began

    def trained_so_far(self) -> tuple[int, float]:
        """Images and seconds of the epoch at hand."""
        images, seconds = self.trained
        if self._progress is None:
            return images, seconds
        return images + self._progress.images, seconds + self._progress.seconds()

    def stop(self, reason: str) -> None:
        """End the run after the epoch at hand; reason: what it says about that"""
        self.stop_reason = reason

    def restore(self, state: State, folder: RunFolder) -> None:
        """Resume from a state; raises ValueError if it belongs to another model."""
        restore(self, state)
        folder.rows = list(self.rows)
        self._saved_at = f"{state.folder} is kept"
        self._place = state.place
        if self.batch == 0 and self.rows:  # the state is saved before the results are
            folder.rows.pop()
            self._finish_epoch(folder, self.rows[-1])
        best = folder.folder / "adapter" / "best"
        if self.best is not None and _epoch_of(best) != self.best["epoch"]:
            wrong = f"{best} is not of epoch {self.best['epoch']}, the best one"
            if self.epoch > self.settings.epochs:
                raise ValueError(f"{wrong}, and no epoch is left; give more --epochs")
            self.say(f"{wrong}: the next epoch replaces it")
            self.best = self.scored = None

    def train(self, folder: RunFolder, asked: StopAsked) -> dict[str, Any]:
        settings, goal = self.settings, self.goal
        asked.saving = True
        self._began, done = time.perf_counter(), len(self.rows)
        self._call("on_begin")
        while self.epoch <= settings.epochs and not self._is_enough():
            row = self.train_epoch(folder, asked)
            scored = self.scores(folder, asked)
            row.update(scored.row)
            improved = self.best is None or row[goal.score] > self.best[goal.score]
            self.rows.append(row)
            if improved:
                self.best, self.scored = row, scored
            self.schedule.end_epoch(row[goal.score])
            self.epoch, self.batch = self.epoch + 1, 0
            self.losses = Losses(self.losses.names, self.losses.reduce)
            self.trained = (0, 0.0)
            self.save_state(folder)
            self._finish_epoch(folder, row)
            now = len(self.rows)
            left = time_left(self.elapsed() - self.seconds, now - done, settings.epochs - now)
            self.say(
                f"epoch {row['epoch']}/{settings.epochs}  loss {row['train_loss']:.4f}  "
                f"{goal.epoch_text(row)}  {row['images_per_second']:.1f} images/s"
                f"{'  best' if improved else ''}{left and '  '}{left}"
            )
            self._call("on_epoch", row)
            self._stop_if_asked(folder, asked, saved=True)
        if self.stop_reason:
            self.say(self.stop_reason)
        summary = self._summary(folder)
        if self.accelerator.is_main_process:
            folder.write_json("summary.json", summary)
        assert self.best is not None, self.rows  # at least one epoch is done
        self.say(f"{goal.closing(self.best)}; results are in {folder.folder}")
        self._call("on_end", summary)
        return summary

    def train_epoch(self, folder: RunFolder, asked: StopAsked) -> dict[str, Any]:
        """The rest of the epoch at hand; returns its row of the table, without scores."""
        accelerator, settings, losses = self.accelerator, self.settings, self.losses
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        self.loader.set_epoch(self.epoch)
        self.batches.skip(self.batch)
        self.model.train()
        total = (len(self.batches) - self.batch) * settings.batch_size
        title = f"epoch {self.epoch}/{settings.epochs}"
        joined = settings.accumulate if self.goal.joins_steps else 1
        weights = self.batches.weights(self.goal.counts, joined)
        parts = zip(self.batches.counts(), weights, strict=True)
        with (
            self._explained(),
            Progress(title, total, main=accelerator.is_main_process) as progress,
        ):
            self._progress = progress
            for batch, (count, own) in zip(self.loader, parts, strict=True):
                self._train_batch(batch, count, own)
                if losses.due():
                    losses.look()
                if accelerator.sync_gradients:
                    self._after_step(folder, asked)
                if progress.advance(len(batch.images)) and losses.values:
                    progress.show(losses.mean())
            losses.look()  # waits for the device, so the clock below is right
            self.trained, self._progress = self.trained_so_far(), None
            images, seconds = self.trained
            rate = torch.tensor(images / max(seconds, 1e-9), device=accelerator.device)
        self._check_finite()
        rate = accelerator.reduce(rate, reduction="sum").item()
        return {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": losses.mean(),
            "images_per_second": round(rate, 3),
            "peak_memory_mib": peak_memory_mib(accelerator.device),
            "lr": self.lr,
        }

    def loss(self, batch: Any, weights: Sequence[float] | None = None) -> Tensor:
        """The goal's loss, and what the adapters add to it.

        weights: of this process's means in the mean over processes, the images' first
        """
        if weights is None:
            return self.goal.loss(self.model, batch) + samfast.aux_loss(self.sam)
        loss = self.goal.loss(self.model, batch, weights[1:])
        return loss + weights[0] * samfast.aux_loss(self.sam)

    def scores(self, folder: RunFolder, asked: StopAsked) -> Scored:
        """The validation scores, with the images of every process."""
        from accelerate.utils import gather_object

        title = f"validation {self.epoch}/{self.settings.epochs}"
        images = len(cast("Sized", self.val_loader.dataset))
        alone = self.accelerator.num_processes == 1  # several have to stop at the same point

        def tick(count: int) -> None:
            progress.advance(count)
            if alone and asked.number:
                raise _Stopping

        with Progress(title, images, main=self.accelerator.is_main_process) as progress:
            try:
                with self._undrawn():
                    scored = self.goal.scores(self.plain_model, self.val_loader, tick)
            except _Stopping:
                self._stop_if_asked(folder, asked, saved=False)
                raise
        return scored._replace(images=gather_object(scored.images))

    def _train_batch(self, batch: Any, images: int, weights: Sequence[float] | None) -> None:
        accelerator = self.accelerator
        if self.graph is not None:
            self.graph.begin_step()
        with accelerator.accumulate(self.model):
            loss = self.loss(batch, weights)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()
                norms = clip_gradients(self.parameters, self.settings.clip)
                self.losses.add_norms(norms, self.step + 1)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses.add(loss, images, self.step + 1)
        self.batch += 1
        if accelerator.sync_gradients:
            self.step += 1
            self.lr = self.schedule.lr()
            if not accelerator.optimizer_step_was_skipped:
                self.schedule.step()
            self._call("on_step", loss.detach())

    def _after_step(self, folder: RunFolder, asked: StopAsked) -> None:
        every = self.settings.save_every
        saved = every is not None and self.step % every == 0
        if saved:
            self.save_state(folder)
        self._stop_if_asked(folder, asked, saved)

    def _stop_if_asked(self, folder: RunFolder, asked: StopAsked, saved: bool) -> None:
        """Save and raise Interrupted when a signal has come to any process."""
        if self.accelerator.num_processes > 1:
            asked.agree(self._largest)
        if asked.number == 0:
            return
        if not saved:
            self.save_state(folder)
        where = f"stopped after step {self.step}; {self._saved_at}"
        if self.settings.keep and self.settings.data is None:
            where += '; continue with the same dataset and resume="newest"'
        elif self.settings.keep:
            where += f"; continue with samfast finetune --resume {shlex.quote(str(folder.folder))}"
        raise Interrupted(where, asked.number)

    def save_state(self, folder: RunFolder) -> None:
        """Put all that is needed to go on into the run's folder."""
        self.losses.look()
        self._check_finite()
        if not self.settings.keep:
            self._saved_at = f"the adapter of epoch {len(self.rows)} is kept"
            self._saved_at = self._saved_at if self.rows else "nothing was saved"
            return
        if self._place == (self.epoch, self.batch):
            return
        record, tensors = record_of(self)
        if self.accelerator.is_main_process:
            name = f"step-{self.step:06d}" if self.batch else f"epoch-{self.epoch - 1:03d}"
            where = folder.save_state(name, self.sam, record, tensors, self.settings.keep)
            self._saved_at = f"{where} is kept"
        self._place = (self.epoch, self.batch)

    def _finish_epoch(self, folder: RunFolder, row: dict[str, Any]) -> None:
        """Write the results of an epoch; to write them again changes nothing."""
        if self.accelerator.is_main_process:
            folder.begin()
            adapters = folder.folder / "adapter"
            self.save(adapters / "last", row)
            if row is self.best:
                self.save(adapters / "best", row)
            folder.add_epoch(row)
            if row is self.best:
                assert self.scored is not None, row
                folder.write_scores(self.scored.images, self.scored.classes)
                with self._undrawn():
                    self.draw_overlays(folder)
        self.accelerator.wait_for_everyone()

    def save(self, folder: Path, row: dict[str, Any]) -> None:
        scores = {name: row[name] for name in ("epoch", *self.goal.columns)}
        files = adapter_files(self.sam, folder, **scores, **self.goal.remembered())
        trained = sum(parameter.numel() for parameter in self.parameters)
        best = self.scored if row is self.best else None
        classes = best.classes if best is not None else ()
        files = files_with_card(
            self.settings, self.goal, row, files, trained=trained, classes=classes
        )
        write_together(folder, files)

    def draw_overlays(self, folder: RunFolder) -> None:
        """image | truth | prediction of a few validation images, spread over the set."""
        val = self.goal.split.val
        count = min(self.settings.overlays, len(val))
        if count == 0:
            return
        chosen = [val[i * len(val) // count] for i in range(count)]
        for name, panel in self.goal.overlays(self.plain_model, chosen, image_size(self.sam)):
            folder.add_overlay(name, panel)

    def _is_enough(self) -> bool:
        """Whether the run may end before its last epoch."""
        patience = self.settings.patience
        if patience is not None and self.best is not None and not self.stop_reason:
            since = len(self.rows) - self.best["epoch"]
            if since >= patience:
                self.stop(f"stopped early: no better validation score in {since} epochs")
        return bool(self.stop_reason)

    def _summary(self, folder: RunFolder) -> dict[str, Any]:
        row, best = self.rows[-1], self.best
        assert best is not None, row
        return {
            "output": str(folder.folder),
            "best_epoch": best["epoch"],
            **self.goal.summary(best),
            "epochs": len(self.rows),
            "steps": self.step,
            "trained_parameters": sum(parameter.numel() for parameter in self.parameters),
            "images_per_second": row["images_per_second"],
            "peak_memory_mib": row["peak_memory_mib"],
            "seconds": round(self.elapsed(), 2),
            "device": str(self.accelerator.device),
            "precision": str(self.dtype).removeprefix("torch."),
        }

    def _check_finite(self) -> None:
        if (bad := not_finite(trained_state(self.sam))) is not None:  # all that would be saved
            raise FloatingPointError(
                f"{bad} is not finite after step {self.step}; {self._saved_at}; a smaller --lr "
                "may help"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Let a loss that is not finite be told with its images and what is kept."""
        try:
            yield
        except NotFinite as error:
            train = self.goal.views("train")
            names = dict.fromkeys(train[i].stem for i in self.batches.images(error.batch))
            raise FloatingPointError(
                f"{error}; the images were {', '.join(names)}; {self._saved_at}; a smaller --lr "
                "may help, also with --resume"
            ) from None

    @contextmanager
    def _undrawn(self) -> Iterator[None]:
        """What is drawn inside, by loaders for their workers, has no effect on training."""
        with torch.random.fork_rng(devices=()):
            yield

    def _largest(self, number: int) -> int:
        from torch import distributed

        found = torch.tensor(number, device=self.accelerator.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found.item())

    def _call(self, name: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self, *arguments)


def _epoch_of(adapter: Path) -> int | None:
    """The epoch that an adapter of a run is of; None where there is no complete one."""
    try:
        return read_adapter(adapter).record["extra"].get("epoch")
    except (ValueError, OSError):
        return None


def _repeats(settings: FinetuneSettings, images: int, processes: int) -> int:
    if settings.repeats is not None:
        return settings.repeats
    step = settings.batch_size * settings.accumulate * processes
    return math.ceil(STEPS_PER_EPOCH * step / images)


def _workers(settings: FinetuneSettings, device: torch.device) -> int:
    if settings.workers is not None:
        return settings.workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
