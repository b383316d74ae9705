"""What the server of one machine and the gateway of a cluster share: routes, page and access."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import re
from pathlib import Path

from matrix_jax.serve.web import protocol
from matrix_jax.serve.web.transfers import error_response

PAGE = Path(__file__).with_name('player.html')
HOST = re.compile(r'(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?')
MESSAGE_BYTES = 64 * 2**10  # of one WebSocket message
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
      root_path: path before all others, such as '/matrix', if a reverse proxy keeps it.
    """

    def __init__(self, token: str | None, root_path: str = ''):
        self.token, self.root_path = token, root_path

    def asgi(self):
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Route, WebSocketRoute

        routes = [
            Route('/', self.page),
            Route('/healthz', self.health),
            Route('/metrics', self.metrics),
            Route('/stream.mp4', self.stream_mp4),
            WebSocketRoute('/play', self.play),
            Route('/session/{session}/{name}', self.file, methods=['GET', 'POST']),
        ]
        app = Starlette(routes=routes, lifespan=self.lifespan)
        return AccessControl(app, self.token, self.root_path)

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

    async def stream_mp4(self, request):
        """Serves a new session as a video without an end."""
        return error_response('stream.mp4 is not served here', 404)

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
    """ASGI middleware that checks the token, or else the host name and the origin.

    Without a token, the host name must be a name of this machine, and the page must come from this
    server. This stops DNS rebinding: a page elsewhere could otherwise reach a local server through
    a host name of its own. With a token, neither is checked, because reverse proxies change both,
    and a page elsewhere does not know the token.

    Args:
      app: the application.
      token, root_path: as of `BaseApp`.
    """

    def __init__(self, app, token: str | None, root_path: str = ''):
        self.app, self.token, self.root_path = app, token, root_path

    async def __call__(self, scope, receive, send):
        if scope['type'] not in ('http', 'websocket'):
            await self.app(scope, receive, send)
            return
        reason = self._denied(scope)
        path = scope['path']
        if self.root_path and path.startswith(f'{self.root_path}/'):
            path = path.removeprefix(self.root_path)
            scope = scope | {'path': path, 'raw_path': path.encode()}
        if reason is None:
            await self.app(scope, receive, send)
        elif scope['type'] == 'websocket':
            # A refused handshake would reach the page without the reason.
            await receive()
            await send({'type': 'websocket.accept'})
            text = json.dumps({'type': 'closed', 'code': 1008, 'message': reason})
            await send({'type': 'websocket.send', 'text': text})
            await send({'type': 'websocket.close', 'code': 1008, 'reason': reason})
        else:
            await error_response(reason, 403)(scope, receive, send)

    def _denied(self, scope) -> str | None:
        """Why a request is denied, or None."""
        from starlette.datastructures import Headers, QueryParams

        headers = Headers(scope=scope)
        if self.token is not None:
            if scope['path'].removeprefix(self.root_path) == '/healthz':
                return None
            given = QueryParams(scope['query_string']).get('token') or (
                headers.get('authorization', '').removeprefix('Bearer ')
            )
            if hmac.compare_digest(given.encode(), self.token.encode()):
                return None
            return 'open the address that the server printed; it ends in ?token=...'
        host, origin = headers.get('host', ''), headers.get('origin')
        if not is_local(host):
            return 'this server is for this machine only; open it as http://127.0.0.1'
        if origin is not None and origin.lower() not in (
            f'http://{host.lower()}',
            f'https://{host.lower()}',
        ):
            return 'requests from pages of another origin are refused'
        return None


def is_local(host: str) -> bool:
    """Whether the value of a Host header is a name or a loopback address of this machine."""
    match = HOST.fullmatch(host)
    if not match:
        return False
    name = match['name'].strip('[]').lower()
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == 'localhost'


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
