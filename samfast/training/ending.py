# SPDX-License-Identifier: Apache-2.0
"""End a command in several processes: one error sentence and one exit code for all.

Each process leaves word of its end, and the first one prints for all. Where that one is gone, the
others print for themselves. A process that failed leaves the group, so that no other waits for it.
Importing this loads no torch.
"""

import contextlib
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from samfast.training.launched import Launched

if TYPE_CHECKING:
    from torch.distributed import Store

SECONDS_FOR_WORD = 10
_SAID = "said"

Say = Callable[[str], None]


class Ending(NamedTuple):
    """How a process would end by itself.

    sentence: what is wrong, None for nothing to print   lost: only because another one was gone
    """

    code: int
    sentence: str | None = None
    lost: bool = False


def run_together(place: Launched, command: Callable[[], Ending], say: Say) -> int:
    """Run this process's part of a command; return the exit code that all processes share.

    An error that is not of the user's making keeps its traceback, and ends the others with 1.
    """
    ending = Ending(1)
    try:
        with _silent(place):
            ending = command()
    finally:
        ending = _agreed(place, ending, say)
    return ending.code


def is_lost(error: RuntimeError) -> bool:
    """Whether the error says that another process has left the group."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def _silent(place: Launched) -> Iterator[None]:
    """Only the first process has a standard output."""
    if place.first:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _agreed(place: Launched, ending: Ending, say: Say) -> Ending:
    """The ending that all processes have; its sentence is printed once."""
    from torch import distributed

    from samfast.training.ranks import meeting_place

    if ending.code == 0:
        return ending
    _leave()
    try:
        return _of_all(meeting_place(), place, ending, say)
    except (ValueError, distributed.DistError):  # nobody to agree with
        if ending.sentence is not None:
            say(ending.sentence)
        return ending


def _of_all(store: "Store", place: Launched, own: Ending, say: Say) -> Ending:
    store.set(_key(place.rank), json.dumps(own))
    patience = 0 if place.first else 2 * SECONDS_FOR_WORD
    if (said := _word(store, _SAID, patience)) is not None:
        store.set(_heard(place.rank), json.dumps(said))
        return said  # by the first, or by another while the first worked on
    found, words = own, {}
    if place.first:
        words = _words(store, map(_key, range(place.processes)))
        causes = [word for word in words.values() if word.code and not word.lost]
        found = causes[0] if causes else own
    if found.sentence is not None:
        say(found.sentence)
    store.set(_SAID, json.dumps(found))
    # The first may hold the messages, and stays until they are read.
    _words(store, (_heard(rank) for rank in range(1, place.processes) if _key(rank) in words))
    return found


def _words(store: "Store", keys: Iterable[str]) -> dict[str, Ending]:
    """What comes under these keys while there is patience."""
    until = time.monotonic() + SECONDS_FOR_WORD
    found = {key: _word(store, key, until - time.monotonic()) for key in keys}
    return {key: word for key, word in found.items() if word is not None}


def _word(store: "Store", key: str, patience: float) -> Ending | None:
    """What is left under a key within so many seconds, None for nothing."""
    until = time.monotonic() + patience
    while not store.check([key]):
        if time.monotonic() >= until:
            return None
        time.sleep(0.05)
    return Ending(*json.loads(store.get(key)))


def _key(rank: int) -> str:
    return f"ending/{rank}"


def _heard(rank: int) -> str:
    return f"heard/{rank}"


def _leave() -> None:
    """Leave the group, and finish even when a launcher wants to end what is left."""
    from torch import distributed

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.collect()  # a wrapped model would keep its connections
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
