# SPDX-License-Identifier: Apache-2.0
"""A run as a record and tensors, and back: all but the adapter, which has files of its own."""

from typing import Any

import torch
from torch import Tensor

import samfast
from samfast.training.random_states import random_states, restore_random_states
from samfast.training.scored import Scored
from samfast.training.states import State

_OPTIMIZER = "optimizer"
_RANDOM = "random"


def record_of(run: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON values, tensors) of a ``Run``; all processes of it have to ask."""
    from accelerate.utils import gather_object

    moments = run.optimizer.optimizer.state_dict()["state"]
    found = gather_object([random_states(run.accelerator.device)])
    tensors = {
        f"{_OPTIMIZER}.{index}.{key}": value
        for index, own in moments.items()
        for key, value in own.items()
    }
    for rank, (_, own) in enumerate(found):
        tensors.update({f"{_RANDOM}.{rank}.{key}": value for key, value in own.items()})
    scaler = run.accelerator.scaler
    record = {
        **run.origin,
        "epoch": run.epoch,
        "batch": run.batch,
        "step": run.step,
        "rows": run.rows,
        "best": None if run.best is None else run.rows.index(run.best),
        "scored": None if run.scored is None else run.scored._asdict(),
        "losses": run.losses.values,
        "counts": run.losses.counts,
        "lr": run.lr,
        "seconds": run.elapsed(),
        "trained": run.trained_so_far(),
        "schedule": {"steps": run.schedule.done, "scores": run.schedule.scores},
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": [values for values, _ in found],
    }
    return record, tensors


def restore(run: Any, state: State) -> None:
    """Put a ``Run`` where ``record_of`` found it; ValueError when the state is of another model."""
    record = state.record
    flags = [(parameter, parameter.requires_grad) for parameter in run.sam.parameters()]
    samfast.load_adapter(run.sam, state.folder)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    run.schedule.go_on(**record["schedule"])
    _restore_optimizer(run, state)
    if run.accelerator.scaler is not None and record["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(record["scaler"])
    run.epoch, run.batch, run.step = record["epoch"], record["batch"], record["step"]
    run.rows = record["rows"]
    run.best = None if record["best"] is None else run.rows[record["best"]]
    run.scored = None if record["scored"] is None else Scored(**record["scored"])
    run.losses.values, run.losses.counts = record["losses"], record["counts"]
    run.lr, run.seconds, run.trained = record["lr"], record["seconds"], record["trained"]
    rank, device = run.accelerator.process_index, run.accelerator.device
    own = _under(f"{_RANDOM}.{rank}.", state.tensors)
    restore_random_states(record["random"][rank], own, device)


def _restore_optimizer(run: Any, state: State) -> None:
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in _under(f"{_OPTIMIZER}.", state.tensors).items():
        index, _, key = name.partition(".")
        found.setdefault(int(index), {})[key] = value
    optimizer = run.optimizer.optimizer
    groups = optimizer.state_dict()["param_groups"]  # settings and schedule have made them
    optimizer.load_state_dict({"state": found, "param_groups": groups})


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
