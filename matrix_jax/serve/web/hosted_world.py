"""One world that is served: its engine, sessions, metrics and files."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import jax

from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.serve.runtime.engine import Engine
from matrix_jax.serve.runtime.session import Session
from matrix_jax.serve.runtime.session_manager import GRACE_SECONDS, Refused, SessionManager
from matrix_jax.serve.runtime.snapshot import HEADER_BYTES
from matrix_jax.serve.web.encoding import to_jpeg, to_mp4
from matrix_jax.serve.web.metrics import Metrics
from matrix_jax.serve.web.transfers import Transfers

PICTURE_BYTES = 8 * 2**20
HEARTBEAT_SECONDS = 60  # an engine that is silent for longer is not healthy


class HostedWorld:
    """A world with players.

    Args:
      stream: compiled.
      folder, recipe, grace, open_admission: as of `SessionManager`.

    Attributes:
      manager: the sessions; set by `open`.
      world_bytes: size limit of a `.world` file: a carry, and a log that may hold a picture.
    """

    def __init__(
        self,
        stream: BatchedStream,
        folder,
        recipe: str,
        grace: float = GRACE_SECONDS,
        open_admission: bool = True,
    ):
        self.metrics = Metrics()
        self.engine = Engine(stream, to_jpeg, self._record_step)
        self._manager_args = folder, recipe, self.metrics, grace, open_admission
        self.manager: SessionManager | None = None
        leaves = jax.tree.leaves(stream.carry_shapes)
        self.world_bytes = sum(one.size * one.dtype.itemsize for one in leaves) + HEADER_BYTES
        self.transfers = Transfers(4 * self.world_bytes)

    def _record_step(self, seconds: float, active: int):
        self.metrics.record_step(seconds, self.engine.stream.frames_per_step, self.engine.spacing)

    def open(self):
        """Creates the session manager in the running event loop; this may compile."""
        self.manager = SessionManager(self.engine, *self._manager_args)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the engine; every compilation from now on is counted."""
        self.engine.start()
        stop_watching = self.metrics.watch_compiler()
        try:
            yield
        finally:
            stop_watching()
            self.manager.close()
            await asyncio.to_thread(self.engine.stop)

    def state(self) -> dict:
        """The fields of /healthz."""
        silent = time.monotonic() - self.engine.heartbeat
        return {
            'ok': self.engine.alive and silent < HEARTBEAT_SECONDS,
            'players': len(self.manager.sessions),
            'places': self.engine.stream.num_slots,
            'engine_quiet_seconds': round(silent, 1),
        }

    def file(self, session: Session, method: str, name: str):
        """The ASGI response to a download or upload of a session; None if there is no such file."""
        downloads = {
            'world': (self.manager.save, 'application/octet-stream', 'drive.world'),
            'replay': (self._dump_log, 'application/json', 'session.json'),
            'video': (self._make_video, 'video/mp4', 'drive.mp4'),
        }
        uploads = {
            'world': (self.manager.load, self.world_bytes),
            'picture': (self.manager.start_from_picture, PICTURE_BYTES),
        }
        if method != 'POST' and name in downloads:
            return self.transfers.download(session, *downloads[name])
        if method == 'POST' and name in uploads:
            return self.transfers.upload(session, *uploads[name])
        return None

    async def _dump_log(self, session: Session) -> bytes:
        timeline = await self.manager.copy_log(session)
        return await asyncio.to_thread(lambda: timeline.dumps().encode())

    async def _make_video(self, session: Session) -> bytes:
        if not session.recorded:
            raise Refused('nothing was recorded yet')
        frames = list(session.recorded)
        return await self.transfers.run_exclusive(session, to_mp4, frames, session.fps)
