"""A worker of a cluster: serves one world to the players that the gateway sends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time

from matrix_jax.config import UsageError
from matrix_jax.serve.cluster.registry import AsyncRegistry
from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.serve.runtime.session import Session
from matrix_jax.serve.runtime.session_manager import Refused, SessionManager
from matrix_jax.serve.web import server
from matrix_jax.serve.web.app import WorldApp
from matrix_jax.serve.web.hosted_world import HostedWorld

log = logging.getLogger(__name__)
CHECKPOINT_SECONDS = 1.0  # between two checkpoints of a session
REGISTER_SECONDS = 3.0  # between two registrations of a worker
MAX_LOST_SECONDS = 2.0  # of play that a lost worker may cost; older checkpoints are logged


class WorkerServer:
    """A world behind a port of its own, in an event loop of its own.

    Args:
      stream, folder, recipe: as of `HostedWorld`.
      cfg: as of `server.serve`.
      secret: token of the port.
      registry: of the cluster.
      host: address of this machine that gateways can reach.

    Attributes:
      address: 'host:port' of the worker.

    Raises:
      UsageError: the address is not available.
      RuntimeError: the server could not start.
    """

    def __init__(
        self,
        stream: BatchedStream,
        folder,
        recipe: str,
        cfg: server.Config,
        secret: str,
        registry: AsyncRegistry,
        host: str,
    ):
        self.world = HostedWorld(stream, folder, recipe, cfg.grace, open_admission=False)
        self.registry = registry
        self._tasks: set[asyncio.Task] = set()
        listening = server.listen(dataclasses.replace(cfg, host=host, port=0, token=secret))
        self.address = f'{host}:{listening.getsockname()[1]}'
        app = WorldApp({recipe: self.world}, secret).asgi()
        self._web = server.uvicorn_server(app, cfg.players)
        # An event loop of its own, so that other work does not delay frames.
        self._thread = threading.Thread(target=self._web.run, args=([listening],), daemon=True)
        self._thread.start()
        while not self._web.started:
            if not self._thread.is_alive():
                raise RuntimeError('the world could not start')
            time.sleep(0.02)
        self.world.manager.loop.call_soon_threadsafe(self._spawn, self._register())

    async def lease(self, session: str, request: dict, data: bytes | None, paused: bool):
        """Holds a slot for a player; see `gateway.Gateway` for the arguments.

        Yields (address, ''), or (None, why there is no slot), and ends with the session.
        """
        try:
            admitted = await self._run_in_loop(self._admit(session, request, data, paused))
        except (Refused, UsageError) as error:
            yield None, str(error)
            return
        yield self.address, ''
        await self._run_in_loop(admitted.ended.wait())

    def check_health(self):
        """Raises RuntimeError if this worker must be replaced; Ray Serve calls it."""
        if not (self.world.engine.alive and self._thread.is_alive()):
            raise RuntimeError('the engine has stopped')

    def close(self):
        """Ends all sessions; their players continue on other workers."""
        self._web.should_exit = True
        self._thread.join(60)

    async def _admit(self, token: str, request: dict, data: bytes | None, paused: bool) -> Session:
        manager = self.world.manager
        new = token not in manager.sessions
        session = await manager.admit(token, request, data, paused)
        if new:
            await self.registry.assign(session.token, self.address, paused)
            self._spawn(checkpoint_loop(manager, session, self.registry, self.address))
        return session

    async def _register(self):
        """Registers this worker again and again."""
        while True:
            with contextlib.suppress(Exception):  # the registry may be restarting
                await self.registry.register_worker(self.address, self.world.world_bytes)
            await asyncio.sleep(REGISTER_SECONDS)

    def _spawn(self, coroutine):
        """Runs a coroutine in the background of the running loop."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_in_loop(self, coroutine):
        """Awaits a coroutine in the loop of the world."""
        loop = self.world.manager.loop
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))


async def checkpoint_loop(
    manager: SessionManager, session: Session, registry: AsyncRegistry, address: str
):
    """Sends checkpoints of a session to the registry until the session ends."""
    saved, newest = None, time.monotonic()
    while not session.ended.is_set():
        began = time.monotonic()
        timeline = session.slot.log
        now = timeline, len(timeline.controls), len(timeline.prompts)
        try:
            data = await manager.save(session) if now != saved else None  # None: nothing changed
            age = time.monotonic() - began
            await registry.update(session.token, address, data, session.paused, age)
            late, saved, newest = time.monotonic() - newest, now, began
        except Exception as error:  # the next one may succeed
            late = time.monotonic() - newest
            _warn('checkpoint_failed', session, error=str(error))
        if late > MAX_LOST_SECONDS:
            _warn('checkpoint_late', session, seconds=round(late, 2))
        # If saving is slow, the next checkpoint begins sooner, so that it is there in time.
        took = time.monotonic() - began
        pause = min(CHECKPOINT_SECONDS, MAX_LOST_SECONDS - 2 * took) - took
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.1, pause)):
                await session.ended.wait()
    if session.end_reason != 'stopped':  # a stopped session continues on another worker
        await registry.remove(session.token, address)


def _warn(event: str, session: Session, **fields):
    log.warning(event, extra={'fields': {'session': session.token[:6], **fields}})
