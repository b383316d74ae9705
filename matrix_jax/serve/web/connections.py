"""The TCP connections of a server: nobody keeps others out with connections that do nothing.

A connection gets `REQUEST_SECONDS` for the head of each request. If there are too many, one makes
room for the next: the oldest without a player, of the address that has most of them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Iterator
from typing import Any

REQUEST_SECONDS = 10.0  # for the head of a request


class Connection:
    """One TCP connection.

    Attributes:
      address: of the other end.
      used: how many players and file transfers use it now; a connection in use is not closed.
    """

    def __init__(self, transport: Any):
        peer = transport.get_extra_info('peername')
        self.transport, self.used = transport, 0
        self.address = peer[0] if isinstance(peer, tuple) else ''
        self._deadline: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps the connection from being closed to make room."""
        self.used += 1
        try:
            yield
        finally:
            self.used -= 1

    def await_request(self) -> None:
        """Closes the connection unless a request arrives in time."""
        self.cancel_deadline()
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def cancel_deadline(self) -> None:
        """Notes that a request has arrived, or that the connection is gone."""
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None


class Connections:
    """All connections of a server, by transport.

    Args:
      most: connections that stay open.
    """

    def __init__(self, most: int):
        self.most = most
        self._open: dict[Any, Connection] = {}

    def add(self, transport: Any) -> Connection:
        """Returns a new connection; closes another one if there are too many."""
        if len(self._open) >= self.most:
            self._make_room()
        connection = self._open[transport] = Connection(transport)
        connection.await_request()
        return connection

    def remove(self, transport: Any) -> None:
        """Forgets a connection."""
        if connection := self._open.pop(transport, None):
            connection.cancel_deadline()

    def _make_room(self) -> None:
        free = [one for one in self._open.values() if not one.used]
        if free:
            counts = collections.Counter(one.address for one in free)
            oldest = max(free, key=lambda one: counts[one.address])  # the first of equals
            self.remove(oldest.transport)
            oldest.transport.abort()

    def protocols(self) -> dict[str, type]:
        """The `http` and `ws` arguments of a `uvicorn.Config`.

        They put the `Connection` into `scope['state']['connection']`.
        """
        from uvicorn.protocols.http.h11_impl import H11Protocol
        from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

        connections = self

        class Http(H11Protocol):
            def connection_made(self, transport):
                self._connection = connections.add(transport)
                self.app_state = {**self.app_state, 'connection': self._connection}
                super().connection_made(transport)

            def connection_lost(self, exc):
                connections.remove(self.transport)
                super().connection_lost(exc)

            def handle_events(self):
                before = self.cycle
                super().handle_events()
                if self.cycle is not before:
                    self._connection.cancel_deadline()

            def handle_websocket_upgrade(self, event):
                self._connection.cancel_deadline()
                super().handle_websocket_upgrade(event)

            def on_response_complete(self):
                self._connection.await_request()
                super().on_response_complete()

        class WebSocket(WebSocketsSansIOProtocol):
            def connection_lost(self, exc):
                connections.remove(self.transport)
                super().connection_lost(exc)

        return {'http': Http, 'ws': WebSocket}


def in_use(scope) -> contextlib.AbstractContextManager[None]:
    """Keeps the connection of an ASGI scope open, if a server of this module has it."""
    connection = scope.get('state', {}).get('connection')
    return connection.in_use() if connection else contextlib.nullcontext()
