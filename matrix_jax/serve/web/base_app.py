"""What the server of one machine and the gateway of a cluster share: routes, page and access."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from pathlib import Path

from matrix_jax.serve.web import protocol
from matrix_jax.serve.web.transfers import error_response

PAGE = Path(__file__).with_name('player.html')
LOCAL_HOSTS = ('localhost', '127.0.0.1', '[::1]')
MESSAGE_BYTES = 64 * 2**10  # of one WebSocket message
RATE, BURST = 60, 120  # messages of a player per second, and at once
JOIN_SECONDS = 10
HEADERS = {
    'Cache-Control': 'no-store',
    'X-Content-Type-Options': 'nosniff',
    'Referrer-Policy': 'no-referrer',
    'X-Frame-Options': 'DENY',
    'Content-Security-Policy': "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; img-src 'self' blob: data:; connect-src 'self' ws: wss:",
}


class BaseApp:
    """An ASGI application for players; subclasses fill in the methods that raise.

    Args:
      token: that every request must carry; None admits everybody, but only on this machine.
    """

    def __init__(self, token: str | None):
        self.token = token

    def asgi(self):
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Route, WebSocketRoute

        routes = [
            Route('/', self.page),
            Route('/healthz', self.health),
            Route('/metrics', self.metrics),
            WebSocketRoute('/play', self.play),
            Route('/session/{session}/{name}', self.file, methods=['GET', 'POST']),
        ]
        return AccessControl(Starlette(routes=routes, lifespan=self.lifespan), self.token)

    def lifespan(self, _):
        """An async context manager that is open while the application runs."""
        raise NotImplementedError

    async def state(self) -> dict:
        """The fields of /healthz; `ok` decides its status."""
        raise NotImplementedError

    async def collect_metrics(self):
        """The Prometheus registry of /metrics."""
        raise NotImplementedError

    async def play(self, socket):
        """Serves one player's WebSocket."""
        raise NotImplementedError

    async def file(self, request):
        """Serves a download or an upload of a session."""
        raise NotImplementedError

    async def page(self, _):
        """The player's page."""
        from starlette.responses import HTMLResponse

        return HTMLResponse(PAGE.read_text(encoding='utf-8'), headers=HEADERS)

    async def health(self, _):
        """`state` as JSON; 503 if it is not ok."""
        from starlette.responses import JSONResponse

        state = await self.state()
        return JSONResponse(state, 200 if state['ok'] else 503)

    async def metrics(self, _):
        """`collect_metrics` in the text format of Prometheus."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
        from starlette.responses import Response

        body = generate_latest(await self.collect_metrics())
        return Response(body, media_type=CONTENT_TYPE_LATEST)


class AccessControl:
    """ASGI middleware that checks the token, the host name and the origin of every request.

    Without a token, the host name must be a name of this machine. This stops DNS rebinding: a
    page elsewhere could otherwise reach a local server through a host name of its own.
    """

    def __init__(self, app, token: str | None):
        self.app, self.token = app, token

    async def __call__(self, scope, receive, send):
        reason = self._denied(scope) if scope['type'] in ('http', 'websocket') else None
        if reason is None:
            await self.app(scope, receive, send)
        elif scope['type'] == 'websocket':
            await receive()
            await send({'type': 'websocket.close', 'code': 1008, 'reason': reason})
        else:
            await error_response(reason, 403)(scope, receive, send)

    def _denied(self, scope) -> str | None:
        """Why a request is denied, or None."""
        from starlette.datastructures import URL, Headers, QueryParams

        headers = Headers(scope=scope)
        host = headers.get('host', '')
        if self.token is None and not {host, host.rpartition(':')[0]} & set(LOCAL_HOSTS):
            return f'this server is for this machine only; open it as http://{LOCAL_HOSTS[1]}'
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


async def receive_text(socket) -> str:
    """The next text message.

    Raises:
      WebSocketDisconnect: the player is gone.
    """
    from starlette.websockets import WebSocketDisconnect

    message = await socket.receive()
    if message['type'] == 'websocket.disconnect':
        raise WebSocketDisconnect(message.get('code') or 1000)
    return message.get('text') or ''


async def receive_join(socket) -> dict | None:
    """The 'join' message that a player sends first; None if the socket was closed instead.

    Raises:
      WebSocketDisconnect: the player is gone.
    """
    try:
        async with asyncio.timeout(JOIN_SECONDS):
            return protocol.parse_join(await receive_text(socket))
    except (protocol.MessageError, TimeoutError) as error:
        await close_socket(socket, 1008, str(error) or f'expected join within {JOIN_SECONDS} s')
        return None


async def run_until_first_ends(*coroutines) -> list[Exception]:
    """Runs coroutines side by side; when one ends, cancels the others -> their exceptions."""
    tasks = [asyncio.create_task(one) for one in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    return [result for result in results if isinstance(result, Exception)]


async def close_socket(socket, code: int, reason: str):
    """Sends the reason and closes the socket, which may be gone already."""
    from starlette.websockets import WebSocketDisconnect

    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
        await socket.send_text(json.dumps({'type': 'closed', 'code': code, 'message': reason}))
        await socket.close(code, reason.encode()[:120].decode(errors='ignore'))
