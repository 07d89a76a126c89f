# SPDX-License-Identifier: Apache-2.0
"""Choose the tasks that the TA-LoRA layers of a model work for."""

import torch
from torch import Tensor, nn

from samfast.adapters.adapter import adapters
from samfast.adapters.attachment import attachment_within
from samfast.adapters.foreign import Model
from samfast.adapters.wrappers import unwrapped
from samfast.kernels.task_core.op import check_task
from samfast.methods.ta_lora.layer import TaskLoraLinear, entries_of


def set_task(model: Model, task: int | str | Tensor, *, repeated: bool = False) -> Model:
    """Set the tasks that the TA-LoRA layers of a model work for from now on, in place.

    task: one task for the whole batch, by number or name; "all" for a batch repeated for each task
        (task 0's samples, then task 1's, …); or an int64 tensor (E,) of task numbers, where E
        divides the batch and entry i belongs to its i-th part
    repeated: True if the encoder repeats the batch for the tasks, as MultiTaskSam does

    All threads that run the model see the tasks. A tensor on a GPU is read, which waits for the
    GPU. With torch.utils.checkpoint, call backward before you set other tasks. Raises ValueError if
    the model has no such layers, a task does not exist, or a task is merged into the weights.
    """
    layers = _task_layers(model)
    chosen = numbers_of(model, task)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} has the update of a task merged; call unmerge() first")
    moved: dict[torch.device, Tensor] = {}
    for layer in layers.values():
        device = layer.weight.device
        if device not in moved:
            moved[device] = entries_of(chosen, device)
        if layer.chosen != chosen or layer.entries.device != device:
            layer.choose(chosen, moved[device])
        layer.repeated = repeated
    return model


def _task_layers(model: nn.Module) -> dict[str, TaskLoraLinear]:
    found = adapters(unwrapped(model))
    layers = {name: layer for name, layer in found.items() if isinstance(layer, TaskLoraLinear)}
    if not layers:
        kind = type(unwrapped(model)).__name__
        raise ValueError(f"this {kind} has no layers with tasks; attach samfast.TaLora")
    return layers


def numbers_of(model: nn.Module, task: int | str | Tensor) -> tuple[int, ...]:
    """Turn what ``set_task`` takes into numbers; raise ValueError for an unknown task."""
    tasks = next(iter(_task_layers(model).values())).tasks
    if isinstance(task, Tensor):
        if task.dtype != torch.int64 or task.dim() != 1 or not len(task):
            raise ValueError(
                f"task is {task.dtype} of shape {tuple(task.shape)}; it must be int64 of (entries,)"
            )
        numbers = tuple(task.tolist())
        for value in numbers:
            check_task(value, tasks)
        return numbers
    if isinstance(task, str) and task == "all":
        return tuple(range(tasks))
    attached = attachment_within(model)
    names = getattr(getattr(attached, "method", None), "names", None) or ()
    if isinstance(task, str):
        if task not in names:
            known = ", ".join(names) if names else f"the numbers 0 to {tasks - 1}"
            raise ValueError(f"there is no task {task!r}; known are {known}")
        task = names.index(task)
    if isinstance(task, bool) or not isinstance(task, int):
        raise ValueError(f"task is {task!r}; it must be a number, a name, 'all' or an int64 tensor")
    check_task(task, tasks)
    return (task,)
