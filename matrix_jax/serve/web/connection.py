"""One player's WebSocket, from joining to leaving."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging

from matrix_jax.config import UsageError
from matrix_jax.controls.driving import ControlError
from matrix_jax.serve.runtime.session import MESSAGE_RATE, Session, Stalled
from matrix_jax.serve.runtime.session_manager import Refused, TooSoon
from matrix_jax.serve.web import connections, protocol
from matrix_jax.serve.web.base_app import (
    close_socket,
    receive_join,
    receive_text,
    run_until_first_ends,
)
from matrix_jax.serve.web.hosted_world import HostedWorld
from matrix_jax.serve.web.protocol import MessageError

log = logging.getLogger(__name__)
MAX_FAULTS = 20  # bad messages per socket
REPLACED = 4001, 'this session goes on in another window'  # close code and reason
MAX_REQUESTS = 8  # that wait for earlier ones
# A socket that sends or joins too often closes after this time; nothing of it is read meanwhile.
# Closed at once, it would only be back sooner, and each handshake takes time from the others.
FLOOD_SECONDS = 1.0


class EngineStopped(Exception):
    """The engine no longer runs."""


class PlayerConnection:
    """Connects a socket with a session of a world."""

    def __init__(self, world: HostedWorld, socket):
        self.world, self.manager, self.socket = world, world.manager, socket

    async def run(self):
        """Serves the socket until it closes.

        Raises:
          WebSocketDisconnect: the player is gone.
        """
        request = await receive_join(self.socket)
        if request is None:
            return
        try:
            session, resumed = await self.manager.join(request)
        except (Refused, UsageError) as error:
            if isinstance(error, TooSoon):
                await asyncio.sleep(FLOOD_SECONDS)
            code = 1013 if isinstance(error, Refused) else 1008
            await close_socket(self.socket, code, str(error))
            return
        try:
            with connections.in_use(self.socket.scope):
                await self._play(session, resumed)
        finally:
            self.manager.detach(session, self.socket)

    async def _play(self, session: Session, resumed: bool):
        from starlette.websockets import WebSocketDisconnect

        before = await self.manager.attach(session, self.socket)
        if before:  # its task may wait for a player who does not read
            await close_socket(before, *REPLACED)
        session.notify('welcome', self.manager.describe(session, resumed))
        requests: asyncio.Queue = asyncio.Queue(MAX_REQUESTS)
        errors = await run_until_first_ends(
            session.send(self.socket),
            self._receive(session, requests),
            self._handle(session, requests),
            self._report(session),
        )
        for error in errors:
            if isinstance(error, MessageError):
                await close_socket(self.socket, 1008, str(error))
            elif isinstance(error, Stalled):
                await close_socket(self.socket, 4000, 'you receive no frames')
            elif not isinstance(error, WebSocketDisconnect | RuntimeError | OSError):
                log.error('a session failed', exc_info=error)
                await close_socket(self.socket, 1011, 'the server failed')
        if session.socket is not self.socket and not session.ended.is_set():
            await close_socket(self.socket, *REPLACED)

    async def _receive(self, session: Session, requests: asyncio.Queue):
        """Receives messages until the player leaves.

        Raises:
          MessageError: too many messages, or too many bad ones.
        """
        faults = 0
        while True:
            text = await receive_text(self.socket)
            if not session.messages.take():
                await asyncio.sleep(FLOOD_SECONDS)
                raise MessageError(f'too many messages: expected at most {MESSAGE_RATE} a second')
            try:
                message = protocol.parse(text)
                kind = message['type']
                if kind == 'join':
                    raise MessageError('join: this socket has a session already')
                if kind == 'keys':
                    session.press(message['id'], self._control(message['symbol']))
                elif kind == 'seen':
                    session.acknowledge(message['frame'])
                elif kind == 'leave':
                    self.manager.end(session, 'left')
                    await close_socket(self.socket, 1000, 'goodbye')
                    return
                elif requests.full():
                    session.notify('error', {'message': f'{kind}: wait for your earlier requests'})
                else:
                    requests.put_nowait(message)
            except MessageError as error:
                faults += 1
                if faults >= MAX_FAULTS:
                    raise
                session.notify('error', {'message': str(error)})

    def _control(self, symbol: str) -> str:
        """The canonical spelling of a control.

        Raises:
          MessageError: this world has no such control.
        """
        try:
            return self.manager.world.vocabulary.canonical(symbol)
        except ControlError as error:
            raise MessageError(f'keys.symbol: {error}') from error

    async def _handle(self, session: Session, requests: asyncio.Queue):
        """Handles the messages that take time, so that keys need not wait for them."""
        while True:
            message = await requests.get()
            try:
                await self.manager.handle(session, message)
            except (Refused, UsageError) as error:
                session.notify('error', {'message': str(error)})

    async def _report(self, session: Session):
        """Sends the figures of the page's meter once a second."""
        while True:
            await asyncio.sleep(1)
            if not self.world.engine.alive:
                raise EngineStopped
            session.notify(
                'stats',
                {
                    'step_ms': round(self.world.engine.seconds * 1e3, 1),
                    'dropped': session.dropped,
                    'players': len(self.manager.sessions),
                },
            )


async def serve_player(world: HostedWorld, socket, first: dict | None = None):
    """Serves one socket in a world; `first` is a message that it gets at once."""
    from starlette.websockets import WebSocketDisconnect

    with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it may close at any time
        if first:
            await socket.send_text(json.dumps(first))
        await PlayerConnection(world, socket).run()
