"""2,000 seeded cases of nonsense in every message, upload, header and path: no request fails inside
the server, and a player goes on."""

import http.client
import io
import json
import logging
import random
import selectors
import socket
import time

import pytest
import safetensors.numpy as safetensors
from PIL import Image

from matrix_jax.serve.runtime import snapshot
from matrix_jax.serve.web import connection, protocol

MESSAGES, UPLOADS, REQUESTS = 900, 300, 800
ENDLESS = 10**9
JUNK = (
    *(None, True, False, 0, -1, 2**31, 2**63, 10**30, 1.5, -0.0, float('nan'), float('inf')),
    *(
        '',
        'D',
        'NL',
        'x' * 70,
        'x' * 600,
        '\ud800',
        '\u202e',
        '\0',
        '../../etc/passwd',
        '{',
        '[' * 99,
    ),
    *([], {}, [[[[]]]], [1] * 50, {'type': 'join'}, {'': None}),
)
HOSTS = (
    'localhost',
    '[',
    '[::1',
    '127.0.0.1:80@evil',
    'a' * 300,
    '\xff\xfe',
    '::1',
    '1.1',
    ' ',
    '',
)
PATHS = (
    *(
        '/',
        '/play',
        '/metrics',
        '/healthz',
        '/session/x/world',
        '/session/{}/replay',
        '/stream.mp4',
    ),
    *('//', '/../../etc/passwd', '/%2e%2e/%2e', '/%00', '/%ff%fe', '/%', '/session//', '/\\', '*'),
    *(
        '/session/%F0%9F%92%A9/world',
        '/session/{}/%2e%2e',
        '/play/',
        '/?token=%ff',
        'http://[/',
        '/#',
    ),
)
HEADERS = (
    *('Origin', 'Authorization', 'Content-Length', 'Transfer-Encoding', 'Connection', 'Upgrade'),
    *('Sec-WebSocket-Key', 'Sec-WebSocket-Version', 'Cookie', 'Range', 'Expect', 'X-Forwarded-For'),
)
VALUES = (
    *('http://[', 'null', 'http://evil', 'Bearer \xff', '-1', '1' * 40, 'chunked', 'gzip, chunked'),
    *(
        'upgrade',
        'websocket',
        'h2c',
        '13',
        'x' * 9000,
        '',
        '\t',
        'bytes=0-',
        '100-continue',
        '1, 2',
    ),
)


def message(chance):
    """The text of a message that is wrong somewhere, or nowhere."""
    kind = chance.choice([*protocol.FIELDS, 'nonsense'])
    good = {'session': None, 'start': None, 'prompt': None, 'seed': 1, 'id': 1, 'symbol': 'D'}
    good |= {'frame': 1, 'text': 'snow', 'on': False, 'seconds': 1}
    made = {'type': kind} | {name: good[name] for name in protocol.FIELDS.get(kind, ())}
    for _ in range(chance.randrange(3)):
        made[chance.choice([*made, 'other'])] = chance.choice(JUNK)
    if kind == 'leave':
        made['other'] = 1  # who leaves sends no more
    text = json.dumps(made)
    return cut(chance, text) if chance.random() < 0.2 else text


def cut(chance, whole):
    """Text or bytes without a piece in the middle, or with it twice."""
    first, last = sorted(chance.choices(range(len(whole) + 1), k=2))
    return whole[:last] + whole[last if chance.random() < 0.5 else first :]


def flipped(chance, data):
    """Bytes some of which are others, most of them near the beginning."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        made[min(int(chance.expovariate(1 / 200)), len(made) - 1)] = chance.randrange(256)
    return bytes(made)


def world_file(chance, log):
    """A world file without tensors whose log is wrong somewhere."""
    log = json.loads(json.dumps(log))
    for _ in range(chance.randint(1, 3)):
        log[chance.choice(list(log))] = chance.choice(JUNK)
    meta = {'format': chance.choice([snapshot.FORMAT, 'x']), 'log': json.dumps(log)}
    return safetensors.save({}, meta)


def request(chance, session):
    """The bytes of a request."""
    path = chance.choice(PATHS).format(session)
    if chance.random() < 0.3:
        path = cut(chance, path + '?world=a&session=b')
    lines = [f'{chance.choice(("GET", "POST", "HEAD", "PUT", "BREW"))} {path} HTTP/1.1']
    lines += [f'Host: {chance.choice(HOSTS)}']
    for _ in range(chance.randrange(4)):
        lines.append(f'{chance.choice(HEADERS)}: {chance.choice(VALUES)}')
    made = '\r\n'.join([*lines, 'Connection: close', '', '']).encode('latin-1')
    return flipped(chance, made) if chance.random() < 0.1 else made


def statuses(port, requests):
    """Sends requests over connections of their own -> the status of each answer that came."""
    found, waiting = [], selectors.DefaultSelector()
    for one in requests:
        link = socket.create_connection(('127.0.0.1', port))
        link.sendall(one)
        waiting.register(link, selectors.EVENT_READ)
    until = time.monotonic() + 0.3  # some wait for more of a request
    while waiting.get_map() and (left := until - time.monotonic()) > 0:
        for key, _ in waiting.select(left):
            waiting.unregister(key.fileobj)
            try:
                answer = key.fileobj.recv(64)
            except ConnectionError:
                answer = b''
            if answer.startswith(b'HTTP/1.1 '):
                found.append(int(answer[9:12]))
    for key in list((waiting.get_map() or {}).values()):
        key.fileobj.close()
    return found


@pytest.fixture
def server(serving, monkeypatch):
    monkeypatch.setattr(connection, 'MAX_FAULTS', ENDLESS)
    return serving(grace=600)


def test_nonsense_of_every_kind(server, caplog):
    caplog.set_level(logging.ERROR)
    chance, player = random.Random(0), server.join()
    token = player.welcome['session']
    session = server.world.manager.sessions[token]
    session.messages.level = session.messages.burst = ENDLESS
    for _ in range(MESSAGES):
        player.send_raw(message(chance))
        if chance.random() < 0.05:
            player.read()
    player.wait('stats')
    player.close()  # it does not read now

    log = json.loads(player.ask('replay')[1])
    status, saved = player.ask('world')
    picture = io.BytesIO()
    Image.new('RGB', (48, 32), (200, 90, 20)).save(picture, 'PNG')
    link, seen = http.client.HTTPConnection('127.0.0.1', server.port, timeout=30), set()
    for _ in range(UPLOADS):
        session.requests.level = server.world.transfers.limit(session).bucket.level = ENDLESS
        name, data = chance.choice(
            [
                ('world', world_file(chance, log)),
                ('world', flipped(chance, saved)),
                ('picture', flipped(chance, picture.getvalue())),
                ('picture', cut(chance, picture.getvalue())),
            ]
        )
        link.request('POST', f'/session/{token}/{name}', data)
        answer = link.getresponse()
        answer.read()
        seen.add(answer.status)
    assert seen <= {200, 413, 422} and 422 in seen

    seen = set()
    for _ in range(REQUESTS // 50):
        seen |= set(statuses(server.port, [request(chance, token) for _ in range(50)]))
    assert seen and max(seen) < 500 and {400, 403, 404} <= seen
    assert not [record.getMessage() for record in caplog.records]
    session.requests.level = ENDLESS
    back = server.join(session=token)
    back.send(type='pause', on=False)
    back.send(type='keys', id=77, symbol='DL')
    while 77 not in back.keys:
        back.read()
    assert server.world.engine.alive
