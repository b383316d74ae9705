"""The live player under load, faults and time: measured figures, one line each.

    benchmarks/live.py load --players 8 --seconds 30
    benchmarks/live.py load --players 1 --entry tail        latency where keys bind as published
    benchmarks/live.py faults --seconds 90
    benchmarks/live.py soak --shifts 20000

Clients are another process on this machine, so that they do not share the server's interpreter.
`load` also plays every player's log again, alone on the same program, and compares each frame that
the player saw, byte by byte (of the JPEG).
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
import zlib

import numpy as np

from matrix_jax import config
from matrix_jax.serve import app, replay, run

JOIN = {'type': 'join', 'session': None, 'start': None, 'prompt': None}
KEYS = ('D', 'DL', 'DR', 'N', 'B')
FAST = 1e-3             # seconds of a shift, for an engine that shall not keep pace


@contextlib.contextmanager
def server(recipe, **fields):
    """(port, Server) of a running server."""
    cfg = run.Config(port=0, **fields)
    slots, folder = run.open_slots(recipe, cfg)
    one = app.Server(slots, folder, recipe.name, grace=2.0)
    with run.listen(cfg) as listening:
        web = run.uvicorn_server(one.app(), cfg.players)
        thread = threading.Thread(target=web.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1], one
        finally:
            web.should_exit = True
            thread.join()


# --- clients -----------------------------------------------------------------------------------


async def drive(port: int, seconds: float, seed: int, slow: bool = False) -> dict:
    """One player: frames per second, latencies from a key to the first frame that is its own, a sum
    of each frame, and the log."""
    import websockets
    chance, pressed, latencies, seen, key = random.Random(seed), {}, [], {}, 0
    asked = time.monotonic()
    async with websockets.connect(f'ws://127.0.0.1:{port}/play', max_size=2**24) as socket:
        await socket.send(json.dumps(JOIN | {'seed': seed}))
        welcome = json.loads(await socket.recv())
        if welcome['type'] != 'welcome':
            return {'refused': time.monotonic() - asked}
        began = press = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            if now > press:
                key, press = key + 1, now + chance.uniform(0.6, 1.4)
                pressed[key] = now
                await socket.send(json.dumps(
                    {'type': 'keys', 'id': key, 'symbol': chance.choice(KEYS)}))
            with contextlib.suppress(TimeoutError):
                message = await asyncio.wait_for(socket.recv(), 1)
                if isinstance(message, str):
                    continue
                frame, echo = (int.from_bytes(message[at:at + 4], 'little') for at in (0, 4))
                seen[frame] = zlib.crc32(message[8:])
                if echo in pressed:
                    latencies.append(time.monotonic() - pressed[echo])
                if slow:
                    await asyncio.sleep(10 / welcome['fps'])
                await socket.send(json.dumps({'type': 'seen', 'frame': frame}))
        log = await asyncio.to_thread(download, port, welcome['session'])
        await socket.send('{"type": "leave"}')
        return {'fps': len(seen) / seconds, 'latencies': latencies, 'seen': seen, 'log': log,
                'slow': slow}


def download(port: int, session: str) -> dict:
    """The log of a session."""
    with urllib.request.urlopen(f'http://127.0.0.1:{port}/session/{session}/replay') as answer:
        return json.loads(answer.read())


async def storm(port: int, connects: int, messages: int) -> dict:
    """Players who come and go, and messages that make no sense."""
    import websockets
    chance, address = random.Random(0), f'ws://127.0.0.1:{port}/play'
    began = time.monotonic()
    for _ in range(connects):
        async with websockets.connect(address) as socket:
            await socket.send(json.dumps(JOIN | {'seed': 1}))
            await asyncio.sleep(chance.uniform(0, 0.3))
            if chance.random() < 0.5:
                socket.transport.abort()                # half hang up, half say goodbye
    dropped, sent = time.monotonic() - began, 0
    while sent < messages:
        with contextlib.suppress(websockets.ConnectionClosed):
            async with websockets.connect(address) as socket:
                if chance.random() < 0.5:
                    await socket.send(json.dumps(JOIN | {'seed': 1}))
                for _ in range(40):
                    await socket.send(chance.choice((
                        chance.randbytes(chance.randrange(200)), '{' * chance.randrange(3000),
                        json.dumps({'type': chance.choice(['keys', 'rewind', 'x', None]),
                                    'id': chance.choice([1, -1, 1e300, None, []]), 'symbol': 'D'}),
                        json.dumps(JOIN | {'seed': chance.choice([-1, '1', 2**80])}))))
                    sent += 1
    async with websockets.connect(address, max_size=None) as socket:
        with contextlib.suppress(websockets.ConnectionClosed):
            await socket.send('x' * 10 * 2**20)
            await socket.recv()
    took = time.monotonic() - began - dropped
    return {'storm': f'{connects} connects and drops in {dropped:.0f} s, {sent} messages of '
                     f'nonsense in {took:.0f} s, 10 MB closed with {socket.close_code}'}


async def clients(options) -> list[dict]:
    port, seconds = options.port, options.seconds
    extra = [storm(port, options.connects, options.messages),
             drive(port, seconds, 99, slow=True)] if options.wild else []
    return await asyncio.gather(*(drive(port, seconds, seed) for seed in range(options.players)),
                                *extra)


def command(port: int, players: int, options, *more) -> list[str]:
    """That of clients in a process of their own."""
    given = [sys.executable, __file__, 'clients', '--port', port, '--players', players,
             '--seconds', options.seconds, '--connects', options.connects, '--messages',
             options.messages, *more]
    return list(map(str, given))


def measured(port: int, players: int, options, *more) -> list[dict]:
    """What players in a process of their own saw."""
    done = subprocess.run(command(port, players, options, *more), check=True, text=True,
                          stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def show(found: list[dict]) -> float:
    """Prints one line -> p95 of the latencies."""
    playing = [one for one in found if 'fps' in one and not one['slow']]
    late = np.sort(np.concatenate([one['latencies'] for one in playing]))
    half, most = 1e3 * np.quantile(late, (.5, .95))
    print('frames a second of each', [round(one['fps'], 1) for one in playing],
          f'| key to picture p50 {half:.0f}, p95 {most:.0f} ms of {len(late)} | refused after',
          [f'{1e3 * one["refused"]:.0f} ms' for one in found if 'refused' in one], flush=True)
    return most


def compare(one: app.Server, found: list[dict]):
    """Plays each log again, alone, on the same program; all frames that were seen must be equal."""
    slots, equal, other = one.engine.slots.blank(), 0, 0
    for player in found:
        if 'log' not in player:
            continue
        log = replay.from_json(player['log'])
        for index, frame in enumerate(replay.frames(slots, one.house.folder, log)):
            if str(index) in player['seen']:
                same = zlib.crc32(one.engine.encode(frame)) == player['seen'][str(index)]
                equal, other = equal + same, other + (not same)
    print(f'the same players alone: {equal} frames equal byte by byte, {other} not')


# --- what is run -------------------------------------------------------------------------------


def load(recipe, options):
    """A full house, and one player too many."""
    with server(recipe, players=options.players, entry=options.entry,
                together=options.together) as (port, one):
        show(measured(port, 1, options))
        if options.players > 1:
            found = measured(port, options.players + 1, options)
            show(found)
            compare(one, found)
        print(f'step {1e3 * one.engine.seconds:.0f} ms, '
              f'recompilations {one.meters.compiled._value.get():.0f}')


def faults(recipe, options):
    """Two good players beside a storm, a slow reader, nonsense, and a client that is killed."""
    with server(recipe, players=options.players, entry=options.entry,
                together=options.together) as (port, one):
        # Whom the faults replace play well here, so that there is as much to compute.
        calm = show(measured(port, 4, options)[:2])
        time.sleep(3)
        before, tasks = memory(), count_tasks(one)
        victim = subprocess.Popen(command(port, 1, options), stdout=subprocess.DEVNULL)
        threading.Timer(options.seconds / 2, victim.kill).start()
        found = measured(port, 2, options, '--wild')
        victim.wait()
        print(*(extra['storm'] for extra in found if 'storm' in extra))
        print('slow reader:', [round(extra['fps'], 1) for extra in found if extra.get('slow')],
              'frames a second')
        wild = show(found)
        print(f'p95 of the two good players: {wild / calm - 1:+.0%}')
        time.sleep(5)
        print(f'engine alive {one.engine.alive} | sessions left {len(one.house.sessions)} | tasks '
              f'{count_tasks(one) - tasks:+d} | memory {(memory() - before) / 2**20:+.1f} MiB')


def count_tasks(one: app.Server) -> int:
    """Tasks in the event loop of the server."""
    return len(asyncio.all_tasks(one.house.loop))


def soak(recipe, options):
    """Many shifts of the engine, unpaced: memory, compilations, whether pictures stay pictures."""
    from jax import monitoring

    from matrix_jax.serve import engine as engines
    from matrix_jax.serve.meters import COMPILED
    slots, folder = run.open_slots(recipe, run.Config(players=1, entry=options.entry))
    prompt, start = replay.choose(slots.world, folder, None, None)
    clip = replay.start_frames(slots, folder, start, None)
    carry = slots.begin(slots.condition(prompt, clip)[0], 0)
    log = replay.Log(recipe.name, slots.fingerprint(), 1, 1, slots.entry, 0, prompt, start)
    engine, newest, broken = engines.Engine(slots, app.to_jpeg), [], []
    seat = engines.Seat(0, log, lambda pictures: newest.__setitem__(slice(None), pictures),
                        broken.append)
    engines.PAST_SECONDS *= FAST / engine.period        # as many moments as at its own pace
    engine.period = FAST
    compiled = []
    monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event == COMPILED else None)
    print(f'start clip: {statistics(clip[-1])}', flush=True)
    chance, every, points = random.Random(0), max(1, options.shifts // 20), []
    engine.start()
    engine.seat(seat, carry).result()
    began = time.monotonic()
    while engine.alive and engine.shifts < options.shifts:
        seat.symbol, seat.key = chance.choice(KEYS), seat.key + 1
        time.sleep(0.2)
        if engine.shifts >= every * (len(points) + 1):
            last = newest[-1]
            points.append((engine.shifts, memory()))
            print(f'shift {engine.shifts}, frame {last.index}: {statistics(decode(last.data))}, '
                  f'memory {points[-1][1] / 2**20:.1f} MiB, compiled {len(compiled)}, worlds '
                  f'broken {len(broken)}', flush=True)
    print(f'{1e3 * (time.monotonic() - began) / engine.shifts:.1f} ms a shift', end='; ')
    engine.stop()
    late = np.array(points[len(points) // 5:], float)
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] * 1000 / 2**20
    print(f'slope {slope:+.3f} MiB per 1,000 shifts, of the last {len(late)} points')


def decode(data: bytes) -> np.ndarray:
    """JPEG -> uint8 [H W 3]."""
    from PIL import Image
    return np.asarray(Image.open(io.BytesIO(data)))


def statistics(frame: np.ndarray) -> str:
    """Whether a picture is one: mush has no deviation and no edges."""
    frame = frame.astype(float)
    edges = np.abs(np.diff(frame, axis=1)).mean()
    return f'mean {frame.mean():.0f}, deviation {frame.std():.0f}, edges {edges:.1f}'


def memory() -> int:
    """Bytes of this process that are no file: RssAnon + VmSwap."""
    with open(f'/proc/{os.getpid()}/status', encoding='utf-8') as file:
        lines = dict(line.split(':', 1) for line in file)
    return sum(int(lines[name].split()[0]) for name in ('RssAnon', 'VmSwap')) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('load', 'faults', 'soak', 'clients'))
    parser.add_argument('--recipe', default=config.DEFAULT_WORLD)
    parser.add_argument('--weights')
    parser.add_argument('--players', type=int, default=8)
    parser.add_argument('--seconds', type=float, default=30)
    parser.add_argument('--shifts', type=int, default=20_000)
    parser.add_argument('--connects', type=int, default=200)
    parser.add_argument('--messages', type=int, default=10_000)
    parser.add_argument('--entry', default='head')
    parser.add_argument('--together', type=int, default=1)
    parser.add_argument('--port', type=int)
    parser.add_argument('--wild', action='store_true')
    options = parser.parse_args()
    if options.what == 'clients':
        print(json.dumps(asyncio.run(clients(options))))
        return
    given = [f'--weights={options.weights}'] if options.weights else []
    recipe = config.load(options.recipe, given)
    {'load': load, 'faults': faults, 'soak': soak}[options.what](recipe, options)


if __name__ == '__main__':
    main()
