"""One address for many houses: ties a player's socket to the world that has its carry.

The front computes nothing. It asks for a place (`lease`), pipes messages both ways, and when a
world is lost it asks for another place, with the newest moment that the `Book` has of the player.
Who makes the places, and where the book lives, is not known here (`cluster` says it with Ray).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from matrix_jax.serve.cluster import proxy
from matrix_jax.serve.cluster.registry import Moment
from matrix_jax.serve.web import protocol
from matrix_jax.serve.web.app import (
    BURST,
    HEADERS,
    JOIN_SECONDS,
    PAGE,
    RATE,
    Guard,
    _close,
    _receive,
    _trouble,
)
from matrix_jax.serve.web.protocol import Bucket, MessageError
from matrix_jax.serve.web.server import MESSAGE_BYTES

log = logging.getLogger(__name__)
WAIT_SECONDS = 300  # for a place
PASSED = {'content-type', 'content-length', 'content-disposition', 'cache-control', 'retry-after'}
FILES = 8  # on their way to worlds at a time
LOST = (1001, 1006, 1011, 1012)  # codes of a world that went away by itself


class Away(Exception):
    """No place can be had; the message may be shown."""


class Front:
    """ASGI application.

    Args:
      book: with the methods of `Book`, to be awaited.
      lease: `(session, join message, data, paused)` -> async iterator whose first item is (address,
        '') of a world that has the session, or (None, why not); it ends when the session does.
      secret: token of the worlds.
      token: as of `app.Server`.
    """

    def __init__(self, book, lease, secret: str, token: str | None = None):
        self.book, self.lease, self.secret, self.token = book, lease, secret, token
        self._leases: set[asyncio.Task] = set()
        self._sockets: set = set()
        self._files, self._moving = ThreadPoolExecutor(FILES, 'files'), 0

    def app(self):
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Route, WebSocketRoute

        routes = [
            Route('/', self.page),
            Route('/healthz', self.health),
            Route('/metrics', self.metrics),
            WebSocketRoute('/play', self.play),
            Route('/session/{session}/{what}', self.forward, methods=['GET', 'POST']),
        ]
        return Guard(Starlette(routes=routes, lifespan=self._lifespan), self.token)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _):
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            for task in (watch, *self._leases):
                task.cancel()
            self._files.shutdown(wait=False, cancel_futures=True)

    async def _watch(self):
        """Tells all players that the house closes, and then closes."""
        from starlette.websockets import WebSocketDisconnect

        while (left := (await self.book.state())['closing']) is None:
            await asyncio.sleep(1)
        text = json.dumps(
            {
                'type': 'error',
                'message': f'The server closes in {max(0, left):.0f} s.'
                ' "Save world file" keeps your world.',
            }
        )
        for socket in list(self._sockets):
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await socket.send_text(text)
        await asyncio.sleep(left)
        for socket in list(self._sockets):
            await _close(socket, 1013, 'the server has stopped')
        for task in self._leases:
            task.cancel()

    # --- pages ---------------------------------------------------------------------------------

    async def page(self, _):
        from starlette.responses import HTMLResponse

        return HTMLResponse(PAGE.read_text(encoding='utf-8'), headers=HEADERS)

    async def health(self, _):
        from starlette.responses import JSONResponse

        state = await self.book.state()
        return JSONResponse({'ok': True} | state | {'worlds': len(state['worlds'])})

    async def metrics(self, _):
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
        from starlette.responses import Response

        registry, state = CollectorRegistry(), await self.book.state()
        for name, about in (
            ('players', 'sessions, those that wait included'),
            ('waiting', 'players that wait for a place'),
            ('places', 'places in all worlds that there may be'),
        ):
            Gauge(f'matrix_jax_front_{name}', about, registry=registry).set(state[name])
        Gauge('matrix_jax_front_worlds', 'worlds that are there', registry=registry).set(
            len(state['worlds'])
        )
        Gauge(
            'matrix_jax_front_moment_age_seconds',
            'what the loss of its world would cost the player who would lose most',
            registry=registry,
        ).set(state['oldest'])
        texts = await asyncio.gather(
            *(asyncio.to_thread(proxy.counters, one, self.secret) for one in state['worlds'])
        )
        registry.register(proxy.Labelled(dict(zip(state['worlds'], texts))))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def forward(self, request):
        """A download or an upload of a session, done by its world; passed on piece by piece."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import StreamingResponse

        session, what = request.path_params['session'], request.path_params['what']
        where = await self.book.where(session) if what.isalpha() else None
        if where is None:
            return _trouble('this session is over', 404)
        if self._moving >= FILES:
            return _trouble('too many files are on their way; try again in a moment', 503)
        (address, limit), loop = where, asyncio.get_running_loop()
        data = proxy.sent(loop, request.stream(), limit) if request.method == 'POST' else None
        self._moving += 1
        try:
            answer = await loop.run_in_executor(
                self._files, proxy.ask, address, f'/session/{session}/{what}', self.secret, data
            )
        except proxy.TooLarge:
            return _trouble(f'the file is too large: expected at most {limit} bytes', 413)
        except proxy.Unreachable:
            return _trouble('the world does not answer; try again', 503)
        except ClientDisconnect:
            return _trouble('the upload was cut off', 400)
        finally:
            self._moving -= 1
        kept = {name: value for name, value in answer.headers.items() if name.lower() in PASSED}
        return StreamingResponse(proxy.pieces(answer), answer.status, kept)

    # --- playing -------------------------------------------------------------------------------

    async def play(self, socket):
        """One player's socket."""
        from starlette.websockets import WebSocketDisconnect

        await socket.accept()
        visit = Visit(self, socket)
        self._sockets.add(socket)
        try:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await visit.run()
        finally:
            self._sockets.discard(socket)

    async def place(self, session: str, wanted: dict, known: Moment | None, tell) -> str:
        """The address of a world that has this session from now on.

        Args:
          tell: awaited once if there is none at once.

        Raises:
          Away: there is none.
        """
        refused = await self.book.enter(session)
        if refused:
            raise Away(refused)
        first: asyncio.Future = asyncio.get_running_loop().create_future()
        # In a context of its own: the lease outlives the socket whose request asks for it.
        task = asyncio.create_task(
            self._hold(session, wanted, known, first), context=contextvars.Context()
        )
        self._leases.add(task)
        task.add_done_callback(self._leases.discard)
        try:
            for second in range(WAIT_SECONDS):
                done, _ = await asyncio.wait({first}, timeout=1 if second else 0.5)
                if done:
                    return first.result()
                if not second:
                    await tell()
                await self.book.enter(session)
            raise Away('no place came free; try again later')
        except BaseException:  # a player who left meanwhile as well
            task.cancel()
            raise

    async def _hold(self, session: str, wanted: dict, known: Moment | None, first: asyncio.Future):
        """Keeps a lease until the session ends."""
        data, paused = (known.data, known.paused) if known else (None, False)
        try:
            async for address, why in self.lease(session, wanted, data, paused):
                if address:
                    first.set_result(address)
                else:
                    first.set_exception(Away(why))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the world is lost; the socket notices as well
            log.warning(
                'lease_broken',
                extra={'fields': {'session': session[:6], 'error': type(error).__name__}},
            )
            if not first.done():
                first.set_exception(Away('the world could not be started; try again'))
        if not first.done():
            first.set_exception(Away('no world took the session; try again'))


class Visit:
    """One player's socket, and the world that it is tied to now."""

    def __init__(self, front: Front, socket):
        self.front, self.socket, self.world = front, socket, None

    async def run(self):
        """From the first message to the last.

        Raises:
          WebSocketDisconnect: the player is gone.
        """
        try:
            async with asyncio.timeout(JOIN_SECONDS):
                text = await _receive(self.socket)
            wanted = protocol.parse(text)
            if wanted['type'] != 'join':
                raise MessageError('expected join first')
        except (MessageError, TimeoutError) as error:
            await _close(self.socket, 1008, str(error) or f'expected join within {JOIN_SECONDS} s')
            return
        tasks = [asyncio.create_task(one) for one in (self._up(), self._down(wanted))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ends:
            if isinstance(error, Away):
                await _close(self.socket, 1013, str(error))
            elif isinstance(error, Exception):
                raise error

    async def _up(self):
        """What the player says; while there is no world, nobody hears it."""
        from websockets.exceptions import ConnectionClosed

        bucket = Bucket(RATE, BURST)
        while True:
            text = await _receive(self.socket)
            if len(text) > MESSAGE_BYTES:
                await _close(self.socket, 1009, f'expected at most {MESSAGE_BYTES} bytes')
                return
            if not bucket.take():
                await _close(
                    self.socket, 1008, f'too many messages: expected at most {RATE} a second'
                )
                return
            if self.world:
                with contextlib.suppress(ConnectionClosed):
                    await self.world.send(text)

    async def _down(self, wanted: dict):
        """What the worlds of this session say, one after the other."""
        session = wanted['session']
        known = await self.front.book.find(session) if session else None
        session = session if known else secrets.token_urlsafe(16)
        address, text = known and known.address, 'All places are taken. Waiting for a new one ...'
        while True:
            if address is None:
                address = await self.front.place(session, wanted, known, partial(self._tell, text))
            code, why = await self._tie(address, wanted | {'session': session})
            if code not in LOST:
                await _close(self.socket, code, why)
                return
            known, address = await self.front.book.find(session), None
            text = 'The machine of your world was lost. It goes on elsewhere in a moment ...'
            await self._tell(text)

    async def _tie(self, address: str, join: dict) -> tuple[int, str]:
        """Pipes until the world's end closes -> (code, reason)."""
        import websockets

        url = f'ws://{address}/play?token={self.front.secret}'
        try:
            async with websockets.connect(url, max_size=2**26, compression=None) as world:
                await world.send(json.dumps(join))
                self.world = world
                async for message in world:
                    if isinstance(message, bytes):
                        await self.socket.send_bytes(message)
                    else:
                        await self.socket.send_text(message)
                closed = world.close_code, world.close_reason or ''
        except websockets.ConnectionClosed as error:
            closed = (error.rcvd.code, error.rcvd.reason) if error.rcvd else (1006, '')
        except (OSError, websockets.InvalidHandshake):
            closed = 1006, ''
        finally:
            self.world = None
        return closed

    async def _tell(self, text: str):
        await self.socket.send_text(json.dumps({'type': 'waiting', 'message': text}))
