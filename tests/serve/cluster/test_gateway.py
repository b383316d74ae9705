"""A gateway with two workers: players get slots, and continue elsewhere when a worker is lost."""

import json
import threading
import time

import pytest

from matrix_jax.config import UsageError
from matrix_jax.serve.cluster import gateway, ray_serve, worker
from matrix_jax.serve.cluster.registry import SessionRegistry
from matrix_jax.serve.runtime import replay, session_log, snapshot
from matrix_jax.serve.web import server
from matrix_jax.serve.web.encoding import to_jpeg

SECRET = 'secret1234'


class Local:
    """A `SessionRegistry` in this process whose methods are coroutines."""

    def __init__(self, registry):
        self.registry = registry

    def __getattr__(self, name):
        async def call(*given):
            return getattr(self.registry, name)(*given)

        return call


def number(text, name):
    """The value of a counter."""
    return float(text.split(f'\n{name} ')[1].split()[0])


@pytest.fixture
def cluster(stream, tiny, serving, monkeypatch):
    """A gateway on a free port, with a `registry` and two `workers`; leases go to the first."""
    monkeypatch.setattr(worker, 'CHECKPOINT_SECONDS', 0.2)
    cfg, registry = server.Config(players=stream.num_slots, grace=1.0), SessionRegistry(places=4)
    workers = [
        worker.WorkerServer(
            stream.empty_copy(), tiny, 'the_matrix:TINY', cfg, SECRET, Local(registry), '127.0.0.1'
        )
        for _ in range(2)
    ]
    gone = []

    async def lease(*given):
        first = next(one for one in workers if one not in gone)
        async for one in first.lease(*given):
            yield one

    def kill(victim):
        """As when its process dies."""

        def die():
            for one in (*victim._tasks, *victim._web.server_state.tasks):
                one.cancel()
            for one in list(victim._web.server_state.connections):
                one.transport.abort()

        gone.append(victim)
        victim.world.manager.loop.call_soon_threadsafe(die)

    running = serving(app=gateway.Gateway(Local(registry), lease, SECRET))
    running.registry, running.workers, running.kill = registry, workers, kill
    yield running
    running.opened.close()
    for one in workers:
        one._web.should_exit = True
    for one in workers:
        one._thread.join()


def test_players_share_one_address(cluster):
    player = cluster.join(seed=3)
    assert not player.welcome['resumed']
    player.send(type='keys', id=5, symbol='DL')
    while 5 not in player.keys:
        player.read()
    assert json.loads(player.ask('replay')[1])['seed'] == 3
    status, data = player.ask('world')
    assert status == 200 and player.ask('world', data)[0] == 200
    assert player.ask('world', b'nonsense')[0] == 422 and player.ask('video')[0] == 409
    assert cluster.http('/session/unknown/world')[0] == 404
    assert b'<canvas' in cluster.http('/')[1]
    player.close()
    back = cluster.join(session=player.welcome['session'])
    assert back.welcome['resumed']
    back.send(type='leave')
    assert back.wait('closed')['code'] == 1000
    cluster.until(lambda: cluster.players() == 0)
    assert back.socket.close_code in (None, 1000)
    assert not cluster.join(session=player.welcome['session']).welcome['resumed']

    def metrics():
        return cluster.http('/metrics')[1].decode()

    cluster.until(lambda: number(metrics(), 'matrix_jax_front_moment_age_seconds') > 0)
    text = metrics()
    assert 'matrix_jax_front_players 1.0' in text and 'matrix_jax_front_worlds 2.0' in text
    assert number(text, 'matrix_jax_front_moment_age_seconds') < 60
    first, second = (f'{{world="{one.address}"}}' for one in cluster.workers)
    assert number(text, f'matrix_jax_world_fps{first}') > 0
    assert number(text, f'matrix_jax_step_seconds_count{first}') > 0
    assert number(text, f'matrix_jax_action_to_pixel_seconds_count{first}') == 1
    assert number(text, f'matrix_jax_recompilations_total{first}') == 0
    assert number(text, f'matrix_jax_frames_dropped_total{second}') == 0
    assert text.count('# TYPE matrix_jax_step_seconds histogram') == 1
    # nobody can join a worker directly
    status, _ = cluster.http('/healthz')
    assert status == 200 and cluster.workers[0].world.manager.open_admission is False


def test_files_pass_chunk_by_chunk(cluster, monkeypatch):
    player = cluster.join()
    limit = cluster.workers[0].world.world_bytes
    assert cluster.registry.locate(player.welcome['session']) == (cluster.workers[0].address, limit)
    sizes, limited = [], gateway.limited

    async def measured(*args):
        async for chunk in limited(*args):
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(gateway, 'limited', measured)
    assert player.ask('world', bytes(2**22))[0] == 422  # the world has judged it
    assert sum(sizes) == 2**22 and max(sizes) <= 2**18
    cluster.registry.register_worker(cluster.workers[0].address, 2**20)  # as if this were its limit
    status, message = player.ask('world', bytes(2**20 + 1))
    assert status == 413 and b'at most 1048576 bytes' in message
    monkeypatch.setattr(gateway, 'MAX_TRANSFERS', 0)
    assert player.ask('replay')[0] == 503
    assert cluster.app._transfers == 0 and player.ask('unknown.file')[0] == 404


def test_a_lost_worker_loses_no_player(cluster, stream, tiny):
    player = cluster.join(seed=5)
    token = player.welcome['session']
    player.watch(24)
    cluster.until(lambda: (known := cluster.registry.find(token)) and known.data)
    saved = json.loads(player.ask('replay')[1])
    player.frames.clear()
    cluster.kill(cluster.workers[0])
    assert 'lost' in player.wait('waiting')['message']
    player.frames.clear()
    assert player.wait('welcome')['resumed']
    assert player.notes[-1]['session'] == token and cluster.registry.find(token).address == (
        cluster.workers[1].address
    )
    player.watch(24)
    log = json.loads(player.ask('replay')[1])
    assert log['seed'] == saved['seed'] and log['start'] == saved['start']
    # it continues from a checkpoint of the same log, and each frame is the frame of that log
    made = [
        to_jpeg(frame)
        for frame in replay.frames(stream.empty_copy(), tiny, session_log.from_json(log))
    ]
    at = made.index(player.frames[0])
    assert at >= stream.frames_per_step
    assert all(
        made[at + index] == frame
        for index, frame in player.frames.items()
        if at + index < len(made)
    )


def test_checkpoints_are_saved_while_clips_are_encoded(cluster):
    player = cluster.join(seed=5)
    encoded = threading.Event()
    cluster.workers[0].world.manager._encoder.submit(encoded.wait)  # someone's long start clip
    try:
        player.send(type='prompt', text='snow')  # which this waits for
        player.watch(16)
        before = cluster.registry.find(player.welcome['session'])
        cluster.until(
            lambda: (
                (now := cluster.registry.find(player.welcome['session'])).data != before.data
                and now.taken_at > (before.taken_at or 0)
            )
        )
        assert not any(note.get('prompt') == 'snow' for note in player.notes)
    finally:
        encoded.set()
    while player.wait('state')['prompt'] != 'snow':
        pass


def test_a_worker_that_closes_hands_its_players_over(cluster, stream):
    player = cluster.join(seed=5)
    player.watch(8)
    player.send(type='pause', on=True)
    while not player.wait('state')['paused']:
        pass
    closing, before = cluster.workers[0], json.loads(player.ask('replay')[1])

    def saved():
        data = cluster.registry.find(player.welcome['session']).data
        return data and snapshot.parse(data, stream.carry_shapes, stream.fingerprint())[1].to_json()

    cluster.until(lambda: saved() == before)
    cluster.workers.reverse()  # the next lease goes to the other one
    closing.close()
    again = player.wait('welcome')
    assert again['resumed'] and again['paused']
    assert json.loads(player.ask('replay')[1]) == before


def test_a_full_or_closing_town_says_so_at_once(cluster):
    for index in range(4):
        assert cluster.registry.reserve(f'someone{index}') == ''
    assert 'all 4 places are taken' in cluster.join().welcome['message']
    cluster.registry.remove('someone0')
    player = cluster.join()
    assert player.welcome['type'] == 'welcome'
    cluster.registry.close(1.0)
    assert 'closes in' in player.wait('error')['message']
    assert 'closing' in cluster.join().welcome['message']
    assert player.wait('closed')['message'] == 'the server has stopped'


def test_sessions_that_nobody_mentions_are_forgotten(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    registry = SessionRegistry(places=1)
    assert (
        registry.reserve('a') == ''
        and registry.reserve('a') == ''
        and 'taken' in registry.reserve('b')
    )
    registry.assign('a', 'host:1', False)
    registry.register_worker('host:1', 99)
    assert registry.locate('a') == ('host:1', 99) and registry.locate('b') is None
    registry.update('a', 'host:1', None, True, 0.5)
    assert registry.find('a').taken_at is None and registry.state()['oldest'] == 0
    now[0] = 1.0
    registry.update('a', 'host:1', b'checkpoint', True, 0.5)
    assert registry.find('a').taken_at == 0.5
    registry.update('a', 'host:1', None, False, 0.25)  # it rests, and is as it was saved
    registry.update('a', 'host:0', b'late', True, 0.0)  # of a world that had it before
    registry.remove('a', 'host:0')
    assert registry.find('a')[:3] == ('host:1', b'checkpoint', False)
    now[0] = 2.0
    assert registry.state() == {
        'players': 1,
        'places': 1,
        'worlds': ['host:1'],
        'waiting': 0,
        'oldest': 1.25,
        'closing': None,
    }
    registry.assign('a', 'host:2', False)  # another worker continues it
    assert registry.find('a').taken_at == 0.75
    assert registry.locate('a') is None  # which has not spoken yet
    now[0] = 15.0
    assert registry.state()['worlds'] == []  # one that says nothing is gone
    now[0] = 63.0
    assert registry.find('a') is None and registry.reserve('b') == ''
    assert registry.state()['waiting'] == 1


@pytest.mark.parametrize('text, message', [('0', 'got 0-0'), ('3-2', 'got 3-2'), ('x', "got 'x'")])
def test_a_wrong_count_of_worlds_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        ray_serve.Config(*ray_serve.parse_worlds(text))
