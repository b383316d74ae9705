"""Files from and to players: one at a time each, not too many, and nobody waits for a slow end.

A client is a session here: behind a front, all players come from one address, and a session has one
of few places.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from matrix_jax.config import UsageError
from matrix_jax.serve.runtime.session_manager import Refused

PATIENCE = 20.0  # seconds that any transfer may take,
SLOWEST = 32 * 2**10  # and for every so many bytes one more
PIECE = 64 * 2**10  # bytes that wait for a slow reader
DRAIN_BYTES = 64 * 2**20
QUEUE_SECONDS = 20.0  # to wait for others' videos


class Busy(Exception):
    """Not now; the message may be shown.

    Attributes:
      status: 429 where the client asks too much, 503 where all do.
      wait: seconds until it is worth another try.
    """

    def __init__(self, said: str, status: int, wait: float):
        super().__init__(said)
        self.status, self.wait = status, max(1, round(wait))

    def answer(self):
        """As a response."""
        return trouble(str(self), self.status, {'Retry-After': str(self.wait)})


def trouble(said: str, status: int, headers: dict | None = None):
    """A refusal as JSON."""
    from starlette.responses import JSONResponse

    return JSONResponse({'error': said}, status, headers)


class Transfers:
    """What all transfers of a server share.

    Args:
      room: bytes of uploads that are held at once, of all players together.
    """

    def __init__(self, room: int):
        self.room, self.held = room, 0
        self._making = asyncio.Lock()

    def download(self, session, make, kind: str, name: str):
        """The ASGI response of a file.

        Args:
          make: session -> its bytes, awaited.
          kind, name: media type, and what the browser calls it.
        """

        async def respond(scope, receive, send):
            try:
                with _turn(session):
                    body = await make(session)
                    await _send(send, body, kind, name)
            except (Refused, UsageError) as error:
                await trouble(str(error), 409)(scope, receive, send)
            except Busy as error:
                await error.answer()(scope, receive, send)

        return respond

    def upload(self, session, use, limit: int):
        """The ASGI response to a file.

        Args:
          use: (session, bytes), awaited.
          limit: bytes.
        """

        async def respond(scope, receive, send):
            from starlette.requests import ClientDisconnect, Request
            from starlette.responses import JSONResponse

            data, answer = bytearray(), JSONResponse({'ok': True})
            try:
                with _turn(session):
                    size = await self._receive(Request(scope, receive), data, limit)
                    if size > limit:
                        answer = trouble(
                            f'the file is too large: expected at most {limit} bytes', 413
                        )
                    else:
                        await use(session, bytes(data))
            except ClientDisconnect:
                answer = trouble('the upload was cut off', 400)
            except TimeoutError:
                answer = trouble(
                    f'the upload came too slowly: expected {SLOWEST} bytes a second or more',
                    408,
                    {'Connection': 'close'},
                )
            except (Refused, UsageError) as error:
                answer = trouble(str(error), 422)
            except Busy as error:
                answer = error.answer()
            finally:
                self.held -= len(data)
            await answer(scope, receive, send)

        return respond

    async def alone(self, session, make, *given):
        """`make(*given)` in a thread, no two of a server at once; its time is on the client's bill.

        Raises:
          Busy: others take too long.
        """
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._making.acquire()
        except TimeoutError:
            raise Busy(
                'the server makes videos of others; try again in a moment', 503, QUEUE_SECONDS
            ) from None
        began = time.monotonic()
        try:
            return await asyncio.to_thread(make, *given)
        finally:
            self._making.release()
            session.transfers.pay((time.monotonic() - began) * session.transfers.rate)

    async def _receive(self, request, data: bytearray, limit: int) -> int:
        """Fills `data`, at most to the limit -> bytes that came."""
        began, size, chunks = asyncio.get_running_loop().time(), 0, aiter(request.stream())
        while True:
            async with asyncio.timeout_at(began + PATIENCE + size / SLOWEST):
                chunk = await anext(chunks, None)
            if chunk is None:
                return size
            size += len(chunk)
            # A little more is read and dropped: who still sends does not hear an answer.
            if size > limit + DRAIN_BYTES:
                return size
            if size <= limit:
                if self.held + len(chunk) > self.room:
                    raise Busy('the server takes files of others; try again in a moment', 503, 5)
                data += chunk
                self.held += len(chunk)


@contextlib.contextmanager
def _turn(session):
    """One transfer of a session.

    Raises:
      Busy: another one is under way, or there were too many.
    """
    if session.transferring:
        raise Busy('another file of this session is on its way; try again when it is there', 429, 1)
    if not session.transfers.take():
        raise Busy('too many files; try again in a moment', 429, session.transfers.wait)
    session.transferring = True
    try:
        yield
    finally:
        session.transferring = False


async def _send(send, body: bytes, kind: str, name: str):
    """Sends a file piece by piece, so that little of it waits for a slow reader; one that is too
    slow is hung up on."""
    headers = {
        'Content-Type': kind,
        'Content-Length': str(len(body)),
        'Cache-Control': 'no-store',
        'Content-Disposition': f'attachment; filename="{name}"',
    }
    await send(
        {
            'type': 'http.response.start',
            'status': 200,
            'headers': [(key.lower().encode(), value.encode()) for key, value in headers.items()],
        }
    )
    began = asyncio.get_running_loop().time()
    with contextlib.suppress(TimeoutError):
        for at in range(0, len(body), PIECE):
            async with asyncio.timeout_at(began + PATIENCE + at / SLOWEST):
                await send(
                    {
                        'type': 'http.response.body',
                        'body': body[at : at + PIECE],
                        'more_body': at + PIECE < len(body),
                    }
                )
