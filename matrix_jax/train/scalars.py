"""Scalars of a run in a TensorBoard event file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping


class Scalars:
    """Writes scalars to a new event file in `folder`, flushing each time.

    A failed write is reported once and the run continues. (tensorboardX's own writer thread ends at
    a failed write, after which a run on a full disk would wait forever.)

    Args:
      folder: folder of the run.
      active: False for processes that must not write.
    """

    def __init__(self, folder: str, active: bool = True):
        from tensorboardX.event_file_writer import EventsWriter

        os.makedirs(folder, exist_ok=True)
        self.folder, self.failed = folder, False
        self._writer = EventsWriter(os.path.join(folder, 'events')) if active else None

    def write(self, step: int, values: Mapping[str, float]):
        """Adds one value of each name."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None:
            return
        summary = Summary(
            value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        try:
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._writer.flush()
        except OSError as error:
            if not self.failed:
                print(
                    f'{self.folder}: scalars could not be written ({error.strerror})',
                    file=sys.stderr,
                )
            self.failed = True

    def close(self):
        """Closes the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
