"""Several worlds in one process: a house each, side by side, and a player goes from one to another.

Nothing is shared but the process and the device: every world has an engine, slots, sessions and
counters of its own, and one that nobody plays computes nothing.
"""

from __future__ import annotations

import contextlib

from matrix_jax.serve.cluster import proxy
from matrix_jax.serve.web.app import Guard, Server, _close
from matrix_jax.serve.web.transfers import trouble

NO_SUCH_WORLD = 4004  # code of a socket that asked for one


class Street:
    """The application of several worlds.

    Args:
      servers: by recipe; who names no world comes to the first.
      token: as of `Server`.
    """

    def __init__(self, servers: dict[str, Server], token: str | None = None):
        self.servers, self.token = servers, token

    def app(self):
        """The ASGI application; all engines run while it does."""
        from starlette.applications import Starlette
        from starlette.routing import Route, WebSocketRoute

        first = next(iter(self.servers.values()))
        routes = [
            Route('/', first.page),
            Route('/healthz', self.health),
            Route('/metrics', self.metrics),
            WebSocketRoute('/play', self.play),
            Route('/session/{session}/{what}', self.file, methods=['GET', 'POST']),
        ]
        return Guard(Starlette(routes=routes, lifespan=self._lifespan), self.token)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _):
        for one in self.servers.values():
            one.open()
        async with contextlib.AsyncExitStack() as stack:
            for one in self.servers.values():
                await stack.enter_async_context(one.running())
            yield

    async def health(self, _):
        """Well if all are."""
        from starlette.responses import JSONResponse

        worlds = {name: one.state() for name, one in self.servers.items()}
        well = all(one['ok'] for one in worlds.values())
        return JSONResponse(
            {
                'ok': well,
                'worlds': worlds,
                **{key: sum(one[key] for one in worlds.values()) for key in ('players', 'places')},
            },
            200 if well else 503,
        )

    async def metrics(self, _):
        """What each counts, labelled by its recipe."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from starlette.responses import Response

        registry = CollectorRegistry()
        registry.register(
            proxy.Labelled(
                {name: one.meters.text()[0].decode() for name, one in self.servers.items()}
            )
        )
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def file(self, request):
        """A file from or to a session, by the world that has it."""
        from starlette.routing import Router

        for one in self.servers.values():
            if request.path_params['session'] in one.house.sessions:
                return Router(one.routes())
        return trouble('this session is over', 404)

    async def play(self, socket):
        """A player's socket, in the world that `?world=` names."""
        asked = socket.query_params.getlist('world') or list(self.servers)[:1]
        one = self.servers.get(asked[0]) if len(asked) == 1 else None
        if one:
            await one.play(
                socket, {'type': 'worlds', 'worlds': list(self.servers), 'world': asked[0]}
            )
            return
        await socket.accept()
        await _close(
            socket,
            NO_SUCH_WORLD,
            f'world: got {", ".join(asked)[:80]!r}, expected one of {", ".join(self.servers)}',
        )
