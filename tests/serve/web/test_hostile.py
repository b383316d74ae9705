"""Clients that take what belongs to others: connections, device time, and other worlds."""

import json
import re
import socket
import time

import jax
import numpy as np
import pytest
import safetensors.numpy as safetensors

from matrix_jax.config import UsageError
from matrix_jax.serve.runtime import session_log, snapshot
from matrix_jax.serve.web import connection, connections, server


def idle(port, count, said=b''):
    """Connections that send the beginning of a request, and no more."""
    links = [socket.create_connection(('127.0.0.1', port)) for _ in range(count)]
    for link in links:
        link.sendall(said)
    return links


def closed(link, seconds=5.0):
    """Whether the server closes a connection within some seconds."""
    link.settimeout(seconds)
    try:
        return link.recv(1) == b''
    except ConnectionError:
        return True
    except TimeoutError:
        return False


@pytest.mark.parametrize('said', [b'', b'GET / HTTP/1.1\r\nHost: ', b'POST /play HTT'])
def test_idle_connections_lock_nobody_out(serving, said):
    running = serving()
    player = running.join()
    links = idle(running.port, 200, said)
    assert running.http('/')[0] == 200
    assert running.join(seed=2).welcome['type'] == 'welcome'
    assert closed(links[0]) and not closed(links[-1], 0.2)  # the oldest made room
    player.watch(8)
    for link in links:
        link.close()


def test_a_request_that_does_not_come_is_not_waited_for(serving, monkeypatch):
    monkeypatch.setattr(connections, 'REQUEST_SECONDS', 0.3)
    running = serving()
    player = running.join()
    slow, quiet = idle(running.port, 1, b'GET / HTTP/1.1\r\n')[0], idle(running.port, 1)[0]
    kept = socket.create_connection(('127.0.0.1', running.port))
    kept.sendall(b'GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n')
    assert kept.recv(15) == b'HTTP/1.1 200 OK'
    while kept.recv(4096):  # after the answer it is idle as well
        pass
    assert closed(slow) and closed(quiet)
    time.sleep(0.5)
    player.watch(8)  # a player is not a request


def test_a_player_who_floods_is_told_to_wait(serving):
    running = serving()
    greedy, other = running.join(), running.join(seed=2)
    session = running.world.manager.sessions[greedy.welcome['session']]
    session.requests.level = 20
    for index in range(12):
        greedy.send(type='restart', start=None, prompt=None, seed=index)
    refused = greedy.wait('error')['message']
    while 'wait for your' in refused:
        refused = greedy.wait('error')['message']
    assert re.fullmatch('restart: too much at once; try again in [1-4] s', refused)
    session.requests.level = -4
    status, message = running.http(f'/session/{session.token}/picture', b'x', patient=False)
    assert status == 429 and b'picture: too much at once' in message
    greedy.close()
    # A new socket is the same player.
    assert 'join: too much' in running.join(session=session.token).welcome['message']
    # And new players who come and go wait for each other.
    starts = running.world.manager._starts
    starts.level, starts.rate = 1, 1e-9
    last = running.join(seed=3)
    last.send(type='leave')
    last.wait('closed')
    late = running.join(seed=4).welcome
    assert late['code'] == 1013 and 'new players: too much at once' in late['message']
    other.watch(8)


def test_a_player_who_floods_is_not_back_at_once(serving, monkeypatch):
    monkeypatch.setattr(connection, 'FLOOD_SECONDS', 0.5)
    running = serving()
    greedy = running.join()
    session = running.world.manager.sessions[greedy.welcome['session']]
    session.messages.rate, session.messages.level = 1e-9, 3
    began = time.monotonic()
    for index in range(5):
        greedy.send(type='keys', id=index + 1, symbol='D')
    closed = greedy.wait('closed')
    assert 'too many messages' in closed['message'] and time.monotonic() - began >= 0.5
    session.requests.rate, session.requests.level = 1e-9, 0
    began = time.monotonic()
    assert 'join: too much' in running.join(session=session.token).welcome['message']
    assert time.monotonic() - began >= 0.5


def test_a_world_that_breaks_twice_rests_and_its_file_is_refused(serving):
    running = serving()
    player = running.join()
    session = running.world.manager.sessions[player.welcome['session']]
    data = player.ask('world')[1]
    log = json.loads(player.ask('replay')[1])
    carry, _ = snapshot.parse(data, running.world.engine.stream.carry_shapes, log['fingerprint'])
    bad = jax.tree.map(
        lambda leaf: np.full_like(leaf, 3e38) if leaf.dtype.kind == 'f' else leaf, carry
    )
    broken = snapshot.dump(bad, session_log.from_json(log))
    assert player.ask('world', broken)[0] == 200
    said = [player.wait('error')['message'] for _ in range(2)]
    assert 'it starts again' in said[0] and 'it broke 2 times and rests' in said[1]
    steps = running.world.engine.steps
    time.sleep(0.3)
    assert running.world.engine.steps <= steps + 1 and session.paused
    status, message = player.ask('world', broken)
    assert status == 422 and b'this world broke again and again' in message
    assert player.ask('world', data)[0] == 200  # a good one goes on
    while player.wait('state')['paused']:
        pass
    player.watch(8)


@pytest.mark.parametrize(
    'fields',
    [
        {'prompt': 'x' * 10_000_000},
        {'prompt': '\ud800'},
        {'prompts': [[0, '\udfff']]},
        {'start': 'x' * 600},
        {'recipe': '\ud8ff'},
    ],
    ids=['long', 'half', 'change', 'start', 'recipe'],
)
def test_text_of_a_world_file_is_bounded(serving, fields):
    running = serving()
    player = running.join()
    log = json.loads(player.ask('replay')[1]) | fields
    data = safetensors.save({}, {'format': snapshot.FORMAT, 'log': json.dumps(log)})
    began = time.monotonic()
    status, message = player.ask('world', data)
    assert status == 422 and b'expected' in message and time.monotonic() - began < 10
    player.watch(4)


def test_addresses_behind_proxies(serving):
    running = serving(token='secret1234', root_path='/matrix')
    for path in ('/matrix/?token=secret1234', '/?token=secret1234'):
        assert b'<canvas' in running.http(path)[1]
    assert running.http('/matrix/healthz')[0] == 200
    assert running.http('/matrixx/?token=secret1234')[0] == 404
    assert running.cfg.url(1) == 'http://127.0.0.1:1/matrix/?token=secret1234'
    for wrong in ('matrix', '/matrix/', '/a b', '/../x'[:3] + '?'):
        with pytest.raises(UsageError, match='--root-path: got'):
            server.Config(root_path=wrong)


def test_both_families_are_listened_to():
    if not socket.has_dualstack_ipv6():
        pytest.skip('this system has one family only')
    with server.listen(server.Config(host='::', port=0, token='secret1234')) as listening:
        for address in ('127.0.0.1', '::1'):
            socket.create_connection((address, listening.getsockname()[1])).close()


def test_a_world_is_a_video_for_anybody(serving, tmp_path):
    from matrix_jax import video

    running = serving()
    link = socket.create_connection(('127.0.0.1', running.port))
    link.sendall(b'GET /stream.mp4?seed=3&control=DL HTTP/1.1\r\nHost: localhost\r\n\r\n')
    link.settimeout(30)
    data = b''
    while data.count(b'moof') < 3:
        received = link.recv(65536)
        assert received, f'the server closed the connection after {len(data)} bytes'
        data += received
    assert data.startswith(b'HTTP/1.1 200') and b'content-type: video/mp4' in data
    assert running.players() == 1
    session = next(iter(running.world.manager.sessions.values()))
    assert session.slot.log.seed == 3 and session.slot.log.controls[-1] == 'DL'
    link.close()
    running.until(lambda: running.players() == 0)
    for query, said in (
        ('control=X', b'unknown symbol'),
        ('seed=x', b'join.seed'),
        ('start=moon', b"got 'moon'"),
        ('seed=1&seed=2', b'at most once'),
        ('colour=red', b'expected each of'),
    ):
        status, message = running.http(f'/stream.mp4?{query}')
        assert status == 400 and said in message
    body, chunk = data.partition(b'\r\n\r\n')[2], b''
    while body:  # chunked transfer
        size, _, body = body.partition(b'\r\n')
        chunk, body = chunk + body[: int(size or b'0', 16)], body[int(size or b'0', 16) + 2 :]
    (tmp_path / 'a.mp4').write_bytes(chunk)
    assert video.read_video(tmp_path / 'a.mp4', 100).shape[1:] == (32, 48, 3)
