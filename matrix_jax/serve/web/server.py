"""Starts the live player: from recipes to a listening server."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import ipaddress
import json
import logging
import re
import socket
import sys
import time

from matrix_jax.config import UsageError, at_least
from matrix_jax.serve.web.base_app import MESSAGE_BYTES


@dataclasses.dataclass(frozen=True)
class Config:
    """Address and size of a server.

    Attributes:
      players: slots of each world.
      together: slots that are computed side by side; 1 suits a CPU, where an idle slot then costs
        nothing.
      control_binding: 'early', which shows keys sooner, or 'late', as published.
      host, port: address; port 0 takes a free one.
      token: that a browser must send; required for any address but loopback.
      grace: seconds that the slot of a lost player is kept.
      root_path: path of the page, such as '/matrix', behind a reverse proxy that keeps it.

    Raises:
      UsageError: a field is out of range, or the address needs a token.
    """

    players: int = 4
    together: int = 1
    control_binding: str = 'early'
    host: str = '127.0.0.1'
    port: int = 8000
    token: str | None = None
    grace: float = 30.0
    root_path: str = ''

    def __post_init__(self):
        at_least('--players', self.players, 1)
        if not 0 <= self.port < 2**16:
            raise UsageError(f'--port: got {self.port}, expected 0 to 65535')
        if self.token is not None and not (
            8 <= len(self.token) <= 128 and self.token.isascii() and self.token.isalnum()
        ):
            raise UsageError('--token: expected 8 to 128 letters and digits')
        if not re.fullmatch(r'(/[A-Za-z0-9._~-]+)*', self.root_path):
            raise UsageError(f'--root-path: got {self.root_path!r}, expected such as /matrix')
        if self.token is None and not is_loopback(self.host):
            raise UsageError(
                f'--host {self.host}: other machines can reach this address; '
                'give a --token that players must know'
            )

    def url(self, port: int) -> str:
        """The address to open in a browser."""
        host = f'[{self.host}]' if ':' in self.host else self.host
        query = f'?token={self.token}' if self.token else ''
        return f'http://{host}:{port}{self.root_path}/{query}'


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == 'localhost'


def listen(cfg: Config) -> socket.socket:
    """Opens the listening socket; '::' takes IPv4 as well, where the system can.

    Raises:
      UsageError: the address is not available.
    """
    family = socket.AF_INET6 if ':' in cfg.host else socket.AF_INET
    both = cfg.host == '::' and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            (cfg.host, cfg.port), family=family, backlog=128, dualstack_ipv6=both
        )
    except OSError as error:
        raise UsageError(
            f'cannot listen on {cfg.host}:{cfg.port}: {error.strerror}; --port chooses another one'
        ) from error


def uvicorn_server(app, players: int):
    """A uvicorn server with limits on what one client can use."""
    import uvicorn

    from matrix_jax.serve.web.connections import Connections

    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level='warning',
            access_log=False,
            **Connections(8 * players + 64).protocols(),
            proxy_headers=False,
            ws_max_size=MESSAGE_BYTES,
            ws_per_message_deflate=False,
            ws_ping_interval=10,
            ws_ping_timeout=20,
            timeout_graceful_shutdown=3,
        )
    )


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON: time, level, event, source, and its `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        created = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            'time': created.isoformat(timespec='milliseconds'),
            'level': record.levelname,
            'event': record.getMessage(),
            'source': record.name,
            **getattr(record, 'fields', {}),
        }
        if record.exc_info:
            line['exception'] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr():
    """Logs our own events, and the warnings of other libraries, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    for name in ('jax', 'absl', 'orbax', 'httpx'):
        logging.getLogger(name).setLevel(logging.WARNING)


def serve(runs: list, cfg: Config):
    """Compiles the worlds of some recipes one after the other, and serves them until interrupted.

    Raises:
      UsageError: the address is not available, or a recipe has no weights.
    """
    from matrix_jax.serve.runtime.batched_stream import open_stream
    from matrix_jax.serve.web.app import WorldApp
    from matrix_jax.serve.web.hosted_world import HostedWorld
    from matrix_jax.weights import diffusers_layout

    log_to_stderr()
    with listen(cfg) as sock:
        began, worlds = time.perf_counter(), {}
        for run in runs[1:]:
            diffusers_layout.resolve(run.weights)  # fail now, not after minutes of compiling
        say = functools.partial(print, flush=True)
        for run in runs:
            stream, folder = open_stream(run, cfg.players, cfg.control_binding, cfg.together, say)
            worlds[run.name] = HostedWorld(stream, folder, run.name, cfg.grace)
        several = len(worlds) > 1
        print(
            f'{" and ".join(worlds)} {"are" if several else "is"} ready after '
            f'{time.perf_counter() - began:.0f} s, for {cfg.players} players'
            f'{" each" * several}: open {cfg.url(sock.getsockname()[1])}',
            flush=True,
        )
        app = WorldApp(worlds, cfg.token, cfg.root_path).asgi()
        uvicorn_server(app, cfg.players * len(worlds)).run(sockets=[sock])
