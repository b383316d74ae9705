"""From recipes to a server that listens: what `tools/play.py` does."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import ipaddress
import json
import logging
import socket
import sys
import time

from matrix_jax.config import UsageError, at_least

MESSAGE_BYTES = 64 * 2**10


@dataclasses.dataclass(frozen=True)
class Config:
    """Where to listen, and for how many.

    Attributes:
      players: slots.
      together: slots that are computed side by side; 1 suits a CPU, where an idle slot then costs
        nothing.
      entry: 'head', where keys are soon seen, or 'tail', as published.
      host, port: address; port 0 takes a free one.
      token: that a browser must bring; needed for any address but loopback.
      grace: seconds that the place of a lost player is kept.
    """

    players: int = 4
    together: int = 1
    entry: str = 'head'
    host: str = '127.0.0.1'
    port: int = 8000
    token: str | None = None
    grace: float = 30.0

    def __post_init__(self):
        at_least('--players', self.players, 1)
        if not 0 <= self.port < 2**16:
            raise UsageError(f'--port: got {self.port}, expected 0 to 65535')
        if self.token is not None and not (
            8 <= len(self.token) <= 128 and self.token.isascii() and self.token.isalnum()
        ):
            raise UsageError('--token: expected 8 to 128 letters and digits')
        if self.token is None and not loopback(self.host):
            raise UsageError(
                f'--host {self.host}: others can reach this address; '
                'give a --token that they must know'
            )

    def url(self, port: int) -> str:
        """What to open in a browser."""
        host = f'[{self.host}]' if ':' in self.host else self.host
        return f'http://{host}:{port}/' + (f'?token={self.token}' if self.token else '')


def loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == 'localhost'


def listen(cfg: Config) -> socket.socket:
    """The listening socket.

    Raises:
      UsageError: the address cannot be had.
    """
    family = socket.AF_INET6 if ':' in cfg.host else socket.AF_INET
    try:
        return socket.create_server((cfg.host, cfg.port), family=family, backlog=128)
    except OSError as error:
        raise UsageError(
            f'cannot listen on {cfg.host}:{cfg.port}: {error.strerror}; --port chooses another one'
        ) from error


def open_slots(run, cfg: Config):
    """The compiled slots of a recipe, and its weights folder."""
    from matrix_jax import worlds
    from matrix_jax.serve.runtime.batched_stream import Slots
    from matrix_jax.weights import diffusers_layout

    world, params = worlds.open_run(run, apart=True)
    slots = Slots(world, params, cfg.players, cfg.entry, cfg.together).compile()
    return slots, diffusers_layout.resolve(run.weights)


def uvicorn_server(app, players: int):
    """The web server, with limits on what one client can take."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level='warning',
            access_log=False,
            ws='websockets-sansio',
            ws_max_size=MESSAGE_BYTES,
            ws_per_message_deflate=False,
            ws_ping_interval=10,
            ws_ping_timeout=20,
            limit_concurrency=8 * players + 64,
            timeout_graceful_shutdown=3,
        )
    )


class JsonLines(logging.Formatter):
    """A record as one JSON object on one line: time, level, event, source, and its `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            'time': moment.isoformat(timespec='milliseconds'),
            'level': record.levelname,
            'event': record.getMessage(),
            'source': record.name,
            **getattr(record, 'fields', {}),
        }
        if record.exc_info:
            line['exception'] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr():
    """Our own events, and the troubles of others, Python's warnings too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    for name in ('jax', 'absl', 'orbax', 'httpx'):
        logging.getLogger(name).setLevel(logging.WARNING)


def serve(runs: list, cfg: Config):
    """Compiles the worlds of some recipes, one after the other, and plays them until it is
    interrupted."""
    from matrix_jax.serve.web.app import Server
    from matrix_jax.serve.web.multi_world import Street
    from matrix_jax.weights import diffusers_layout

    log_to_stderr()
    with listen(cfg) as sock:
        began, servers = time.perf_counter(), {}
        for run in runs[1:]:
            diffusers_layout.resolve(run.weights)  # else it would be missed after minutes
        for run in runs:
            print(f'compiling {run.name} for {cfg.players} players', flush=True)
            slots, folder = open_slots(run, cfg)
            servers[run.name] = Server(slots, folder, run.name, cfg.token, cfg.grace)
        many = len(servers) > 1
        server = Street(servers, cfg.token) if many else servers[run.name]
        print(
            f'{" and ".join(servers)} {"are" if many else "is"} ready after '
            f'{time.perf_counter() - began:.0f} s, for {cfg.players} players'
            f'{" each" * many}: open {cfg.url(sock.getsockname()[1])}',
            flush=True,
        )
        uvicorn_server(server.app(), cfg.players * len(servers)).run(sockets=[sock])
