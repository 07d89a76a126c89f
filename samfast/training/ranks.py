# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one model: their group and their devices."""

import functools
import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from samfast.training.launched import Launched, launched, tell_torch

if TYPE_CHECKING:
    from accelerate import PartialState

_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
SECONDS_TO_MEET = 120  # programs on several machines start at different times


def meeting_place() -> distributed.Store:
    """Where the processes leave messages for each other; ValueError when not all of them came."""
    found = _met()
    if isinstance(found, str):
        raise ValueError(found)
    return found


@functools.cache
def _met() -> distributed.Store | str:
    """The place, or why there is none; it is waited for once."""
    from torch.distributed.rendezvous import rendezvous

    place = launched()
    tell_torch()
    patience = timedelta(seconds=SECONDS_TO_MEET)
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.processes, timeout=patience))
        store = distributed.PrefixStore("samfast", store)
        store.set(f"here/{place.rank}", "")
        store.wait([f"here/{rank}" for rank in range(place.processes)], patience)
    except distributed.DistError as error:
        return (
            f"not all of {place.processes} processes started within {SECONDS_TO_MEET} s "
            f"({str(error).partition('. ')[0]}); start all of them, or unset WORLD_SIZE for one"
        )
    return store


def start() -> "PartialState":
    """accelerate's state of this process, with the group of all where there are several.

    Honours ACCELERATE_USE_CPU. Several processes without a GPU work on CPUs.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    place = launched()
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if place.processes == 1 or distributed.is_initialized():
        return _checked(PartialState(cpu=cpu), place)
    cpu = cpu or not _has_gpus()
    if not cpu:
        _check_gpus()
    group = {"store": meeting_place(), "rank": place.rank, "world_size": place.processes}
    return _checked(PartialState(cpu=cpu, **group), place)


def _checked(state: "PartialState", place: Launched) -> "PartialState":
    if state.num_processes != place.processes:
        raise ValueError(
            f"WORLD_SIZE is {place.processes}, but accelerate's group has {state.num_processes}; "
            "let samfast start it"
        )
    return state


def own_random_numbers(seed: int) -> None:
    """Give each process but the first its own stream, for dropout and the gates' noise."""
    place = launched()
    if not place.first:
        torch.manual_seed(seed + place.rank)


def check_kind(kind: str) -> None:
    """Raise ValueError if accelerate would shard or replace the model."""
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            "samfast finetune needs the whole model in each process, but accelerate is set to "
            f"{kind}; start it with torchrun, or write a loop of your own (README, Several "
            "processes)"
        )


def check_accumulation(steps: int) -> None:
    """Raise ValueError if accelerate is set to a number that is neither 1 nor these steps."""
    told = os.environ.get(_ACCUMULATION, "1")
    if told not in ("1", str(steps)):
        raise ValueError(
            f"accelerate accumulates {told} steps, but samfast {steps}; pass --accumulate {told}, "
            f"or unset {_ACCUMULATION}"
        )


def _has_gpus() -> bool:
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type != "mps"


def _check_gpus() -> None:
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
    if here > gpus:
        raise ValueError(
            f"{here} processes on a machine with {gpus} GPUs; start at most {gpus} there, or set "
            "ACCELERATE_USE_CPU=1"
        )
