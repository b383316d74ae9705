"""Downloads and uploads: limited in number, size and time, so that nobody waits for a slow client.

Limits apply to sessions, not to addresses: behind the gateway all players have the same address.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import weakref

from matrix_jax.config import UsageError
from matrix_jax.serve.runtime.session_manager import Refused, TooSoon
from matrix_jax.serve.runtime.token_bucket import TokenBucket
from matrix_jax.serve.web import connections

RATE, BURST = 2, 20  # files per second of a session, and at once
TIMEOUT_SECONDS = 20.0  # for any transfer, plus one second
BYTES_PER_SECOND = 32 * 2**10  # for each of these
CHUNK_BYTES = 64 * 2**10  # that wait for a slow reader
DRAIN_BYTES = 64 * 2**20
QUEUE_SECONDS = 20.0  # to wait for the videos of other players


class TransferError(Exception):
    """The transfer is refused with an HTTP status; the message may be shown."""

    def __init__(self, message: str, status: int, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.headers = status, {}
        if retry_after is not None:
            self.headers['Retry-After'] = str(max(1, round(retry_after)))
        if status == 408:  # the rest of the upload is not read
            self.headers['Connection'] = 'close'

    def response(self):
        """The HTTP response."""
        return error_response(str(self), self.status, self.headers)


def error_response(message: str, status: int, headers: dict | None = None):
    """An error as a JSON response."""
    from starlette.responses import JSONResponse

    return JSONResponse({'error': message}, status, headers)


@dataclasses.dataclass
class SessionLimit:
    """What a session has used of its transfers."""

    bucket: TokenBucket = dataclasses.field(default_factory=lambda: TokenBucket(RATE, BURST))
    active: bool = False


class Transfers:
    """The transfers of all players of one world.

    Args:
      max_held: bytes of uploads that may be in memory at once.
    """

    def __init__(self, max_held: int):
        self.max_held, self.held = max_held, 0
        self.limits: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._encoding = asyncio.Lock()

    def limit(self, session) -> SessionLimit:
        """The limit of a session."""
        return self.limits.setdefault(session, SessionLimit())

    def download(self, session, make, media_type: str, name: str):
        """The ASGI response with a file.

        Args:
          session: whose file it is.
          make: coroutine function, session -> bytes.
          media_type: of the file.
          name: that the browser gives it.
        """

        async def respond(scope, receive, send):
            try:
                with self._slot(session), connections.in_use(scope):
                    body = await make(session)
                    await _send(send, body, media_type, name)
            except (Refused, UsageError) as error:
                await error_response(str(error), 409)(scope, receive, send)
            except TransferError as error:
                await error.response()(scope, receive, send)

        return respond

    def upload(self, session, use, limit: int):
        """The ASGI response to an uploaded file.

        Args:
          session: whose file it is.
          use: coroutine function (session, bytes).
          limit: bytes.
        """

        async def respond(scope, receive, send):
            from starlette.requests import Request
            from starlette.responses import JSONResponse

            data, answer = bytearray(), JSONResponse({'ok': True})
            try:
                with self._slot(session), connections.in_use(scope):
                    await self._receive(Request(scope, receive), data, limit)
                    await use(session, bytes(data))
            except TooSoon as error:
                answer = TransferError(str(error), 429, error.wait).response()
            except (Refused, UsageError) as error:
                answer = error_response(str(error), 422)
            except TransferError as error:
                answer = error.response()
            finally:
                self.held -= len(data)
            await answer(scope, receive, send)

        return respond

    async def run_exclusive(self, session, make, *args):
        """Runs `make(*args)` in a thread, one call at a time, and charges its time to the session.

        Raises:
          TransferError: the calls of other players take too long.
        """
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._encoding.acquire()
        except TimeoutError:
            message = 'the server is making other videos; try again in a moment'
            raise TransferError(message, 503, QUEUE_SECONDS) from None
        began = time.monotonic()
        try:
            return await asyncio.to_thread(make, *args)
        finally:
            self._encoding.release()
            self.limit(session).bucket.charge((time.monotonic() - began) * RATE)

    @contextlib.contextmanager
    def _slot(self, session):
        """One transfer of a session.

        Raises:
          TransferError: another one is running, or there were too many.
        """
        limit = self.limit(session)
        if limit.active:
            raise TransferError('another file of this session is being transferred', 429, 1)
        if not limit.bucket.take():
            raise TransferError('too many files; try again in a moment', 429, limit.bucket.wait())
        limit.active = True
        try:
            yield
        finally:
            limit.active = False

    async def _receive(self, request, data: bytearray, limit: int):
        """Receives an upload into `data`.

        Raises:
          TransferError: the upload is too large, too slow or incomplete, or the server is busy.
        """
        from starlette.requests import ClientDisconnect

        began, size, chunks = asyncio.get_running_loop().time(), 0, aiter(request.stream())
        # Some more than the limit is read and dropped: a client that still sends does not read the
        # answer.
        while size <= limit + DRAIN_BYTES:
            try:
                deadline = began + TIMEOUT_SECONDS + size / BYTES_PER_SECOND
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(chunks, None)
            except ClientDisconnect:
                raise TransferError('the upload was cut off', 400) from None
            except TimeoutError:
                message = f'the upload is too slow: expected {BYTES_PER_SECOND} bytes a second'
                raise TransferError(message, 408) from None
            if chunk is None:
                break
            size += len(chunk)
            if size <= limit:
                if self.held + len(chunk) > self.max_held:
                    raise TransferError('the server is busy with other files; try again', 503, 5)
                data += chunk
                self.held += len(chunk)
        if size > limit:
            raise TransferError(f'the file is too large: expected at most {limit} bytes', 413)


async def _send(send, body: bytes, media_type: str, name: str):
    """Sends a file in chunks, so that little of it waits for a slow reader; gives up on a reader
    that is too slow."""
    headers = {
        'content-type': media_type,
        'content-length': str(len(body)),
        'cache-control': 'no-store',
        'content-disposition': f'attachment; filename="{name}"',
    }
    await send(
        {
            'type': 'http.response.start',
            'status': 200,
            'headers': [(key.encode(), value.encode()) for key, value in headers.items()],
        }
    )
    began = asyncio.get_running_loop().time()
    with contextlib.suppress(TimeoutError):
        for start in range(0, len(body), CHUNK_BYTES):
            async with asyncio.timeout_at(began + TIMEOUT_SECONDS + start / BYTES_PER_SECOND):
                await send(
                    {
                        'type': 'http.response.body',
                        'body': body[start : start + CHUNK_BYTES],
                        'more_body': start + CHUNK_BYTES < len(body),
                    }
                )
