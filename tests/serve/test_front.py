"""One door to two houses: players are seated, and go on elsewhere when their house is lost."""

import json
import threading
import time

import pytest

from matrix_jax.config import UsageError
from matrix_jax.serve.cluster import gateway, proxy, workers
from matrix_jax.serve.cluster.registry import Book
from matrix_jax.serve.runtime import session_log, snapshot
from matrix_jax.serve.web import server
from matrix_jax.serve.web.app import to_jpeg

SECRET = 'secret1234'


class Local:
    """A `Book` in this process; its methods are awaited like those of an actor."""

    def __init__(self, book):
        self.book = book

    def __getattr__(self, name):
        async def call(*given):
            return getattr(self.book, name)(*given)

        return call


def number(text, name):
    """The value of a counter."""
    return float(text.split(f'\n{name} ')[1].split()[0])


@pytest.fixture
def town(slots, tiny, serving, monkeypatch):
    """A front on a free port, with `book` and two `places`; the first free one is taken."""
    monkeypatch.setattr(workers, 'SAVE_SECONDS', 0.2)
    cfg, book = server.Config(players=slots.count, grace=1.0), Book(places=4)
    places = [
        workers.Place(slots.blank(), tiny, 'the_matrix:TINY', cfg, SECRET, Local(book), '127.0.0.1')
        for _ in range(2)
    ]
    gone = []

    async def lease(*given):
        place = next(one for one in places if one not in gone)
        async for one in place.lease(*given):
            yield one

    def kill(place):
        """As when its process dies."""

        def die():
            for one in (*place._keepers, *place._web.server_state.tasks):
                one.cancel()
            for one in list(place._web.server_state.connections):
                one.transport.abort()

        gone.append(place)
        place.server.house.loop.call_soon_threadsafe(die)

    door = serving(front=gateway.Front(Local(book), lease, SECRET))
    door.book, door.places, door.kill = book, places, kill
    yield door
    door.opened.close()
    for place in places:
        place._web.should_exit = True
    for place in places:
        place._thread.join()


def test_players_are_seated_behind_one_door(town):
    player = town.join(seed=3)
    assert not player.welcome['resumed']
    player.send(type='keys', id=5, symbol='DL')
    while 5 not in player.keys:
        player.read()
    assert json.loads(player.ask('replay')[1])['seed'] == 3
    status, data = player.ask('world')
    assert status == 200 and player.ask('world', data)[0] == 200
    assert player.ask('world', b'nonsense')[0] == 422 and player.ask('video')[0] == 409
    assert town.http('/session/unknown/world')[0] == 404
    assert b'<canvas' in town.http('/')[1]
    player.close()
    back = town.join(session=player.welcome['session'])
    assert back.welcome['resumed']
    back.send(type='leave')
    assert back.wait('closed')['code'] == 1000
    town.until(lambda: town.players() == 0)
    assert back.socket.close_code in (None, 1000)
    assert not town.join(session=player.welcome['session']).welcome['resumed']

    def metrics():
        return town.http('/metrics')[1].decode()

    town.until(lambda: number(metrics(), 'matrix_jax_front_moment_age_seconds') > 0)
    text = metrics()
    assert 'matrix_jax_front_players 1.0' in text and 'matrix_jax_front_worlds 2.0' in text
    assert number(text, 'matrix_jax_front_moment_age_seconds') < 60
    first, second = (f'{{world="{place.address}"}}' for place in town.places)
    assert number(text, f'matrix_jax_world_fps{first}') > 0
    assert number(text, f'matrix_jax_step_seconds_count{first}') > 0
    assert number(text, f'matrix_jax_action_to_pixel_seconds_count{first}') == 1
    assert number(text, f'matrix_jax_recompilations_total{first}') == 0
    assert number(text, f'matrix_jax_frames_dropped_total{second}') == 0
    assert text.count('# TYPE matrix_jax_step_seconds histogram') == 1
    # nobody gets in beside the door
    status, _ = town.http('/healthz')
    assert status == 200 and town.places[0].server.house.door is False


def test_files_pass_piece_by_piece(town, monkeypatch):
    player = town.join()
    limit = town.places[0].server.world_bytes
    assert town.book.where(player.welcome['session']) == (town.places[0].address, limit)
    sizes, sent = [], proxy.sent

    def measured(*given):
        for piece in sent(*given):
            sizes.append(len(piece))
            yield piece

    monkeypatch.setattr(proxy, 'sent', measured)
    assert player.ask('world', bytes(2**22))[0] == 422  # the world has judged it
    assert sum(sizes) == 2**22 and max(sizes) <= 2**18
    town.book.open(town.places[0].address, 2**20)  # as if this were its limit
    status, said = player.ask('world', bytes(2**20 + 1))
    assert status == 413 and b'at most 1048576 bytes' in said
    monkeypatch.setattr(gateway, 'FILES', 0)
    assert player.ask('replay')[0] == 503
    assert town.server._moving == 0 and player.ask('unknown.file')[0] == 404


def test_a_lost_house_loses_no_player(town, slots, tiny):
    player = town.join(seed=5)
    token = player.welcome['session']
    player.watch(24)
    town.until(lambda: (known := town.book.find(token)) and known.data)
    saved = json.loads(player.ask('replay')[1])
    player.frames.clear()
    town.kill(town.places[0])
    assert 'lost' in player.wait('waiting')['message']
    player.frames.clear()
    assert player.wait('welcome')['resumed']
    assert player.notes[-1]['session'] == token and town.book.find(token).address == (
        town.places[1].address
    )
    player.watch(24)
    log = json.loads(player.ask('replay')[1])
    assert log['seed'] == saved['seed'] and log['start'] == saved['start']
    # it goes on from a moment of the same drive, and each frame is what the drive would have shown
    made = [
        to_jpeg(frame)
        for frame in session_log.frames(slots.blank(), tiny, session_log.from_json(log))
    ]
    at = made.index(player.frames[0])
    assert at >= slots.frames
    assert all(
        made[at + index] == frame
        for index, frame in player.frames.items()
        if at + index < len(made)
    )


def test_moments_are_saved_while_clips_are_encoded(town):
    player = town.join(seed=5)
    encoded = threading.Event()
    town.places[0].server.house._worker.submit(encoded.wait)  # someone's long start clip
    try:
        player.send(type='prompt', text='snow')  # which this waits for
        player.watch(16)
        before = town.book.find(player.welcome['session'])
        town.until(
            lambda: (
                (now := town.book.find(player.welcome['session'])).data != before.data
                and now.taken > (before.taken or 0)
            )
        )
        assert not any(note.get('prompt') == 'snow' for note in player.notes)
    finally:
        encoded.set()
    while player.wait('state')['prompt'] != 'snow':
        pass


def test_a_house_that_closes_hands_its_players_over(town, slots):
    player = town.join(seed=5)
    player.watch(8)
    player.send(type='pause', on=True)
    while not player.wait('state')['paused']:
        pass
    place, before = town.places[0], json.loads(player.ask('replay')[1])

    def saved():
        data = town.book.find(player.welcome['session']).data
        return data and snapshot.parse(data, slots.like, slots.fingerprint())[1].to_json()

    town.until(lambda: saved() == before)
    town.places.reverse()  # the next lease goes to the other one
    place.close()
    again = player.wait('welcome')
    assert again['resumed'] and again['paused']
    assert json.loads(player.ask('replay')[1]) == before


def test_a_full_or_closing_town_says_so_at_once(town):
    for index in range(4):
        assert town.book.enter(f'someone{index}') == ''
    assert 'all 4 places are taken' in town.join().welcome['message']
    town.book.leave('someone0')
    player = town.join()
    assert player.welcome['type'] == 'welcome'
    town.book.close(1.0)
    assert 'closes in' in player.wait('error')['message']
    assert 'closing' in town.join().welcome['message']
    assert player.wait('closed')['message'] == 'the server has stopped'


def test_sessions_that_nobody_speaks_of_are_forgotten(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    book = Book(places=1)
    assert book.enter('a') == '' and book.enter('a') == '' and 'full' in book.enter('b')
    book.claim('a', 'host:1', False)
    book.open('host:1', 99)
    assert book.where('a') == ('host:1', 99) and book.where('b') is None
    book.put('a', 'host:1', None, True, 0.5)
    assert book.find('a').taken is None and book.state()['oldest'] == 0
    now[0] = 1.0
    book.put('a', 'host:1', b'moment', True, 0.5)
    assert book.find('a').taken == 0.5
    book.put('a', 'host:1', None, False, 0.25)  # it rests, and is as it was saved
    book.put('a', 'host:0', b'late', True, 0.0)  # of a world that had it before
    book.leave('a', 'host:0')
    assert book.find('a')[:3] == ('host:1', b'moment', False)
    now[0] = 2.0
    assert book.state() == {
        'players': 1,
        'places': 1,
        'worlds': ['host:1'],
        'waiting': 0,
        'oldest': 1.25,
        'closing': None,
    }
    book.claim('a', 'host:2', False)  # another world goes on from it
    assert book.find('a').taken == 0.75
    assert book.where('a') is None  # which has not spoken yet
    now[0] = 15.0
    assert book.state()['worlds'] == []  # one that says nothing is gone
    now[0] = 63.0
    assert book.find('a') is None and book.enter('b') == ''
    assert book.state()['waiting'] == 1


@pytest.mark.parametrize('text, said', [('0', 'got 0-0'), ('3-2', 'got 3-2'), ('x', "got 'x'")])
def test_a_wrong_count_of_worlds_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        workers.Config(*workers.parse_worlds(text))
