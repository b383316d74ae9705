"""The web server: one page, one WebSocket per player, and a few downloads.

Down the socket: binary frames (`session.HEADER`, then JPEG) and JSON notes. Up: `messages`. Files
go by HTTP under a session's token. Nothing that a client sends becomes a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.serve.runtime.engine import Engine
from matrix_jax.serve.runtime.session import Session, Stalled
from matrix_jax.serve.runtime.session_manager import House, Refused, ask
from matrix_jax.serve.runtime.snapshot import HEADER_BYTES
from matrix_jax.serve.web import protocol
from matrix_jax.serve.web.metrics import Meters
from matrix_jax.serve.web.protocol import Bucket, MessageError
from matrix_jax.serve.web.transfers import Transfers
from matrix_jax.serve.web.transfers import trouble as _trouble

log = logging.getLogger(__name__)
PAGE = Path(__file__).with_name('player.html')
LOCAL = ('localhost', '127.0.0.1', '[::1]')
RATE, BURST, FAULTS = 60, 120, 20  # messages a second, at once, and bad ones in all
JOIN_SECONDS = 10
PICTURE_BYTES = 8 * 2**20
HEADERS = {
    'Cache-Control': 'no-store',
    'X-Content-Type-Options': 'nosniff',
    'Referrer-Policy': 'no-referrer',
    'X-Frame-Options': 'DENY',
    'Content-Security-Policy': "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; img-src 'self' blob: data:; connect-src 'self' ws: wss:",
}


class Server:
    """The application of one world.

    Args:
      slots: compiled.
      folder, recipe: as of `House`.
      token: what every request must bring; None = none, and only local names of the host.
      grace: seconds that a lost player's slot waits.
      door: as of `House`.
    """

    def __init__(
        self,
        slots,
        folder,
        recipe: str,
        token: str | None = None,
        grace: float = 30.0,
        door: bool = True,
    ):
        self.token, self.meters = token, Meters()
        self.engine = Engine(slots, to_jpeg, self._observe)
        self._given = folder, recipe, self.meters, grace, door
        self.house: House | None = None
        # A world file's size is known: a carry, and a log with perhaps a picture.
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in _leaves(slots.like)]
        self.world_bytes = sum(sizes) + HEADER_BYTES
        self.transfers = Transfers(4 * self.world_bytes)

    def _observe(self, seconds: float, active: int):
        self.meters.shifted(seconds, self.engine.slots.frames, self.engine.spacing)

    def app(self):
        """The ASGI application; the engine runs while it does."""
        from starlette.applications import Starlette

        return Guard(Starlette(routes=self.routes(), lifespan=self._lifespan), self.token)

    def routes(self) -> list:
        """What is where."""
        from starlette.routing import Route, WebSocketRoute

        return [
            Route('/', self.page),
            Route('/healthz', self.health),
            Route('/metrics', self.metrics),
            WebSocketRoute('/play', self.play),
            Route('/session/{session}/world', self.save),
            Route('/session/{session}/world', self.load, methods=['POST']),
            Route('/session/{session}/picture', self.picture, methods=['POST']),
            Route('/session/{session}/replay', self.replay),
            Route('/session/{session}/video', self.video),
        ]

    @contextlib.asynccontextmanager
    async def _lifespan(self, _):
        self.open()
        async with self.running():
            yield

    def open(self):
        """Makes the house, in the loop that it lives in; this may compile."""
        self.house = House(self.engine, *self._given)

    @contextlib.asynccontextmanager
    async def running(self):
        """The engine runs, and nothing compiles any more."""
        self.engine.start()
        unwatch = self.meters.watch_compiler()
        try:
            yield
        finally:
            unwatch()
            self.house.close()
            await asyncio.to_thread(self.engine.stop)

    # --- pages ---------------------------------------------------------------------------------

    async def page(self, _):
        from starlette.responses import HTMLResponse

        return HTMLResponse(PAGE.read_text(encoding='utf-8'), headers=HEADERS)

    def state(self) -> dict:
        """How it is doing, for /healthz."""
        quiet = time.monotonic() - self.engine.beat
        return {
            'ok': self.engine.alive and quiet < 60,
            'players': len(self.house.sessions),
            'places': self.engine.slots.count,
            'engine_quiet_seconds': round(quiet, 1),
        }

    async def health(self, _):
        from starlette.responses import JSONResponse

        state = self.state()
        return JSONResponse(state, 200 if state['ok'] else 503)

    async def metrics(self, _):
        from starlette.responses import Response

        body, kind = self.meters.text()
        return Response(body, media_type=kind)

    async def save(self, request):
        return self._download(request, self.house.save, 'application/octet-stream', 'drive.world')

    async def replay(self, request):
        async def answer(session):
            # Copied by the engine's thread, which alone changes a log.
            timeline = await ask(self.engine.do(lambda: session.seat.log.copy()))
            return await asyncio.to_thread(lambda: timeline.dumps().encode())

        return self._download(request, answer, 'application/json', 'session.json')

    async def video(self, request):
        async def answer(session):
            if not session.recorded:
                raise Refused('nothing was recorded yet')
            return await self.transfers.alone(session, to_mp4, list(session.recorded), session.fps)

        return self._download(request, answer, 'video/mp4', 'drive.mp4')

    async def load(self, request):
        return self._upload(request, self.house.load, self.world_bytes)

    async def picture(self, request):
        return self._upload(request, self.house.picture, PICTURE_BYTES)

    def _download(self, request, *file):
        session = self.house.sessions.get(request.path_params['session'])
        if session is None:
            return _trouble('this session is over', 404)
        return self.transfers.download(session, *file)

    def _upload(self, request, use, limit: int):
        session = self.house.sessions.get(request.path_params['session'])
        if session is None:
            return _trouble('this session is over', 404)
        return self.transfers.upload(session, use, limit)

    # --- playing -------------------------------------------------------------------------------

    async def play(self, socket, first: dict | None = None):
        """One player's socket, from joining to leaving; `first` is a note that it gets at once."""
        from starlette.websockets import WebSocketDisconnect

        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it may go at any moment
            if first:
                await socket.send_text(json.dumps(first))
            try:
                async with asyncio.timeout(JOIN_SECONDS):
                    text = await _receive(socket)
                wanted = protocol.parse(text)
                if wanted['type'] != 'join':
                    raise MessageError('expected join first')
                session, resumed = await self.house.join(wanted)
            except (MessageError, Refused, TimeoutError, UsageError) as error:
                said = str(error) or f'expected join within {JOIN_SECONDS} s'
                await _close(socket, 1013 if isinstance(error, Refused) else 1008, said)
                return
            try:
                await self._stay(socket, session, resumed)
            finally:
                self.house.detach(session, socket)

    async def _stay(self, socket, session: Session, resumed: bool):
        from starlette.websockets import WebSocketDisconnect

        before = await self.house.attach(session, socket)
        if before:
            await _close(before, 4001, 'this session goes on in another window')
        session.note('welcome', self.house.describe(session, resumed))
        wishes: asyncio.Queue = asyncio.Queue(8)
        tasks = [
            asyncio.create_task(one)
            for one in (
                session.send(socket),
                self._listen(socket, session, wishes),
                self._grant(session, wishes),
                self._report(session),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ends:
            if isinstance(error, MessageError):
                await _close(socket, 1008, str(error))
            elif isinstance(error, Stalled):
                await _close(socket, 4000, 'no frames arrive at your end')
            elif isinstance(error, Exception) and not isinstance(
                error, WebSocketDisconnect | RuntimeError | OSError
            ):
                log.error('a session failed', exc_info=error)
                await _close(socket, 1011, 'something failed in the server')

    async def _listen(self, socket, session: Session, wishes: asyncio.Queue):
        """Takes messages until the player leaves or misbehaves."""
        bucket, faults = Bucket(RATE, BURST), 0
        while True:
            text = await _receive(socket)
            if not bucket.take():
                raise MessageError(f'too many messages: expected at most {RATE} a second')
            try:
                message = protocol.parse(text)
                kind = message['type']
                if kind == 'join':
                    raise MessageError('join: this socket has a session')
                if kind == 'keys':
                    session.keys(message['id'], self.house.canonical(message['symbol']))
                elif kind == 'seen':
                    session.seen(message['frame'])
                elif kind == 'leave':
                    self.house.end(session, 'left')
                    await _close(socket, 1000, 'goodbye')
                    return
                elif wishes.full():
                    session.note('error', {'message': f'{kind}: wait for what you asked before'})
                else:
                    wishes.put_nowait(message)
            except MessageError as error:
                faults += 1
                if faults >= FAULTS:
                    raise
                session.note('error', {'message': str(error)})

    async def _grant(self, session: Session, wishes: asyncio.Queue):
        """Does what takes time, beside the keys."""
        while True:
            message = await wishes.get()
            try:
                await self.house.handle(session, message)
            except (Refused, UsageError) as error:
                session.note('error', {'message': str(error)})

    async def _report(self, session: Session):
        """Once a second: what the page's meter shows."""
        while True:
            await asyncio.sleep(1)
            if not self.engine.alive:
                raise EngineStopped
            session.note(
                'stats',
                {
                    'step_ms': round(self.engine.seconds * 1e3, 1),
                    'dropped': session.dropped,
                    'players': len(self.house.sessions),
                },
            )


class EngineStopped(Exception):
    """No world is computed any more."""


class Guard:
    """ASGI: who may ask at all, judged by token, name of the host, and page of origin.

    The host's name is checked where no token is, lest a page elsewhere reach a server on this
    machine by a name of its own.
    """

    def __init__(self, app, token: str | None):
        self.app, self.token = app, token

    async def __call__(self, scope, receive, send):
        fault = self._fault(scope) if scope['type'] in ('http', 'websocket') else None
        if fault is None:
            await self.app(scope, receive, send)
        elif scope['type'] == 'websocket':
            await receive()
            await send({'type': 'websocket.close', 'code': 1008, 'reason': fault})
        else:
            await _trouble(fault, 403)(scope, receive, send)

    def _fault(self, scope) -> str | None:
        from starlette.datastructures import URL, Headers, QueryParams

        headers = Headers(scope=scope)
        host = headers.get('host', '')
        if self.token is None and host.rpartition(':')[0] not in LOCAL and host not in LOCAL:
            return f'this server is for this machine only; open it as http://{LOCAL[1]}'
        origin = headers.get('origin')
        if origin is not None and URL(origin).netloc != host:
            return 'requests from pages of another origin are refused'
        if self.token is not None and scope['path'] != '/healthz':
            given = QueryParams(scope['query_string']).get('token') or (
                headers.get('authorization', '').removeprefix('Bearer ')
            )
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return 'open the address that the server printed; it ends in ?token=...'
        return None


async def _receive(socket) -> str:
    """The next text message."""
    from starlette.websockets import WebSocketDisconnect

    message = await socket.receive()
    if message['type'] == 'websocket.disconnect':
        raise WebSocketDisconnect(message.get('code') or 1000)
    return message.get('text') or ''


async def _close(socket, code: int, reason: str):
    """Tells why, then closes; a socket that is gone already is fine."""
    from starlette.websockets import WebSocketDisconnect

    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
        await socket.send_text(json.dumps({'type': 'closed', 'code': code, 'message': reason}))
        await socket.close(code, reason.encode()[:120].decode(errors='ignore'))


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def to_jpeg(frame: np.ndarray) -> bytes:
    """uint8 [H W 3] -> JPEG with full colour resolution: small worlds have small things, and the
    page blows them up, faults and all."""
    from PIL import Image

    file, quality = io.BytesIO(), 98 if frame.shape[1] <= 256 else 85
    Image.fromarray(frame).save(file, 'JPEG', quality=quality, subsampling=0)
    return file.getvalue()


def to_mp4(pictures: list[bytes], fps: float) -> bytes:
    """An mp4 of encoded frames."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'drive.mp4'
        video.write_video(path, (np.asarray(Image.open(io.BytesIO(one))) for one in pictures), fps)
        return path.read_bytes()
