# SPDX-License-Identifier: Apache-2.0
"""Every Triton launch that must compile cleanly, at its real sizes.

They are found in ``kernels/<operation>/launches.py``. Its function ``launches(quick)`` yields

    name   such as "lora_linear bfloat16 r4"; it begins with the operation's
    call   runs the launchers on tensors without data. Where some GPUs have tiles of their own,
           this is a dict of calls: "sm_90" for such a GPU, and "default" for all others

With quick it yields a configuration or two of the usual use. Otherwise it yields every dtype, each
tile of its tiles.json, each option, and the largest size that ``supports()`` lets through.

Launches that lead to the same code cost nothing: they are compiled once.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping

from benchmarks.cubin import SHARED_LIMITS
from benchmarks.offline import Launch, recording
from samfast.kernels import operations


def recorded(calls: Callable[[], None] | Mapping[str, Callable[[], None]]) -> list[Launch]:
    """The launches of a call, or of calls by target for the GPUs of each."""
    if callable(calls):
        with recording() as launches:
            calls()
        return launches
    made = []
    for target, call in calls.items():
        archs = [arch for arch in SHARED_LIMITS if f"sm_{arch}" == target]
        if target == "default":
            archs = [arch for arch in SHARED_LIMITS if f"sm_{arch}" not in calls]
        made += [dataclasses.replace(launch, archs=tuple(archs)) for launch in recorded(call)]
    return made


def of(operation: str) -> Callable[[bool], Iterator[tuple[str, list[Launch]]]]:
    """What yields (name, launches) of one operation, named after it."""

    def launches(quick: bool):
        own = importlib.import_module(f"samfast.kernels.{operation}.launches")
        for name, calls in own.launches(quick):
            yield name, recorded(calls)

    launches.__name__ = operation
    return launches


OPERATIONS = tuple(of(operation) for operation in operations("launches.py"))


def registered(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """(name, launches) of every operation."""
    for operation in OPERATIONS:
        yield from operation(quick)
