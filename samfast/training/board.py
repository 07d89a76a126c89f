# SPDX-License-Identifier: Apache-2.0
"""Scores for TensorBoard, in a file that only ever holds whole records.

TensorBoard's own writer uses a thread; when the disk is full, it prints a traceback and may not
report the error.
"""

import errno
import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from samfast.files.placing import named
from samfast.training.pictures import png_bytes

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event


class Board:
    """An events file in ``folder``, which is made if need be; NotWritten when that fails.

    first: TensorBoard leaves out what earlier files have from this step on
    """

    def __init__(self, folder: Path, first: int = 0):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        began = time.time()
        name = f"events.out.tfevents.{int(began):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self.path = folder / name
        with named(folder):
            folder.mkdir(exist_ok=True)
        self._append(Event(wall_time=began, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=began, step=first, session_log=start))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Append a value for each name; NotWritten leaves the file as it was."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        pairs = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=pairs)))

    def add_image(self, name: str, image: Image.Image, step: int) -> None:
        """Append an RGB picture; NotWritten leaves the file as it was."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        picture = Summary.Image(
            height=image.height,
            width=image.width,
            colorspace=3,
            encoded_image_string=png_bytes(image),
        )
        summary = Summary(value=[Summary.Value(tag=name, image=picture)])
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def _append(self, event: "Event") -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        with named(self.path), open(self.path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                if file.write(record.getbuffer()) < record.getbuffer().nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
