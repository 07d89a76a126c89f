# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to stop: it finishes its step and saves first.

Importing this loads no torch.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and did. signal: the number of the signal"""

    def __init__(self, sentence: str, number: int = signal.SIGINT):
        super().__init__(sentence)
        self.signal = int(number)


class StopAsked:
    """Whether a signal has come.

    Before ``saving`` there is nothing to finish: a signal raises Interrupted at once. A second
    signal always ends the process at once, as if there were no handler.
    """

    def __init__(self) -> None:
        self.number = 0
        self.saving = False
        self.noticed: list[int] = []  # the signals whose handler this is

    def __call__(self, number: int, frame: object) -> None:
        self.number = number
        for one in self.noticed:
            signal.signal(one, signal.SIG_DFL)
        name = signal.Signals(number).name
        if not self.saving:
            raise Interrupted(f"{name} before training began; nothing was changed", number)
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            text = (
                f"samfast: {name}: finishing this step, then saving; send it again to stop at "
                "once\n"
            )
            os.write(sys.stderr.fileno() if _has_descriptor() else 2, text.encode())

    def agree(self, largest: Callable[[int], int]) -> None:
        """Let all processes know of a signal that reached one of them."""
        self.number = largest(self.number)


@contextlib.contextmanager
def stop_asked() -> Iterator[StopAsked]:
    """Notice signals inside the ``with``; the handlers of before are back after it.

    A signal that was ignored, as under nohup, stays ignored. Only the main thread can notice.
    """
    stop = StopAsked()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in _present():
            number = getattr(signal, name)
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
                stop.noticed.append(number)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(_: int = 0) -> None:
    """For processes that load images: the run that they belong to ends them."""
    for name in _present():
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def _present() -> list[str]:
    return [name for name in _NAMES if hasattr(signal, name)]


def _has_descriptor() -> bool:
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
