"""Connects a player's socket at the gateway with the worker that has the player's session."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Awaitable, Callable

from matrix_jax.serve.cluster.registry import AsyncRegistry
from matrix_jax.serve.runtime.session import MESSAGE_BURST, MESSAGE_RATE
from matrix_jax.serve.runtime.token_bucket import TokenBucket
from matrix_jax.serve.web.base_app import (
    MESSAGE_BYTES,
    close_socket,
    receive_join,
    receive_text,
    run_until_first_ends,
)

LOST_CODES = (1001, 1006, 1011, 1012)  # close codes of a worker that is gone


class NoCapacity(Exception):
    """No slot is available; the message may be shown."""


class ProxyConnection:
    """One player's socket, and the worker that it is connected to.

    Args:
      registry: of the cluster.
      secret: token of the workers.
      acquire: `Gateway.acquire`.
      socket: the player's.
    """

    def __init__(
        self, registry: AsyncRegistry, secret: str, acquire: Callable[..., Awaitable[str]], socket
    ):
        self.registry, self.secret, self.acquire = registry, secret, acquire
        self.socket, self.worker = socket, None

    async def run(self):
        """Serves the socket until it closes.

        Raises:
          WebSocketDisconnect: the player is gone.
        """
        request = await receive_join(self.socket)
        if request is None:
            return
        for error in await run_until_first_ends(
            self._forward_messages(), self._forward_frames(request)
        ):
            if not isinstance(error, NoCapacity):
                raise error
            await close_socket(self.socket, 1013, str(error))

    async def _forward_messages(self):
        """Player to worker; while there is no worker, messages are dropped."""
        from websockets.exceptions import ConnectionClosed

        bucket = TokenBucket(MESSAGE_RATE, MESSAGE_BURST)
        while True:
            text = await receive_text(self.socket)
            if len(text) > MESSAGE_BYTES:
                await close_socket(self.socket, 1009, f'expected at most {MESSAGE_BYTES} bytes')
                return
            if not bucket.take():
                reason = f'too many messages: expected at most {MESSAGE_RATE} a second'
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
        record = await self.registry.find(session) if session else None
        session = session if record else secrets.token_urlsafe(16)
        address = record and record.address
        text = 'All places are taken. Waiting for a new one ...'
        while True:
            if address is None:
                address = await self.acquire(
                    session, request, record, lambda text=text: self._show_waiting(text)
                )
            code, reason = await self._connect(address, request | {'session': session})
            if code not in LOST_CODES:
                await close_socket(self.socket, code, reason)
                return
            record, address = await self.registry.find(session), None
            text = 'The machine of your world was lost. It continues elsewhere in a moment ...'
            await self._show_waiting(text)

    async def _connect(self, address: str, join: dict) -> tuple[int, str]:
        """Forwards frames until the worker closes -> (close code, reason)."""
        import websockets

        url = f'ws://{address}/play?token={self.secret}'
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
