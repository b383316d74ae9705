"""The registry of a cluster: which worker has which session, and the newest checkpoint of each."""

from __future__ import annotations

import math
import time
from typing import NamedTuple, Protocol

FORGET_SECONDS = 60.0  # a session that no worker and no gateway mentions is over
GONE_SECONDS = 15.0  # a worker that is silent for longer is gone


class SessionRecord(NamedTuple):
    """What is known about a session.

    Attributes:
      address: of its worker, or None while it has none.
      data: its newest checkpoint, the bytes of a `.world` file, or None before the first one.
      paused: whether the player paused it.
      last_seen: when it was last mentioned, in `time.monotonic` seconds of the registry.
      taken_at: when the session was as `data` has it, at the latest; None without data.
    """

    address: str | None
    data: bytes | None
    paused: bool
    last_seen: float
    taken_at: float | None = None


class WorkerInfo(NamedTuple):
    """What is known about a worker.

    Attributes:
      max_upload: bytes of the largest file that it accepts.
      last_seen: when it last registered, as of `SessionRecord`.
    """

    max_upload: int
    last_seen: float


class SessionRegistry:
    """Workers, sessions, and the newest checkpoint of each session; outlives every worker.

    Args:
      places: slots of all workers that may exist.
    """

    def __init__(self, places: int):
        self.places, self._closes_at = places, math.inf
        self._sessions: dict[str, SessionRecord] = {}
        self._workers: dict[str, WorkerInfo] = {}

    def register_worker(self, address: str, max_upload: int):
        """Notes that a worker is alive; every worker repeats this."""
        self._workers[address] = WorkerInfo(max_upload, time.monotonic())

    def reserve(self, session: str) -> str:
        """Reserves a slot for a session, or renews it -> '', or why there is none."""
        self._forget()
        record = self._sessions.get(session)
        if record is None and self._closes_at < math.inf:
            return 'the server is closing; come back later'
        if record is None and len(self._sessions) >= self.places:
            return f'all {self.places} places are taken; try again in a minute'
        record = record or SessionRecord(None, None, False, 0)
        self._sessions[session] = record._replace(last_seen=time.monotonic())
        return ''

    def assign(self, session: str, address: str, paused: bool):
        """Assigns a session to a worker; from now on only that worker's updates count."""
        before = self._sessions.get(session) or SessionRecord(None, None, False, 0)
        self._sessions[session] = before._replace(
            address=address, paused=paused, last_seen=time.monotonic()
        )

    def update(self, session: str, address: str, data: bytes | None, paused: bool, age: float):
        """Updates a session from its worker.

        Args:
          session, address: the session, and the worker that has it.
          data: its newest checkpoint, or None if the last one is still up to date.
          paused: whether the player paused it.
          age: seconds since the session was as `data` has it.
        """
        before, now = self._sessions.get(session), time.monotonic()
        if before is None or before.address in (None, address):
            data = data or (before and before.data)
            taken_at = now - age if data else None
            self._sessions[session] = SessionRecord(address, data, paused, now, taken_at)

    def find(self, session: str) -> SessionRecord | None:
        """What is known about a session."""
        self._forget()
        return self._sessions.get(session)

    def locate(self, session: str) -> tuple[str, int] | None:
        """(address, largest upload in bytes) of the worker of a session."""
        self._forget()
        record = self._sessions.get(session)
        worker = self._workers.get(record.address) if record else None
        return (record.address, worker.max_upload) if worker else None

    def remove(self, session: str, address: str | None = None):
        """Removes a session that has ended at the worker `address`."""
        record = self._sessions.get(session)
        if record and record.address in (None, address):
            del self._sessions[session]

    def close(self, seconds: float):
        """Refuses new sessions from now on; all sessions end after `seconds`."""
        self._closes_at = time.monotonic() + seconds

    def state(self) -> dict:
        """Counts, addresses of the workers, age in seconds of the oldest checkpoint, and seconds
        until the end or None."""
        self._forget()
        now = time.monotonic()
        records = self._sessions.values()
        ages = (now - one.taken_at for one in records if one.taken_at is not None)
        return {
            'players': len(records),
            'places': self.places,
            'worlds': sorted(self._workers),
            'waiting': sum(one.address is None for one in records),
            'oldest': max(ages, default=0.0),
            'closing': None if self._closes_at == math.inf else self._closes_at - now,
        }

    def _forget(self):
        now = time.monotonic()
        self._sessions = {
            name: one
            for name, one in self._sessions.items()
            if one.last_seen > now - FORGET_SECONDS
        }
        self._workers = {
            name: one for name, one in self._workers.items() if one.last_seen > now - GONE_SECONDS
        }


class AsyncRegistry(Protocol):
    """The methods of a `SessionRegistry` as coroutines, wherever it runs."""

    async def register_worker(self, address: str, max_upload: int) -> None: ...
    async def reserve(self, session: str) -> str: ...
    async def assign(self, session: str, address: str, paused: bool) -> None: ...
    async def update(
        self, session: str, address: str, data: bytes | None, paused: bool, age: float
    ) -> None: ...
    async def find(self, session: str) -> SessionRecord | None: ...
    async def locate(self, session: str) -> tuple[str, int] | None: ...
    async def remove(self, session: str, address: str | None = None) -> None: ...
    async def state(self) -> dict: ...
