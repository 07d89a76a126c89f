# SPDX-License-Identifier: Apache-2.0
"""Signals: before training at once, in training after a step, a second one at once."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from samfast.training.stopping import Interrupted, ignore_signals, stop_asked

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
TWICE = """
import os, signal, sys, time
from samfast.training.stopping import stop_asked
signal.signal(signal.SIGINT, signal.default_int_handler)
with stop_asked() as asked:
    asked.saving = True
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked.number == signal.SIGTERM
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
    print("still here")
"""


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_is_taken_down_while_there_is_something_to_save(number, capfd):
    before = [signal.getsignal(one) for one in SIGNALS]
    with stop_asked() as asked:
        asked.saving = True
        os.kill(os.getpid(), number)
        assert asked.number == number
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert f"samfast: {number.name}: finishing this step, then saving" in capfd.readouterr().err


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_before_training_a_signal_ends_at_once(number):
    told = f"{number.name} before training began"
    with pytest.raises(Interrupted, match=told) as stop, stop_asked():
        os.kill(os.getpid(), number)
    assert stop.value.signal == number and isinstance(stop.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_ends_at_once():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=25)
    assert done.returncode == -signal.SIGINT and done.stdout == "asked\n"


def test_what_was_ignored_stays_ignored():
    """As nohup leaves SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_asked() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked.number == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_of_the_program_s_own_stays():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append("own"))
    try:
        with stop_asked() as asked:
            asked.saving = True
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == ["own"] and asked.number == signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_leaves_the_handlers_alone():
    seen = []

    def look():
        with stop_asked() as asked:
            seen.append((asked.number, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(0, signal.default_int_handler)]


def test_all_processes_learn_of_a_signal():
    with stop_asked() as asked:
        asked.agree(lambda number: max(number, signal.SIGTERM))
        assert asked.number == signal.SIGTERM


def test_processes_that_load_images_leave_signals_to_the_run():
    before = [signal.getsignal(one) for one in SIGNALS]
    try:
        ignore_signals()
        assert all(signal.getsignal(one) is signal.SIG_IGN for one in SIGNALS)
    finally:
        for one, handler in zip(SIGNALS, before, strict=True):
            signal.signal(one, handler)
