"""The live player under load, faults and time: measured figures, one line each.

    benchmarks/live.py load --players 8 --seconds 30
    benchmarks/live.py faults
    benchmarks/live.py soak --shifts 20000

Clients are another process on this machine, so that they do not share the server's interpreter.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np

from matrix_jax import config
from matrix_jax.serve import app, run

JOIN = {'type': 'join', 'session': None, 'start': None, 'prompt': None}
KEYS = ('D', 'DL', 'DR', 'N', 'B')


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
    """One player: frames per second and latencies from a key to the first frame that is its own."""
    import websockets
    chance, pressed, latencies, frames, key = random.Random(seed), {}, [], 0, 0
    async with websockets.connect(f'ws://127.0.0.1:{port}/play', max_size=2**24) as socket:
        await socket.send(json.dumps(JOIN | {'seed': seed}))
        asked = time.monotonic()
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
                frames += 1
                echo = int.from_bytes(message[4:8], 'little')
                if echo in pressed:
                    latencies.append(time.monotonic() - pressed[echo])
                if slow:
                    await asyncio.sleep(10 / welcome['fps'])
                await socket.send(json.dumps(
                    {'type': 'seen', 'frame': int.from_bytes(message[:4], 'little')}))
        await socket.send('{"type": "leave"}')
        return {'fps': frames / seconds, 'latencies': latencies}


async def storm(port: int, connects: int, messages: int):
    """Players who come and go, and messages that make no sense."""
    import websockets
    chance, address = random.Random(0), f'ws://127.0.0.1:{port}/play'
    for _ in range(connects):
        async with websockets.connect(address) as socket:
            await socket.send(json.dumps(JOIN | {'seed': 1}))
            await asyncio.sleep(chance.uniform(0, 0.3))
    sent = 0
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
    with contextlib.suppress(websockets.ConnectionClosed):
        async with websockets.connect(address, max_size=None) as socket:
            await socket.send('x' * 10 * 2**20)


async def clients(port: int, players: int, seconds: float, wild: bool) -> list[dict]:
    extra = [storm(port, 200, 10_000), drive(port, seconds, 99, slow=True)] if wild else []
    found = await asyncio.gather(*(drive(port, seconds, seed) for seed in range(players)), *extra)
    return [one for one in found if one]


def measured(port: int, players: int, seconds: float, wild: bool = False) -> list[dict]:
    """What players in a process of their own saw."""
    given = [sys.executable, __file__, 'clients', '--port', port, '--players', players,
             '--seconds', seconds] + ['--wild'] * wild
    done = subprocess.run(list(map(str, given)), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def show(found: list[dict]):
    playing = [one for one in found if 'fps' in one]
    late = np.sort(np.concatenate([one['latencies'] for one in playing]))
    half, most = 1e3 * np.quantile(late, (.5, .95))
    print('fps of each', [round(one['fps'], 1) for one in playing],
          f'| key to picture p50 {half:.0f}, p95 {most:.0f} ms of {len(late)} | refused after',
          [f'{1e3 * one["refused"]:.0f} ms' for one in found if 'refused' in one])


# --- what is run -------------------------------------------------------------------------------


def load(recipe, options):
    """A full house, and one player too many."""
    with server(recipe, players=options.players, entry=options.entry,
                together=options.together) as (port, one):
        measured(port, 1, 3)
        show(measured(port, 1, options.seconds))
        show(measured(port, options.players + 1, options.seconds))
        print(f'step {1e3 * one.engine.seconds:.0f} ms, '
              f'recompilations {one.meters.compiled._value.get():.0f}')


def faults(recipe, options):
    """Two good players beside a storm, a slow reader, and messages that make no sense."""
    with server(recipe, players=options.players, entry=options.entry,
                together=options.together) as (port, one):
        measured(port, 2, 3)
        show(measured(port, 2, options.seconds))
        show(measured(port, 2, options.seconds, wild=True))
        time.sleep(5)
        print('engine alive', one.engine.alive, '| sessions left', len(one.house.sessions))


def soak(recipe, options):
    """Many shifts in one process: memory, compilations, and whether pictures stay pictures."""
    from jax import monitoring

    from matrix_jax.serve import replay
    slots, folder = run.open_slots(recipe, run.Config(players=1, entry=options.entry))
    compiled = []
    place = replay.starts_folder(slots.world, folder)
    start = next(iter(replay.starts.listing(place)), '')
    condition, _ = slots.condition(slots.world.cfg.prompt,
                                   replay.start_frames(slots, folder, start, None))
    slots.write(0, slots.begin(condition, 0))
    monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None)
    chance, every, points = random.Random(0), max(1, options.shifts // 10), []
    for shift in range(options.shifts):
        if shift % 8 == 0:
            symbols = np.full((1, slots.group), chance.randrange(9), np.int32)
        frames, finite = slots.step(symbols, np.ones(1, bool))
        if (shift + 1) % every == 0:
            frames, bytes_ = np.asarray(frames), memory()
            points.append((shift + 1, bytes_))
            print(f'shift {shift + 1}: finite {bool(np.asarray(finite).all())}, pixels mean '
                  f'{frames.mean():.1f} std {frames.std():.1f}, memory {bytes_ / 2**20:.1f} MiB, '
                  f'compiled {len(compiled)}', flush=True)
    late = np.array(points[len(points) // 5:], float)
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] * 1000 / 2**20
    print(f'slope {slope:.3f} MiB per 1,000 shifts')


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
    parser.add_argument('--entry', default='head')
    parser.add_argument('--together', type=int, default=1)
    parser.add_argument('--port', type=int)
    parser.add_argument('--wild', action='store_true')
    options = parser.parse_args()
    if options.what == 'clients':
        print(json.dumps(asyncio.run(clients(options.port, options.players, options.seconds,
                                             options.wild))))
        return
    given = [f'--weights={options.weights}'] if options.weights else []
    recipe = config.load(options.recipe, given)
    {'load': load, 'faults': faults, 'soak': soak}[options.what](recipe, options)


if __name__ == '__main__':
    main()
