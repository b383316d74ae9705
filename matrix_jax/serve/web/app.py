"""The web application of one machine: a page, a WebSocket per player, and files.

The server sends binary frames (`session.HEADER`, then a JPEG) and JSON messages. Players send the
messages of `protocol`. Files go over HTTP, addressed by a session's token. Nothing that a client
sends becomes a path.

Worlds share the process and the device. Each has its own engine, slots, sessions and metrics, and
a world without players computes nothing.
"""

from __future__ import annotations

import contextlib

from matrix_jax.config import UsageError
from matrix_jax.serve.web import mp4_stream
from matrix_jax.serve.web.base_app import BaseApp, close_socket
from matrix_jax.serve.web.connection import serve_player
from matrix_jax.serve.web.hosted_world import HostedWorld
from matrix_jax.serve.web.metrics import LabelledMetrics
from matrix_jax.serve.web.transfers import error_response

NO_SUCH_WORLD = 4004  # WebSocket close code


class WorldApp(BaseApp):
    """Serves one or several worlds.

    Args:
      worlds: by recipe; a player who names no world joins the first.
      token, root_path: as of `BaseApp`.
    """

    def __init__(
        self, worlds: dict[str, HostedWorld], token: str | None = None, root_path: str = ''
    ):
        super().__init__(token, root_path)
        self.worlds = worlds

    @contextlib.asynccontextmanager
    async def lifespan(self, _):
        """Runs all engines."""
        for world in self.worlds.values():
            world.open()
        async with contextlib.AsyncExitStack() as stack:
            for world in self.worlds.values():
                await stack.enter_async_context(world.running())
            yield

    async def state(self) -> dict:
        """The state of the only world, or of all: ok if every world is."""
        states = {name: world.state() for name, world in self.worlds.items()}
        if len(states) == 1:
            return next(iter(states.values()))
        return {
            'ok': all(state['ok'] for state in states.values()),
            'worlds': states,
            **{key: sum(state[key] for state in states.values()) for key in ('players', 'places')},
        }

    async def collect_metrics(self):
        """The metrics of the only world, or of all with the label `world`."""
        from prometheus_client import CollectorRegistry, generate_latest

        registries = {name: world.metrics.registry for name, world in self.worlds.items()}
        if len(registries) == 1:
            return next(iter(registries.values()))
        merged = CollectorRegistry()
        texts = {name: generate_latest(one).decode() for name, one in registries.items()}
        merged.register(LabelledMetrics(texts))
        return merged

    async def file(self, request):
        """A file of a session, served by the session's world."""
        token, name = request.path_params['session'], request.path_params['name']
        for world in self.worlds.values():
            session = world.manager.sessions.get(token)
            if session:
                response = world.file(session, request.method, name)
                return response or error_response('there is no such file', 404)
        return error_response('this session is over', 404)

    async def play(self, socket):
        """A player's socket, in the world that `?world=` names."""
        await socket.accept()
        names = list(self.worlds)
        if len(names) == 1:
            await serve_player(self.worlds[names[0]], socket)
            return
        try:
            name = self._requested(socket)
        except UsageError as error:
            await close_socket(socket, NO_SUCH_WORLD, str(error))
            return
        await serve_player(
            self.worlds[name], socket, {'type': 'worlds', 'worlds': names, 'world': name}
        )

    async def stream_mp4(self, request):
        """A new session as a video, in the world that `?world=` names."""
        try:
            return await mp4_stream.respond(self.worlds[self._requested(request)], request)
        except UsageError as error:
            return error_response(str(error), 404)

    def _requested(self, connection) -> str:
        """The world that a query names, or the first.

        Raises:
          UsageError: there is no such world.
        """
        names = list(self.worlds)
        requested = connection.query_params.getlist('world') or names[:1]
        if len(requested) != 1 or requested[0] not in self.worlds:
            got = ', '.join(requested)[:80]
            raise UsageError(f'world: got {got!a}, expected one of {", ".join(names)}')
        return requested[0]
