"""Players on a real server: who gets in, what they see, and that nobody disturbs another."""

import io
import json
import time

import numpy as np
import pytest
import safetensors.numpy as safetensors
from PIL import Image
from websockets.exceptions import ConnectionClosed

from matrix_jax.serve.runtime import replay, session, session_log, snapshot
from matrix_jax.serve.web.encoding import to_jpeg


@pytest.fixture
def server(serving):
    return serving()


def picture(frame):
    return np.asarray(Image.open(io.BytesIO(frame)))


def test_a_player_sees_frames_and_its_key_comes_back(server, stream):
    player = server.join()
    assert player.welcome['type'] == 'welcome' and not player.welcome['resumed']
    assert (player.welcome['width'], player.welcome['height']) == (48, 32)
    player.send(type='keys', id=5, symbol='DL')
    while 5 not in player.keys:
        player.read()
    assert player.keys[5] % stream.frames_per_step == 0
    assert picture(player.frames[0]).shape == (32, 48, 3)
    player.send(type='leave')
    assert player.wait('closed')['code'] == 1000
    assert server.players() == 0
    text = server.http('/metrics')[1].decode()
    assert '\nmatrix_jax_recompilations_total 0.0' in text  # all was compiled at the start


def test_a_stream_is_the_same_alone_and_in_company(server, stream, tiny):
    def drive(seed):
        player = server.join(seed=seed)
        player.watch(40)
        log = json.loads(player.ask('replay')[1])
        return player, log

    alone, log = drive(7)
    seen = dict(alone.frames)
    alone.send(type='leave')
    alone.wait('closed')
    company = [server.join(seed=1), server.join(seed=2)]
    again, _ = drive(7)
    assert again.welcome['session'] != alone.welcome['session']
    shared = sorted(set(seen) & set(again.frames))
    assert len(shared) >= 30
    assert all(seen[index] == again.frames[index] for index in shared)
    other = company[0]
    other.watch(8)
    assert any(other.frames[index] != seen[index] for index in set(other.frames) & set(seen))
    # and the log makes the very frames again
    made = list(replay.frames(stream.empty_copy(), tiny, session_log.from_json(log)))
    assert len(made) >= 40
    assert all(to_jpeg(made[index]) == seen[index] for index in seen if index < len(made))


def test_a_full_server_refuses_at_once(server):
    inside = [server.join(seed=seed) for seed in range(3)]
    outside = server.join()
    assert outside.welcome['code'] == 1013
    assert 'all 3 places are taken' in outside.welcome['message']
    inside[0].send(type='leave')
    inside[0].wait('closed')
    assert server.join().welcome['type'] == 'welcome'


def test_a_lost_player_comes_back_to_its_world(serving):
    server = serving(grace=1.0)
    player = server.join()
    player.watch(16)
    player.socket.close()
    token = player.welcome['session']
    back = server.join(session=token)
    assert back.welcome['resumed'] and back.welcome['session'] == token
    back.watch(9)
    assert max(back.frames) > max(player.frames)
    back.close()
    assert server.players() == 1  # its slot is kept for a while
    server.until(lambda: server.players() == 0)
    assert not server.join(session=token).welcome['resumed']


def test_another_window_takes_over(server):
    first = server.join()
    second = server.join(session=first.welcome['session'])
    assert second.welcome['resumed']
    assert first.wait('closed')['code'] == 4001
    with pytest.raises(ConnectionClosed):
        while True:
            first.read()
    assert first.socket.close_code == 4001
    second.watch(8)
    assert server.players() == 1


def test_pause_rests_and_goes_on(server):
    player = server.join()
    player.watch(8)
    player.send(type='pause', on=True)
    assert player.wait('state')['paused']
    steps = server.world.engine.steps
    time.sleep(0.4)
    assert server.world.engine.steps <= steps + 1
    player.send(type='pause', on=False)
    assert not player.wait('state')['paused']
    player.watch(24)


def test_worlds_are_kept_rewound_saved_and_forked(server):
    player = server.join()
    player.watch(24)
    player.send(type='prompt', text='snow')
    assert player.wait('state')['prompt'] == 'snow'
    player.send(type='pause', on=True)
    player.wait('state')
    player.send(type='keep')
    assert player.wait('state')['kept']
    status, data = player.ask('world')
    assert status == 200
    kept = json.loads(player.ask('replay')[1])
    assert kept['prompts'][-1][1] == 'snow'
    player.send(type='rewind', seconds=60)
    state = player.wait('state')
    assert state['rewound'] > 0 and state['prompt'] != 'snow'
    player.send(type='recall')
    assert player.wait('state')['recalled']
    assert json.loads(player.ask('replay')[1]) == kept
    # another player continues from there
    fork = server.join(seed=99)
    assert fork.ask('world', data)[0] == 200
    fork.send(type='pause', on=True)
    while not fork.wait('state')['paused']:
        pass
    log = json.loads(fork.ask('replay')[1])
    assert log['seed'] == 7 and len(log['symbols']) >= len(kept['symbols'])
    status, message = fork.ask('world', data[:-5] + b'xxxxx')
    assert status in (200, 422)  # five other bytes of a float may be a float
    assert fork.ask('world', b'nonsense') == (
        422,
        b'{"error":"world file: not a saved world, or damaged"}',
    )
    long = json.dumps(kept | {'symbols': 'D*1,' * 2_000_000})
    status, message = fork.ask(
        'world', safetensors.save({}, {'format': snapshot.FORMAT, 'log': long})
    )
    assert status == 422 and b'got 2000001 runs of keys, expected at most 262144' in message
    # only the session that asks too often is refused
    world = server.world
    forked = world.manager.sessions[fork.welcome['session']]
    world.transfers.limit(forked).bucket.level = -20
    asked = [
        server.http(f'/session/{one.welcome["session"]}/replay', patient=False)
        for one in (fork, player)
    ]
    assert asked[0] == (429, b'{"error":"too many files; try again in a moment"}')
    assert asked[1][0] == 200


def test_a_picture_starts_a_world(server, start_image):
    player = server.join()
    assert player.ask('picture', start_image.read_bytes())[0] == 200
    assert player.wait('state')['restarted']
    assert json.loads(player.ask('replay')[1])['picture']
    assert player.ask('picture', b'GIF89a')[0] == 422
    assert player.ask('picture', bytes(9 * 2**20))[0] == 413
    assert server.http('/session/unknown/world')[0] == 404


def test_a_recording_is_a_video(server, tmp_path):
    from matrix_jax import video

    player = server.join()
    assert player.ask('video')[0] == 409
    player.send(type='record', on=True)
    player.watch(16)
    player.send(type='record', on=False)
    while not player.wait('state').get('recorded'):
        pass
    status, data = player.ask('video')
    (tmp_path / 'drive.mp4').write_bytes(data)
    assert status == 200 and len(video.read_video(tmp_path / 'drive.mp4', 100)) >= 8


def test_a_slow_reader_loses_frames_and_delays_nobody(server, monkeypatch):
    monkeypatch.setattr(session, 'QUEUE_SECONDS', 0.1)
    monkeypatch.setattr(session, 'UNSEEN_SECONDS', 0.2)
    slow = server.connect()
    slow.send(
        json.dumps({'type': 'join', 'session': None, 'start': None, 'prompt': None, 'seed': 1})
    )  # and never says what it has seen
    quick = server.join()
    quick.watch(120)
    quick.wait('stats')
    dropped = [note['dropped'] for note in quick.notes if note['type'] == 'stats']
    text = server.http('/metrics')[1].decode()
    lost = float(text.split('\nmatrix_jax_frames_dropped_total ')[1].split()[0])
    assert lost > 20 and dropped[-1] <= 0.2 * lost
    slow.close()


def test_a_broken_world_is_reset_and_says_so(server):
    import jax
    import jax.numpy as jnp

    player, other = server.join(), server.join(seed=2)
    engine = server.world.engine
    slot = engine.slots[0]

    def poison():
        carry = jax.tree.map(
            lambda leaf: leaf * jnp.nan if leaf.dtype.kind == 'f' else leaf, engine.stream.read(0)
        )
        engine.stream.write(0, carry)

    engine.call(poison).result()
    assert 'broke at step' in player.wait('error')['message']
    player.watch(16)
    assert len(slot.log.controls) < 20 or slot.log.controls
    assert not [note for note in other.notes if note['type'] == 'error']
    other.watch(8)


@pytest.mark.parametrize(
    'headers, message',
    [
        ({'Host': 'evil.example'}, b'this machine only'),
        ({'Host': '127.0.0.1:80@evil.example'}, b'this machine only'),
        ({'Host': '127.0.0.1.evil.example'}, b'this machine only'),
        ({'Host': '[::1'}, b'this machine only'),
        ({'Origin': 'http://['}, b'another origin'),
        ({'Origin': 'null'}, b'another origin'),
        ({'Host': 'localhost:80', 'Origin': 'http://localhost:81'}, b'another origin'),
        ({'Origin': 'http://evil.example'}, b'another origin'),
    ],
)
def test_pages_elsewhere_are_refused(server, headers, message):
    status, body = server.http('/', headers=headers)
    assert status == 403 and message in body


@pytest.mark.parametrize('host', ['localhost:1', '127.0.0.2', '[::1]:80', 'LOCALHOST'])
def test_names_of_this_machine_are_served(server, host):
    assert server.http('/', headers={'Host': host, 'Origin': f'http://{host}'})[0] == 200


def test_the_token_opens(serving):
    server = serving(token='secret1234')
    # as behind a reverse proxy, which changes both
    proxied = {'Host': 'backend', 'Origin': 'https://play.example'}
    assert server.http('/?token=secret1234', headers=proxied)[0] == 200
    assert server.http('/')[0] == 403
    assert server.http('/?token=secret1234')[0] == 200
    assert server.http('/metrics', headers={'Authorization': 'Bearer secret1234'})[0] == 200
    for query in ('', '?token=wrong1234'):  # the page is told why
        refused = json.loads(server.connect(query).recv())
        assert refused['code'] == 1008 and 'address that the server' in refused['message']


@pytest.mark.parametrize(
    'message, code', [('x' * 100_000, 1009), ('[' * 4000, 1008), ('{"type":"leave"}', 1008)]
)
def test_a_first_message_that_makes_no_sense_closes(server, message, code):
    socket = server.connect()
    socket.send(message)
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            socket.recv(timeout=5)
    assert closed.value.rcvd.code == code
    assert server.players() == 0


def test_nonsense_is_answered_then_closed(server):
    player = server.join()
    player.send(type='rewind', seconds=True)
    assert player.wait('error')['message'] == 'rewind.seconds: expected 1 to 60'
    for _ in range(30):
        player.send(type='nonsense')
    assert player.wait('closed')['code'] == 1008
    flood = server.join(seed=3)
    for index in range(300):
        flood.send(type='seen', frame=index)
    assert 'too many messages' in flood.wait('closed')['message']
    assert server.world.engine.alive
