"""One address for many workers: connects each player with the worker that has its session.

The gateway computes nothing. It leases a slot, forwards messages both ways, and if a worker is lost
it leases another slot, which continues from the newest checkpoint in the `SessionRegistry`. How
workers are started and where the registry runs is not known here; `ray_serve` does it with Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from matrix_jax.serve.cluster.proxy import NoCapacity, ProxyConnection
from matrix_jax.serve.cluster.registry import AsyncRegistry, SessionRecord
from matrix_jax.serve.web.base_app import BaseApp, close_socket
from matrix_jax.serve.web.metrics import LabelledMetrics
from matrix_jax.serve.web.transfers import error_response

log = logging.getLogger(__name__)
WAIT_SECONDS = 300  # for a slot
FORWARDED = {
    'content-type',
    'content-length',
    'content-disposition',
    'cache-control',
    'retry-after',
}
MAX_TRANSFERS = 8  # requests to workers that wait for an answer
CHUNK_SECONDS = 30  # for the next bytes of an upload or a download
ANSWER_SECONDS = 120  # for a worker to answer
METRICS_SECONDS = 3

Lease = Callable[[str, dict, bytes | None, bool], AsyncIterator[tuple[str, str] | tuple[None, str]]]


class TooLarge(Exception):
    """The upload has more bytes than the worker accepts."""


class Gateway(BaseApp):
    """The application of a cluster.

    Args:
      registry: of all sessions.
      lease: `(session, join message, checkpoint or None, paused)` -> async iterator. Its first item
        is (address of a worker that has the session, ''), or (None, why there is none); it ends
        when the session does.
      secret: token of the workers.
      token, root_path: as of `BaseApp`.
    """

    def __init__(
        self,
        registry: AsyncRegistry,
        lease: Lease,
        secret: str,
        token: str | None = None,
        root_path: str = '',
    ):
        super().__init__(token, root_path)
        self.registry, self.lease, self.secret = registry, lease, secret
        self._leases: set[asyncio.Task] = set()
        self._sockets: set = set()
        self._transfers = 0
        self._client: Any = None

    @contextlib.asynccontextmanager
    async def lifespan(self, _):
        """Watches for the end of the cluster."""
        import httpx

        # Workers are reached directly, whatever proxy the environment names.
        self._client = httpx.AsyncClient(
            trust_env=False,
            timeout=httpx.Timeout(CHUNK_SECONDS, read=ANSWER_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            headers={'Authorization': f'Bearer {self.secret}'},
        )
        watch = asyncio.create_task(self._watch_end())
        try:
            async with self._client:
                yield
        finally:
            for task in (watch, *self._leases):
                task.cancel()

    async def _watch_end(self):
        """Tells all players that the cluster closes, and closes their sockets at the end."""
        from starlette.websockets import WebSocketDisconnect

        while (left := (await self.registry.state())['closing']) is None:
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
            await close_socket(socket, 1013, 'the server has stopped')
        for task in self._leases:
            task.cancel()

    # --- pages ---------------------------------------------------------------------------------

    async def state(self) -> dict:
        """The counts of the registry."""
        state = await self.registry.state()
        return {'ok': True} | state | {'worlds': len(state['worlds'])}

    async def collect_metrics(self):
        """The gateway's own gauges, and the metrics of all workers."""
        from prometheus_client import CollectorRegistry, Gauge

        metrics, state = CollectorRegistry(), await self.registry.state()
        gauges = {
            'players': ('sessions, including those that wait', state['players']),
            'waiting': ('players who wait for a slot', state['waiting']),
            'places': ('slots in all workers that may exist', state['places']),
            'worlds': ('workers that are alive', len(state['worlds'])),
            'moment_age_seconds': ('age of the oldest checkpoint of a session', state['oldest']),
        }
        for name, (about, value) in gauges.items():
            Gauge(f'matrix_jax_front_{name}', about, registry=metrics).set(value)
        texts = await asyncio.gather(*map(self._worker_metrics, state['worlds']))
        metrics.register(LabelledMetrics(dict(zip(state['worlds'], texts))))
        return metrics

    async def _worker_metrics(self, address: str) -> str:
        """/metrics of a worker, '' if it is gone."""
        import httpx

        try:
            answer = await self._client.get(f'http://{address}/metrics', timeout=METRICS_SECONDS)
        except httpx.HTTPError:
            return ''
        return answer.text if answer.status_code == 200 else ''

    async def file(self, request):
        """Forwards a download or an upload of a session to its worker, chunk by chunk."""
        import httpx
        from starlette.requests import ClientDisconnect
        from starlette.responses import StreamingResponse

        session, name = request.path_params['session'], request.path_params['name']
        location = await self.registry.locate(session) if name.isalpha() else None
        if location is None:
            return error_response('this session is over', 404)
        if self._transfers >= MAX_TRANSFERS:
            return error_response('too many files at once; try again in a moment', 503)
        address, limit = location
        body = limited(request.stream(), limit) if request.method == 'POST' else None
        forwarded = self._client.build_request(
            request.method, f'http://{address}/session/{session}/{name}', content=body
        )
        self._transfers += 1
        try:
            answer = await self._client.send(forwarded, stream=True)
        except TooLarge:
            return error_response(f'the file is too large: expected at most {limit} bytes', 413)
        except (httpx.HTTPError, TimeoutError):
            return error_response('the world does not answer; try again', 503)
        except ClientDisconnect:
            return error_response('the upload was cut off', 400)
        finally:
            self._transfers -= 1
        headers = {key: value for key, value in answer.headers.items() if key in FORWARDED}
        return StreamingResponse(_body(answer), answer.status_code, headers)

    # --- playing -------------------------------------------------------------------------------

    async def play(self, socket):
        """One player's socket."""
        from starlette.websockets import WebSocketDisconnect

        await socket.accept()
        self._sockets.add(socket)
        try:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await ProxyConnection(self.registry, self.secret, self.acquire, socket).run()
        finally:
            self._sockets.discard(socket)

    async def acquire(
        self,
        session: str,
        request: dict,
        record: SessionRecord | None,
        on_wait: Callable[[], Awaitable[None]],
    ) -> str:
        """Leases a slot for a session -> the address of its worker.

        Args:
          session: token of the session.
          request: the player's 'join' message.
          record: what the registry knows about the session, or None for a new one.
          on_wait: awaited once if there is no free slot at once.

        Raises:
          NoCapacity: there is no free slot.
        """
        refused = await self.registry.reserve(session)
        if refused:
            raise NoCapacity(refused)
        address: asyncio.Future = asyncio.get_running_loop().create_future()
        # In a context of its own: the lease outlives the request that asks for it.
        task = asyncio.create_task(
            self._hold_lease(session, request, record, address), context=contextvars.Context()
        )
        self._leases.add(task)
        task.add_done_callback(self._leases.discard)
        try:
            for second in range(WAIT_SECONDS):
                done, _ = await asyncio.wait({address}, timeout=1 if second else 0.5)
                if done:
                    return address.result()
                if not second:
                    await on_wait()
                await self.registry.reserve(session)
            raise NoCapacity('no place became free; try again later')
        except BaseException:  # includes the cancellation when the player leaves meanwhile
            task.cancel()
            raise

    async def _hold_lease(
        self, session: str, request: dict, record: SessionRecord | None, address: asyncio.Future
    ):
        """Holds a lease until the session ends; the first answer goes into `address`."""
        data, paused = (record.data, record.paused) if record else (None, False)
        reason = 'no world took the session; try again'
        try:
            async for found, refused in self.lease(session, request, data, paused):
                if found:
                    address.set_result(found)
                else:
                    address.set_exception(NoCapacity(refused))
        except Exception as error:  # the worker is lost; its socket closes as well
            log.warning(
                'lease_broken',
                extra={'fields': {'session': session[:6], 'error': type(error).__name__}},
            )
            reason = 'the world could not be started; try again'
        if not address.done():
            address.set_exception(NoCapacity(reason))


async def _body(answer):
    """The body of an open answer, which is closed at the end."""
    async with contextlib.aclosing(answer):
        async for chunk in answer.aiter_raw():
            yield chunk


async def limited(stream, limit: int):
    """Yields the chunks of a stream.

    Raises:
      TooLarge: there are more than `limit` bytes.
      TimeoutError: the sender stalls.
    """
    size = 0
    while True:
        async with asyncio.timeout(CHUNK_SECONDS):
            chunk = await anext(stream, None)
        if chunk is None:
            return
        size += len(chunk)
        if size > limit:
            raise TooLarge
        if chunk:
            yield chunk
