"""Scalars of a run as a TensorBoard event file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping


class Scalars:
    """Writes scalars to a new event file in `folder`, each time through to the disk.

    Without tensorboardX's own writer: its thread ends at the first write that fails, and then a run
    on a full disk waits for it forever. A run goes on without its scalars. Of several processes
    one writes; the others are not `active`.
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
        """Gives up the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
