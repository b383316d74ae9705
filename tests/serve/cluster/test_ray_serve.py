"""A gateway and replicas on a real Ray cluster of this machine; skipped without Ray."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import types
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from websockets.sync.client import connect

from matrix_jax import recipes
from matrix_jax.config import UsageError
from matrix_jax.serve.cluster import ray_serve, worker
from matrix_jax.serve.web import server
from tests.serve.conftest import Player

# Ray is not imported here: `ray_serve.connect` first sets its environment.
needs_ray = pytest.mark.skipif(importlib.util.find_spec('ray') is None, reason='needs [ray]')


class Address:
    """Where `Player` connects."""

    def __init__(self, port):
        self.port = port

    def connect(self, query=''):
        return connect(f'ws://127.0.0.1:{self.port}/play{query}', max_size=2**24)


def steps(data: bytes) -> int:
    """Steps that were played when a `.world` file was made."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
    symbols = json.loads(header['__metadata__']['log'])['symbols']
    return sum(int(part.split('*')[1]) for part in symbols.split(',') if part)


class Patient(Player):
    """Waits for a world that starts on a busy machine."""

    def wait(self, *kinds, seconds=180.0):
        return super().wait(*kinds, seconds=seconds)


def replicas() -> list[str]:
    """Names of the actors of all worlds."""
    from ray.util import list_named_actors

    return [
        one['name']
        for one in list_named_actors(all_namespaces=True)
        if '#WorldReplica#' in one['name']
    ]


def reachable() -> list[str]:
    """Where the processes of this test can be reached from other machines."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [
                f'{process.name()} {one.laddr.ip}:{one.laddr.port}'
                for one in process.net_connections('tcp')
                if one.status == psutil.CONN_LISTEN
                and one.laddr.ip not in ('127.0.0.1', '::1', '::ffff:127.0.0.1')
            ]
    return found


@needs_ray
def test_a_player_outlives_its_world(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'true')
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))  # the second is there soon
    monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    monkeypatch.setenv('RAY_ADDRESS', 'local')
    with socket.create_server(('127.0.0.1', 0)) as free:
        cfg = server.Config(players=1, port=free.getsockname()[1])
    recipe = dataclasses.replace(recipes.load('the_matrix:TINY'), weights=str(tiny))
    with ray_serve.running(recipe, cfg, ray_serve.Config(1, 2, cpus=0.1, drain=0.5)) as registry:
        import ray

        player, worlds = Patient(Address(cfg.port), seed=5), replicas()
        assert len(worlds) == 1
        with ThreadPoolExecutor(1) as beside:
            waiting = beside.submit(Patient, Address(cfg.port), seed=6)
            while not waiting.done():
                player.watch(1)
        other = waiting.result()  # which waited for another world
        assert [note['type'] for note in other.notes] == ['waiting', 'welcome']
        assert len(replicas()) == 2
        # Ray binds the internal port of a replica to all addresses; it requires the token.
        assert all(name.startswith('ray::ServeReplica') for name in reachable())
        assert 'places are taken' in Player(Address(cfg.port)).welcome['message']
        with urllib.request.urlopen(f'http://127.0.0.1:{cfg.port}/metrics') as answer:
            assert answer.read().decode().count('\nmatrix_jax_world_fps{world=') == 2
        other.watch(8)
        other.send(type='leave')
        assert other.wait('closed')['code'] == 1000

        token, per = player.welcome['session'], player.welcome['shift_frames']
        while not (kept := ray.get(registry.find.remote(token))).data or not steps(kept.data):
            player.watch(1)
        first = kept.address
        ray.kill(ray.get_actor(worlds[0], 'serve'))
        dead, kept = time.monotonic(), ray.get(registry.find.remote(token))
        assert kept.address == first and dead - kept.taken_at <= worker.MAX_LOST_SECONDS
        assert 'lost' in player.wait('waiting')['message']
        played = (max(player.frames) + 1 - steps(kept.data) * per) / player.welcome['fps']
        assert played <= worker.MAX_LOST_SECONDS
        player.frames.clear()
        again = player.wait('welcome')
        assert again['resumed'] and again['session'] == token and again['seed'] == 5
        assert ray.get(registry.find.remote(token)).address != first
        player.watch(8)
        player.send(type='leave')
        assert player.wait('closed')['code'] == 1000
    assert not ray.is_initialized()


class Stop(Exception):
    """Raised by a stand-in for Ray."""


def test_sigterm_drains_as_ctrl_c_does(monkeypatch):
    """Ray's own handler, which it sets when it starts, would end the process at once."""
    handlers = []

    class Ray(types.ModuleType):
        def init(self, *_, **__):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        def shutdown(self):
            pass

    class Serve:
        def start(self, **_):
            handlers.append(signal.getsignal(signal.SIGTERM))
            raise Stop

    ray = Ray('ray')
    ray.serve = Serve()
    ray.util = types.SimpleNamespace(get_node_ip_address=lambda: '127.0.0.1')
    monkeypatch.setitem(sys.modules, 'ray', ray)
    monkeypatch.setattr(os, 'environ', {**os.environ, 'RAY_ADDRESS': 'local'})
    monkeypatch.setattr(ray_serve, 'check', lambda recipe, _: recipe)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stop), ray_serve.running(None, server.Config(), ray_serve.Config()):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handlers == [signal.default_int_handler]


def test_a_cluster_that_is_late_is_started_again(monkeypatch):
    class Ray:
        attempts = 0

        def init(self, *_, **__):
            self.attempts += 1
            if self.attempts <= late:
                raise Exception('The current node timed out during startup.\nMore.')

        def shutdown(self):
            pass

    ray, late = Ray(), 2
    ray_serve._init(ray, True)
    assert ray.attempts == 3
    ray, late = Ray(), 9
    with pytest.raises(UsageError, match='--ray: no cluster could be started: .* startup.$'):
        ray_serve._init(ray, True)
    assert ray.attempts == ray_serve.START_ATTEMPTS


def test_which_cluster_is_joined(tmp_path, monkeypatch):
    monkeypatch.setenv('RAY_TMPDIR', str(tmp_path))
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    assert not ray_serve.can_join()
    (tmp_path / 'ray').mkdir()
    (tmp_path / 'ray' / 'ray_current_cluster').write_text('10.0.0.1:6379')
    assert ray_serve.can_join()
    monkeypatch.setenv('RAY_ADDRESS', 'local')
    assert not ray_serve.can_join()
    monkeypatch.setenv('RAY_ADDRESS', '10.0.0.2:6379')
    assert ray_serve.can_join()
