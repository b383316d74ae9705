"""Connects a player's socket at the gateway with the worker that has the player's session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Protocol

from matrix_jax.serve.cluster.registry import AsyncRegistry, SessionRecord
from matrix_jax.serve.web import protocol
from matrix_jax.serve.web.base_app import (
    BURST,
    JOIN_SECONDS,
    MESSAGE_BYTES,
    RATE,
    close_socket,
    receive_text,
)
from matrix_jax.serve.web.protocol import MessageError, TokenBucket

LOST_CODES = (1001, 1006, 1011, 1012)  # close codes of a worker that is gone


class NoCapacity(Exception):
    """No slot is available; the message may be shown."""


class SlotSource(Protocol):
    """What a `ProxyConnection` needs of the `Gateway`."""

    registry: AsyncRegistry
    secret: str

    async def acquire(
        self,
        session: str,
        request: dict,
        record: SessionRecord | None,
        on_wait: Callable[[], Awaitable[None]],
    ) -> str: ...


class ProxyConnection:
    """One player's socket, and the worker that it is connected to.

    Args:
      gateway: that finds workers.
      socket: the player's.
    """

    def __init__(self, gateway: SlotSource, socket):
        self.gateway, self.socket, self.worker = gateway, socket, None

    async def run(self):
        """Serves the socket until it closes.

        Raises:
          WebSocketDisconnect: the player is gone.
        """
        try:
            async with asyncio.timeout(JOIN_SECONDS):
                text = await receive_text(self.socket)
            request = protocol.parse_join(text)
        except (MessageError, TimeoutError) as error:
            reason = str(error) or f'expected join within {JOIN_SECONDS} s'
            await close_socket(self.socket, 1008, reason)
            return
        tasks = [
            asyncio.create_task(one)
            for one in (self._forward_messages(), self._forward_frames(request))
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for error in results:
            if isinstance(error, NoCapacity):
                await close_socket(self.socket, 1013, str(error))
            elif isinstance(error, Exception):
                raise error

    async def _forward_messages(self):
        """Player to worker; while there is no worker, messages are dropped."""
        from websockets.exceptions import ConnectionClosed

        bucket = TokenBucket(RATE, BURST)
        while True:
            text = await receive_text(self.socket)
            if len(text) > MESSAGE_BYTES:
                await close_socket(self.socket, 1009, f'expected at most {MESSAGE_BYTES} bytes')
                return
            if not bucket.take():
                reason = f'too many messages: expected at most {RATE} a second'
                await close_socket(self.socket, 1008, reason)
                return
            if self.worker:
                with contextlib.suppress(ConnectionClosed):
                    await self.worker.send(text)

    async def _forward_frames(self, request: dict):
        """Worker to player, from one worker after another if workers are lost.

        Raises:
          NoCapacity: no worker has a free slot.
        """
        session = request['session']
        record = await self.gateway.registry.find(session) if session else None
        session = session if record else secrets.token_urlsafe(16)
        address = record and record.address
        text = 'All places are taken. Waiting for a new one ...'
        while True:
            if address is None:
                address = await self.gateway.acquire(
                    session, request, record, lambda text=text: self._show_waiting(text)
                )
            code, reason = await self._connect(address, request | {'session': session})
            if code not in LOST_CODES:
                await close_socket(self.socket, code, reason)
                return
            record, address = await self.gateway.registry.find(session), None
            text = 'The machine of your world was lost. It continues elsewhere in a moment ...'
            await self._show_waiting(text)

    async def _connect(self, address: str, join: dict) -> tuple[int, str]:
        """Forwards frames until the worker closes -> (close code, reason)."""
        import websockets

        url = f'ws://{address}/play?token={self.gateway.secret}'
        try:
            async with websockets.connect(url, max_size=2**26, compression=None) as worker:
                await worker.send(json.dumps(join))
                self.worker = worker
                async for message in worker:
                    if isinstance(message, bytes):
                        await self.socket.send_bytes(message)
                    else:
                        await self.socket.send_text(message)
                return worker.close_code, worker.close_reason or ''
        except websockets.ConnectionClosed as error:
            return (error.rcvd.code, error.rcvd.reason) if error.rcvd else (1006, '')
        except (OSError, websockets.InvalidHandshake):
            return 1006, ''
        finally:
            self.worker = None

    async def _show_waiting(self, text: str):
        await self.socket.send_text(json.dumps({'type': 'waiting', 'message': text}))
