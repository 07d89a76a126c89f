# SPDX-License-Identifier: Apache-2.0
"""Scores for TensorBoard: what it reads of them, and what a full disk leaves."""

import math
import os
import threading

import pytest

from samfast.files.placing import NotWritten
from samfast.training.board import Board


def read(folder) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each name, as TensorBoard reads the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    names = found.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in names}


def test_tensorboard_reads_what_is_added(tmp_path):
    board = Board(tmp_path / "board")
    assert read(tmp_path / "board") == {}
    threads = threading.active_count()
    board.add({"loss": 0.5, "score": 1}, 1)
    board.add({"loss": 0.25, "score": math.inf}, 2)
    assert threads == threading.active_count()
    expected = {"loss": [(1, 0.5), (2, 0.25)], "score": [(1, 1.0), (2, math.inf)]}
    assert read(tmp_path / "board") == expected


def test_a_later_file_takes_the_place_of_earlier_steps(tmp_path):
    """As a run does that goes on from an earlier state."""
    board = Board(tmp_path / "board")
    for step in (1, 2, 3):
        board.add({"loss": step}, step)
    board.path.rename(board.path.with_name(board.path.name.replace("events.1", "events.0")))
    again = Board(tmp_path / "board", first=2)
    again.add({"loss": 9}, 2)
    assert read(tmp_path / "board") == {"loss": [(1, 1.0), (2, 9.0)]}


@pytest.mark.skipif(os.name != "posix", reason="needs limits of the file size")
def test_a_full_disk_leaves_whole_records(tmp_path):
    import resource
    import signal

    board = Board(tmp_path / "board")
    board.add({"loss": 0.5}, 1)
    before = board.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(NotWritten, match=r"board/events\.out.* could not be written"):
            board.add({"loss": 0.25}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert board.path.read_bytes() == before
    board.add({"loss": 0.25}, 2)
    assert read(tmp_path / "board") == {"loss": [(1, 0.5), (2, 0.25)]}
