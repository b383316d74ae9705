"""Good and faulty clients of the live player, for `live`; prints their results as JSON.

    python -m matrix_jax.benchmark.scripts.live_clients play --port 8000 --players 2 --seconds 30

A process of their own, without jax: what they compute is not the server's.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import struct
import time
import urllib.request
import zlib

import websockets

JOIN = {'type': 'join', 'session': None, 'start': None, 'prompt': None}
KEYS = ('D', 'DL', 'DR', 'N', 'B')
STORM = '?storm'  # marks the sockets whose messages the server's side counts
COUNTED = '/counted'  # where it tells how many
BIG = 10 * 2**20
SIGHS = 'aé\u202e\U0001f697\0<"/..%\n'
METHODS = ('GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'TRACE', 'CONNECT', 'BREW')


def address(port: int, query: str = '') -> str:
    return f'ws://127.0.0.1:{port}/play{query}'


def asked(port: int, path: str) -> dict:
    """JSON at a path of the server."""
    with urllib.request.urlopen(f'http://127.0.0.1:{port}{path}') as answer:
        return json.loads(answer.read())


# --- players -----------------------------------------------------------------------------------


async def play(port: int, seconds: float, seed: int, slow: bool = False) -> dict:
    """Plays and returns frames per second, seconds from each key to its first frame, a checksum of
    each frame, and the log."""
    chance, pressed, latencies, seen, key = random.Random(seed), {}, [], {}, 0
    came = time.monotonic()
    async with websockets.connect(address(port), max_size=2**24) as socket:
        await socket.send(json.dumps(JOIN | {'seed': seed}))
        welcome = json.loads(await socket.recv())
        if welcome['type'] != 'welcome':
            return {'refused': time.monotonic() - came}
        began = press = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            if now > press:
                key, press = key + 1, now + chance.uniform(0.6, 1.4)
                pressed[key] = now
                await socket.send(
                    json.dumps({'type': 'keys', 'id': key, 'symbol': chance.choice(KEYS)})
                )
            with contextlib.suppress(TimeoutError):
                message = await asyncio.wait_for(socket.recv(), 1)
                if isinstance(message, str):
                    continue
                frame, echo = struct.unpack_from('<II', message)
                seen[frame] = zlib.crc32(message[8:])
                if echo in pressed:
                    latencies.append(time.monotonic() - pressed[echo])
                if slow:
                    await asyncio.sleep(10 / welcome['fps'])
                await socket.send(json.dumps({'type': 'seen', 'frame': frame}))
        log = await asyncio.to_thread(asked, port, f'/session/{welcome["session"]}/replay')
        await socket.send('{"type": "leave"}')
        return {'fps': len(seen) / seconds, 'latencies': latencies, 'seen': seen, 'log': log}


async def last(port: int, frames: int) -> dict:
    """Plays until frame number `frames`, however fast they come."""
    chance, key, told, got, newest = random.Random(0), 0, 0.0, 0, -1
    async with websockets.connect(address(port), max_size=2**24) as socket:
        await socket.send(json.dumps(JOIN | {'seed': 0}))
        while newest < frames:
            message = await socket.recv()
            if isinstance(message, str):
                continue
            frame = struct.unpack_from('<I', message)[0]
            if frame <= newest:
                raise SystemExit(f'frame {frame} came after frame {newest}')
            newest, got, now = frame, got + 1, time.monotonic()
            if now > told + 0.2:
                told, key = now, key + 1
                await socket.send(json.dumps({'type': 'seen', 'frame': frame}))
                await socket.send(
                    json.dumps({'type': 'keys', 'id': key, 'symbol': chance.choice(KEYS)})
                )
        return {'got': got, 'newest': newest}


# --- faulty clients ----------------------------------------------------------------------------


def garbage(chance: random.Random) -> bytes | str:
    """Random malformed message."""
    return chance.choice(
        (
            chance.randbytes(chance.randrange(200)),
            '{' * chance.randrange(1, 3000),
            '',
            'null',
            json.dumps(
                {
                    'type': chance.choice(['keys', 'rewind', 'x', None]),
                    'id': chance.choice([1, -1, 1e300, None, []]),
                    'symbol': 'D',
                }
            ),
            json.dumps(JOIN | {'seed': chance.choice([-1, '1', 2**80])}),
        )
    )


def nonsense(chance: random.Random) -> str:
    """Random well-formed message with meaningless values."""
    text = ''.join(chance.choices(SIGHS, k=chance.randrange(60)))
    return json.dumps(
        chance.choice(
            (
                {'type': 'keys', 'id': chance.randrange(1, 2**31 - 1), 'symbol': text},
                {
                    'type': 'keys',
                    'id': chance.randrange(1, 2**31 - 1),
                    'symbol': chance.choice(KEYS),
                },
                {'type': 'seen', 'frame': chance.randrange(2**53)},
                {'type': 'seen', 'frame': chance.randrange(99)},
                {'type': 'prompt', 'text': text},
                {'type': 'restart', 'start': text, 'prompt': text, 'seed': chance.randrange(2**31)},
                {'type': 'rewind', 'seconds': chance.randrange(1, 61)},
                {'type': 'recall'},
                {'type': 'keep'},
                {'type': 'pause', 'on': chance.random() < 0.3},
                {'type': 'record', 'on': chance.random() < 0.5},
            )
        )
    )


async def babble(port: int, seconds: float, count: int, sessions: list):
    """Sends malformed and meaningless messages until the server has received `count`."""
    chance, began = random.Random(1), time.monotonic()
    while (taken := (await asyncio.to_thread(asked, port, COUNTED))['taken']) < count:
        ahead = taken / count * seconds - (time.monotonic() - began)
        await asyncio.sleep(max(0, ahead))
        with contextlib.suppress(websockets.ConnectionClosed):
            async with websockets.connect(address(port, STORM)) as socket:
                if chance.random() < 0.1:
                    await socket.send(garbage(chance))
                    await socket.recv()
                await socket.send(json.dumps(JOIN | {'seed': 1}))
                welcome = json.loads(await socket.recv())
                if welcome['type'] != 'welcome':
                    await asyncio.sleep(0.3)  # the house is full for a moment
                    continue
                sessions.append(welcome['session'])
                reader = asyncio.create_task(drain(socket))
                for _ in range(110):
                    make = garbage if chance.random() < 0.08 else nonsense
                    await socket.send(make(chance))
                    await asyncio.sleep(seconds / count / 2)
                await socket.send('{"type": "leave"}')
                await reader


async def drain(socket):
    """Reads a socket until it closes."""
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            await socket.recv()


async def come_and_go(port: int, seconds: float, count: int) -> dict:
    """Joins and then leaves, closes or aborts, before or after the welcome."""
    chance, seated, began = random.Random(2), 0, time.monotonic()
    for index in range(count):
        async with websockets.connect(address(port)) as socket:
            await socket.send(json.dumps(JOIN | {'seed': 1}))
            if chance.random() < 0.7:
                seated += json.loads(await socket.recv())['type'] == 'welcome'
                await asyncio.sleep(chance.uniform(0, 0.1))
            end = chance.randrange(3)
            if end == 0:
                socket.transport.abort()
            elif end == 1:
                with contextlib.suppress(websockets.ConnectionClosed):
                    await socket.send('{"type": "leave"}')
        await asyncio.sleep(max(0, began + (index + 1) * seconds / count - time.monotonic()))
    return {'connects': count, 'seated': seated, 'connects_took': time.monotonic() - began}


async def flood(port: int, seconds: float) -> dict:
    """Sends keys, restarts and prompts as fast as the server reads; joins again when closed."""
    token, sent, joined, end = None, 0, 0, time.monotonic() + seconds
    restart = json.dumps({'type': 'restart', 'start': None, 'prompt': None, 'seed': 1})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while time.monotonic() < end:
                with contextlib.suppress(websockets.ConnectionClosed, OSError):
                    async with websockets.connect(address(port)) as socket:
                        await socket.send(json.dumps(JOIN | {'seed': 1, 'session': token}))
                        welcome = json.loads(await socket.recv())
                        if welcome['type'] != 'welcome':
                            continue
                        token, joined = welcome['session'], joined + 1
                        reader = asyncio.create_task(drain(socket))
                        while time.monotonic() < end and not reader.done():
                            key = {'type': 'keys', 'id': sent + 1, 'symbol': KEYS[sent % len(KEYS)]}
                            prompt = {'type': 'prompt', 'text': f'snow {sent}'}
                            for text in (json.dumps(key), restart, json.dumps(prompt)):
                                await socket.send(text)
                                sent += 1
                            await asyncio.sleep(0)
    return {'sent': sent, 'joined': joined}


def request(chance: random.Random, port: int, session: str) -> bytes:
    """Random HTTP request with odd method, path, headers and body; some address a live session."""
    path = chance.choice(
        (
            '/',
            '/play',
            '/healthz',
            '*',
            '//evil',
            'http://evil.example/',
            '/%00',
            '/é',
            '/session/../../etc/passwd',
            '/session/%2e%2e%2f%2e%2e%2fetc%2fpasswd/replay',
            '/' + 'a' * chance.randrange(100_000),
            '/session/' + 'b' * 4000 + '/world',
            *(
                f'/session/{session}/{name}'
                for name in ('world', 'picture', 'replay', 'video', 'x')
            ),
        )
    )
    bomb = b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR' + struct.pack('>II', 60_000, 60_000) + b'\x08\2\0\0\0'
    tensors = b'{"__metadata__":{"format":"matrix_jax.world.1","log":"{}"}}'
    body = chance.choice(
        (
            b'',
            chance.randbytes(chance.randrange(5000)),
            bomb,
            struct.pack('<Q', len(tensors)) + tensors,
            struct.pack('<Q', 2**63) + chance.randbytes(64),
            b'5\r\nabc',
            base64.b64encode(os.urandom(300)),
        )
    )
    whole = f'Content-Length: {len(body)}'
    framing = chance.choice(
        (
            *[whole] * 6,
            f'Content-Length: {len(body) + 50}',
            'Content-Length: -1',
            'Content-Length: x',
            'Transfer-Encoding: chunked',
        )
    )
    host = chance.choice((*[f'127.0.0.1:{port}'] * 6, 'evil.example', ''))
    head = f'{chance.choice(METHODS)} {path} HTTP/1.1\r\nHost: {host}\r\n{framing}\r\n'
    more = chance.choice(
        (
            *[''] * 8,
            'x' * 20_000 + '\r\n',
            'Range: bytes=9-1\r\n',
            'Upgrade: websocket\r\nConnection: Upgrade\r\n',
            'Origin: http://evil.example\r\n',
        )
    )
    return (head + more + '\r\n').encode() + body


async def knock(port: int, seconds: float, count: int, sessions: list) -> dict:
    """Sends requests -> number of each status; 0 = closed without an answer."""
    chance, found, began = random.Random(3), {}, time.monotonic()
    for index in range(count):
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        line = b''
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            writer.write(request(chance, port, (sessions or ['none'])[-1]))
            line = await asyncio.wait_for(reader.readline(), 1)
        writer.close()
        status = int(line.split()[1]) if line.startswith(b'HTTP/') else 0
        found[status] = found.get(status, 0) + 1
        await asyncio.sleep(max(0, began + (index + 1) * seconds / count - time.monotonic()))
    return {'http': dict(sorted(found.items()))}


async def storm(port: int, args) -> dict:
    """All faulty traffic at once, evenly in time."""
    await asyncio.sleep(1)  # the good ones come first
    seconds, began, sessions = args.seconds - 3, time.monotonic(), []
    going, _, knocked = await asyncio.gather(
        come_and_go(port, min(60, seconds), args.connects),
        babble(port, seconds, args.messages, sessions),
        knock(port, seconds, args.requests, sessions),
    )
    async with websockets.connect(address(port), max_size=None) as socket:
        with contextlib.suppress(websockets.ConnectionClosed):
            await socket.send('x' * BIG)
            await drain(socket)
            await socket.wait_closed()
    return {**going, **knocked, 'took': time.monotonic() - began, 'big': socket.close_code}


async def run(args) -> list[dict]:
    port = args.port
    if args.what == 'storm':
        return [await storm(port, args)]
    if args.what == 'last':
        return [await last(port, args.frames)]
    if args.what == 'flood':
        return [await flood(port, args.seconds)]
    return await asyncio.gather(
        *(
            play(port, args.seconds, args.seed + at, args.what == 'slow')
            for at in range(args.players)
        )
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('what', choices=('play', 'slow', 'storm', 'last', 'flood'))
    for name, usual in (
        ('port', 8000),
        ('players', 1),
        ('seed', 0),
        ('frames', 1000),
        ('connects', 200),
        ('messages', 10_000),
        ('requests', 1000),
    ):
        parser.add_argument(f'--{name}', type=int, default=usual)
    parser.add_argument('--seconds', type=float, default=30)
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == '__main__':
    main()
