"""Who plays where, across worlds that come and go."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

FORGET_SECONDS = 60.0  # a session that no world and no front speaks of is over
GONE_SECONDS = 15.0  # a world that says nothing is gone


class Moment(NamedTuple):
    """What is known of a session.

    Attributes:
      address: of its world, or None while it has none.
      data: bytes of a `.world` file, or None before the first one.
      paused: whether it rests.
      spoken: when it was last spoken of, in `time.monotonic` of the book.
      taken: when the session was as `data` has it, at the latest; None without data.
    """

    address: str | None
    data: bytes | None
    paused: bool
    spoken: float
    taken: float | None = None


class There(NamedTuple):
    """What is known of a world.

    Attributes:
      limit: bytes of the largest file that it takes.
      spoken: when it last spoke, as of `Moment`.
    """

    limit: int
    spoken: float


class Book:
    """Worlds, sessions, where they play, and the newest moment of each; outlives every world.

    Args:
      places: in all worlds that there may be.
    """

    def __init__(self, places: int):
        self.places, self._end = places, math.inf
        self._known: dict[str, Moment] = {}
        self._worlds: dict[str, There] = {}

    def open(self, address: str, limit: int):
        """A world is there, says it."""
        self._worlds[address] = There(limit, time.monotonic())

    def enter(self, session: str) -> str:
        """Promises a place, or says why not; '' is a promise. It is to be renewed."""
        self._forget()
        before = self._known.get(session)
        if before is None and self._end < math.inf:
            return 'the server is closing; come back later'
        if before is None and len(self._known) >= self.places:
            return f'the house is full: all {self.places} places are taken; try again in a minute'
        self._known[session] = (before or Moment(None, None, False, 0))._replace(
            spoken=time.monotonic()
        )
        return ''

    def claim(self, session: str, address: str, paused: bool):
        """A world has this session from now on; what others say of it does not count any more."""
        before = self._known.get(session)
        self._known[session] = Moment(
            address, before and before.data, paused, time.monotonic(), before and before.taken
        )

    def put(self, session: str, address: str, data: bytes | None, paused: bool, age: float):
        """A world still has this session; `data` is its newest moment, or None if none is newer,
        and `age` the seconds since it was so."""
        before, now = self._known.get(session), time.monotonic()
        if before is None or before.address in (None, address):
            data = data or (before and before.data)
            self._known[session] = Moment(address, data, paused, now, now - age if data else None)

    def find(self, session: str) -> Moment | None:
        """What is known of a session."""
        self._forget()
        return self._known.get(session)

    def where(self, session: str) -> tuple[str, int] | None:
        """(address, bytes of the largest file that it takes) of the world of a session."""
        self._forget()
        known = self._known.get(session)
        there = self._worlds.get(known.address) if known else None
        return (known.address, there.limit) if there else None

    def leave(self, session: str, address: str | None = None):
        """A session is over, says the world at this address."""
        known = self._known.get(session)
        if known and known.address in (None, address):
            del self._known[session]

    def close(self, seconds: float):
        """No new sessions from now on, and none at all after so long."""
        self._end = time.monotonic() + seconds

    def state(self) -> dict:
        """Counts, addresses of the worlds that are there, seconds of the oldest among the newest
        moments, and seconds to the end, or None."""
        self._forget()
        now = time.monotonic()
        ages = (now - one.taken for one in self._known.values() if one.taken is not None)
        return {
            'players': len(self._known),
            'places': self.places,
            'worlds': sorted(self._worlds),
            'waiting': sum(one.address is None for one in self._known.values()),
            'oldest': max(ages, default=0.0),
            'closing': None if self._end == math.inf else self._end - now,
        }

    def _forget(self):
        now = time.monotonic()
        self._known = {
            name: one for name, one in self._known.items() if one.spoken > now - FORGET_SECONDS
        }
        self._worlds = {
            name: one for name, one in self._worlds.items() if one.spoken > now - GONE_SECONDS
        }
