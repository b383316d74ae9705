"""The same on a real Ray cluster of this machine; skipped where Ray is not installed."""

import dataclasses
import socket

import pytest
from websockets.sync.client import connect

from matrix_jax import config
from matrix_jax.serve import cluster, run
from tests.serve.conftest import Player

ray = pytest.importorskip('ray', reason='needs the extra [ray]')


class Door:
    """Where `Player` connects."""

    def __init__(self, port):
        self.port = port

    def connect(self):
        return connect(f'ws://127.0.0.1:{self.port}/play', max_size=2**24)


def test_a_player_outlives_its_world(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))      # the second is there soon
    monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    with socket.create_server(('127.0.0.1', 0)) as free:
        cfg = run.Config(players=1, port=free.getsockname()[1])
    recipe = dataclasses.replace(config.load('the_matrix:TINY'), weights=str(tiny))
    with cluster.running(recipe, cfg, cluster.Config(1, 1, cpus=0.1, drain=0.5)) as book:
        from ray.util import list_named_actors
        player = Player(Door(cfg.port), seed=5)
        token = player.welcome['session']
        player.watch(8)
        assert 'places are taken' in Player(Door(cfg.port)).welcome['message']
        while not ray.get(book.find.remote(token)).data:
            player.watch(1)
        worlds = [one['name'] for one in list_named_actors(all_namespaces=True)
                  if '#World#' in one['name']]
        ray.kill(ray.get_actor(worlds[0], 'serve'))
        assert 'lost' in player.wait('waiting')['message']
        again = player.wait('welcome', seconds=120)
        assert again['resumed'] and again['session'] == token and again['seed'] == 5
        player.watch(8)
        player.send(type='leave')
        assert player.wait('closed')['code'] == 1000
    assert not ray.is_initialized()
