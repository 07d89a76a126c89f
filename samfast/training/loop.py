# SPDX-License-Identifier: Apache-2.0
"""Fine-tune on a data folder, from checks to saved adapters, with accelerate."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import samfast
from samfast.adapters.trained import trained_state
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models import image_size
from samfast.training.augment import check_augment
from samfast.training.build import attach_method, build_base
from samfast.training.callbacks import Callback, check_callbacks
from samfast.training.checks import check_settings
from samfast.training.chosen_tasks import masks_of, specs_of
from samfast.training.coco_items import check_no_annotations
from samfast.training.dataset_goal import DatasetGoal
from samfast.training.decoded import decoded_files
from samfast.training.dry_run import dry_run
from samfast.training.goal import Goal
from samfast.training.goals import goal_of
from samfast.training.graphs import check_graph
from samfast.training.pictures import curves_png
from samfast.training.plan import memory_of, planned
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.ranks import check_accumulation, check_kind, own_random_numbers, start
from samfast.training.recipe import method_of, with_recipe
from samfast.training.records import RunFolder, output_folder
from samfast.training.resume import NEWEST, check_same_run, state_for
from samfast.training.run import Run, Say
from samfast.training.run_record import run_record
from samfast.training.settings import FinetuneSettings
from samfast.training.split_checks import stacks_sentence
from samfast.training.states import State, read_state
from samfast.training.stopping import Interrupted, StopAsked, stop_asked
from samfast.training.tiled_goal import Tiled
from samfast.training.try_out import backend_asked_for

if TYPE_CHECKING:
    from accelerate import Accelerator


def finetune(
    settings: FinetuneSettings,
    dataset: Any = None,
    *,
    callbacks: Sequence[Callback] = (),
    command: Sequence[str] | None = None,
) -> dict:
    """Fine-tune a SAM; return the content of ``summary.json``.

    dataset: (image, mask) items, instead of ``data``; see ``DatasetGoal``
    callbacks: called during training; see ``Callback``
    command: the command line, for settings.json

    Settings, data and model are checked before anything is written; ValueError or FileNotFoundError
    says what is wrong in one sentence. A loss that is not finite raises FloatingPointError and
    keeps the last good state. SIGINT, SIGTERM and SIGHUP save a state after the current step and
    raise ``Interrupted``, a KeyboardInterrupt. ``resume`` continues from there, with the same
    results. With ``dry_run``, return the result of samfast.training.dry_run and do not train.

    Example:
        settings = FinetuneSettings(data=Path("cells"), checkpoint=Path("sam_vit_b.pth"))
        print(finetune(settings)["val_dice"])
    """
    if settings.dry_run:
        return dry_run(settings)
    if isinstance(settings.resume, bool) and settings.resume:  # as for the option that stands alone
        settings = dataclasses.replace(settings, resume=NEWEST)
    check_settings(settings, needs_data=dataset is None)
    check_augment(settings.augment)
    check_callbacks(callbacks)
    settings = with_recipe(settings)
    goal: Goal | None = None if dataset is None else DatasetGoal(settings, dataset)
    output = output_folder(settings)
    settings = dataclasses.replace(settings, output=output)
    if goal is None:
        goal = _goal(settings)
    declare_missing_schemas()  # torchmetrics imports torchvision where it finds it
    with stop_asked() as asked:
        accelerator, dtype = _accelerator(settings)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        try:
            check_kind(accelerator.distributed_type.value)
            check_graph(settings, accelerator.device, accelerator.num_processes)
            method = method_of(settings, goal.tasks)
            settings = _planned(settings, accelerator)
            with (
                backend_asked_for(
                    settings.backend, method, settings.fuse, accelerator.device, dtype
                ),
                _run_folder(settings, goal, output, accelerator, command) as folder,
                _decoded_for(goal, accelerator, output),
            ):
                return _finetune(settings, goal, folder, accelerator, dtype, callbacks, asked)
        finally:
            _release(accelerator)


def _goal(settings: FinetuneSettings) -> Goal:
    """Return the goal of the settings for a folder; finds its files."""
    if masks_of(settings) != "instances" and settings.tasks is None:
        check_no_annotations(settings.folder, settings.mask_suffix)
    return goal_of(settings, specs_of(settings))


@contextmanager
def _decoded_for(goal: Goal, accelerator: "Accelerator", output: Path) -> Iterator[None]:
    """Decoded images next to the results, where a goal cuts tiles from them."""
    if not isinstance(goal, Tiled):
        yield
        return
    place = accelerator.num_processes, accelerator.is_main_process
    with decoded_files(output, *place) as goal.decoded:
        yield


def _planned(settings: FinetuneSettings, accelerator: "Accelerator") -> FinetuneSettings:
    """The settings with what ``fit`` and ``memory`` auto mean here, which is said."""
    card = memory_of(accelerator.device)
    if accelerator.num_processes > 1 and card is not None:
        from accelerate.utils import gather_object

        card = min(gather_object([card]))  # all follow one plan
    asked = settings.memory
    settings, plan = planned(settings, accelerator.device, card)
    accelerator.gradient_accumulation_steps = settings.accumulate
    if plan is not None:
        here = "; this run is on a CPU" if accelerator.device.type == "cpu" else ""
        _speaker(settings, accelerator)(plan.sentence() + here)
    elif asked != settings.memory:
        _speaker(settings, accelerator)(f"memory auto is {settings.memory} on a CPU")
    return settings


def _finetune(
    settings: FinetuneSettings,
    goal: Goal,
    folder: RunFolder,
    accelerator: "Accelerator",
    dtype: torch.dtype,
    callbacks: Sequence[Callback],
    asked: StopAsked,
) -> dict:
    say = _speaker(settings, accelerator)
    facts = _facts(settings, goal, accelerator, dtype)
    state = _state(settings, folder, facts, accelerator, say)
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
    for sentence in (*stacks_sentence(goal.split), *goal.sentences()):
        say(sentence)
    run = Run(settings, accelerator, sam, dtype, goal, say, callbacks)
    run.origin = {"settings": folder.settings, "facts": facts}
    folder.check_room(sum(t.nbytes for t in trained_state(sam).values()))
    if state is not None:
        run.restore(state, folder)
        folder.save_settings()
    try:
        return run.train(folder, asked)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Interrupted):
            raise
        kept = f"{folder.folder} keeps epoch {len(folder.rows)}"
        kept = kept if folder.rows else "nothing was saved"
        raise KeyboardInterrupt(f"interrupted; {kept}") from None


def _state(
    settings: FinetuneSettings,
    folder: RunFolder,
    facts: dict,
    accelerator: "Accelerator",
    say: Say,
) -> State | None:
    """The state that the run goes on from, in every process; None for a run from the start."""
    if settings.resume is None:
        return None
    from accelerate.utils import broadcast_object_list

    state: State | None = None
    remarks: list[str] = []
    if accelerator.is_main_process:
        state, remarks = state_for(settings, folder.folder)
    named = [None if state is None else str(state.folder)]
    if accelerator.num_processes > 1:
        broadcast_object_list(named)
        if state is None and named[0] is not None:
            state = read_state(Path(named[0]))
    if state is not None:
        remarks.append(check_same_run(state, folder.settings, facts))
    for remark in filter(None, remarks):
        say(remark)
    return state


def _facts(
    settings: FinetuneSettings, goal: Goal, accelerator: "Accelerator", dtype: torch.dtype
) -> dict:
    """What else than settings a run depends on."""
    return {
        "samfast": samfast.__version__,
        "torch": torch.__version__,
        "device": accelerator.device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "processes": accelerator.num_processes,
        "what is learned": goal.remembered(),
        "images": goal.fingerprints() if settings.keep else {},
    }


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
        resume=settings.resume is not None,
        keep=settings.keep,
    )


def seed_everything(seed: int) -> None:
    """Seed what draws the adapters' first values and their dropout."""
    from accelerate.utils import set_seed

    set_seed(seed)


def _accelerator(settings: FinetuneSettings) -> tuple["Accelerator", torch.dtype]:
    from accelerate import Accelerator
    from accelerate.state import is_initialized
    from accelerate.utils import GradientAccumulationPlugin

    if is_initialized():
        raise RuntimeError(
            "accelerate is already initialised in this process; call finetune before anything "
            "else uses it"
        )
    dtype = autocast_dtype(settings.precision, start().device)
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
    check_accumulation(settings.accumulate)
    # As a plugin: accelerate launch's own number, which is 1 unless told, would win otherwise.
    steps = GradientAccumulationPlugin(num_steps=settings.accumulate)
    accelerator = Accelerator(mixed_precision=names[dtype], gradient_accumulation_plugin=steps)
    return accelerator, dtype


def _release(accelerator: "Accelerator") -> None:
    """Leave accelerate as if it had not been used, so that another run may choose otherwise."""
    from accelerate.state import AcceleratorState, GradientState

    accelerator.free_memory()
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=accelerator.num_processes == 1)


def _speaker(settings: FinetuneSettings, accelerator: "Accelerator") -> Say:
    def say(sentence: str) -> None:
        if accelerator.is_main_process:
            with suppress(BrokenPipeError):  # whoever read along has gone; the run has not
                print(sentence, file=sys.stderr if settings.json else sys.stdout, flush=True)

    return say
