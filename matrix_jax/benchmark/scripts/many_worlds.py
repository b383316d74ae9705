"""Tests players on several worlds of one Ray cluster: waiting, a killed world, and the shutdown.

    python -m matrix_jax.benchmark.scripts.many_worlds --worlds 1-3 --players 2 --seconds 10

Prints how long players wait for a slot, how much of a drive is lost when the process of its world
is killed, and which processes remain after the shutdown. Needs `pip install -e '.[ray]'`.
"""

import argparse
import contextlib
import json
import socket
import threading
import time
from pathlib import Path

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from matrix_jax import recipes
from matrix_jax.serve.cluster import ray_serve
from matrix_jax.serve.web import server

JOIN = {'type': 'join', 'session': None, 'start': None, 'prompt': None}


class Player(threading.Thread):
    """A client that drives and records what it receives and when."""

    def __init__(self, port: int, seed: int):
        super().__init__(daemon=True)
        self.port, self.seed, self.frames, self.welcomes, self.notes = port, seed, [], [], []
        self.asked, self.stopping = time.monotonic(), False

    def run(self):
        with connect(f'ws://127.0.0.1:{self.port}/play', max_size=2**24) as self.socket:
            self.socket.send(json.dumps(JOIN | {'seed': self.seed}))
            with contextlib.suppress(ConnectionClosed):
                while not self.stopping:
                    self.take(self.socket.recv())
                self.socket.send('{"type": "leave"}')

    def take(self, message):
        now = time.monotonic()
        if isinstance(message, bytes):
            self.frames.append((now, int.from_bytes(message[:4], 'little')))
            if len(self.frames) % 4 == 0:
                self.socket.send(json.dumps({'type': 'seen', 'frame': self.frames[-1][1]}))
            return
        note = json.loads(message)
        if note['type'] == 'welcome':
            self.welcomes.append((now, len(self.frames), note))
            self.socket.send(json.dumps({'type': 'keys', 'id': 1, 'symbol': 'D'}))
        elif note['type'] != 'stats':
            self.notes.append((now, note))


def shifts(data: bytes) -> int:
    """Number of shifts in a `.world` file."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
    symbols = json.loads(header['__metadata__']['log'])['symbols']
    return sum(int(part.split('*')[1]) for part in symbols.split(',') if part)


def worlds() -> list[str]:
    """Names of the actors of all worlds."""
    from ray.util import list_named_actors

    return [
        one['name']
        for one in list_named_actors(all_namespaces=True)
        if one['name'].startswith(f'SERVE_REPLICA::{ray_serve.NAME}#WorldReplica#')
    ]


def processes() -> set[str]:
    """Ids of Ray's processes."""
    found = set()
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b'ray::'):
                found.add(path.parent.name)
    return found


def until(condition, seconds: float, what: str):
    """Waits for a condition and returns the seconds it took; exits if that is too long."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() > began + seconds:
            raise SystemExit(f'not within {seconds:.0f} s: {what}')
        time.sleep(0.05)
    return time.monotonic() - began


def fps(players, seconds: float) -> list[float]:
    """Frames per second of each player over the last `seconds`."""
    now = time.monotonic()
    return [
        round(sum(when > now - seconds for when, _ in one.frames) / seconds, 1) for one in players
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--recipe', default=recipes.DEFAULT_WORLD)
    parser.add_argument('--weights')
    parser.add_argument('--worlds', default='1-3')
    parser.add_argument('--players', type=int, default=2, help='places in one world')
    parser.add_argument('--seconds', type=float, default=10)
    parser.add_argument('--cpus', type=float, default=0.5, help="of one world, in Ray's count")
    args = parser.parse_args()
    given = [f'--weights={args.weights}'] if args.weights else []
    recipe = recipes.load(args.recipe, given)
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    cfg = server.Config(players=args.players, port=port, grace=5.0)
    fewest, most = ray_serve.parse_worlds(args.worlds)
    many = ray_serve.Config(fewest, most, cpus=args.cpus, drain=10.0, idle=5.0)
    began, before = time.monotonic(), processes()
    with ray_serve.running(recipe, cfg, many) as registry:
        import ray

        print(
            f'ready after {time.monotonic() - began:.0f} s, {len(worlds())} of {most} worlds',
            flush=True,
        )
        players = []
        for seed in range(most * args.players):
            players.append(Player(port, seed))
            players[-1].start()
            until(lambda: players[-1].welcomes, 300, 'a place for a player')
            told = [note['message'] for _, note in players[-1].notes if note['type'] == 'waiting']
            print(
                f'player {seed}: in after {players[-1].welcomes[0][0] - players[-1].asked:.2f} s '
                f'{told or ""}, {len(worlds())} worlds',
                flush=True,
            )
        late = Player(port, 99)
        late.start()
        until(lambda: late.notes, 10, 'an answer to one player too many')
        print(
            f'one too many: {late.notes[0][1]["message"]!r} after '
            f'{1e3 * (late.notes[0][0] - late.asked):.0f} ms'
        )
        time.sleep(args.seconds)
        print('frames a second of each', fps(players, args.seconds), flush=True)

        ray.kill(ray.get_actor(worlds()[0], 'serve'))  # at once, without a word
        dead = time.monotonic()
        print('killed one world')
        kept = {
            one: ray.get(registry.find.remote(one.welcomes[-1][2]['session'])) for one in players
        }
        until(lambda: any(len(one.welcomes) > 1 for one in players), 300, 'a player back')
        time.sleep(1)
        hit = [
            one
            for one in players
            if any(when > dead for when, note in one.notes if note['type'] == 'waiting')
        ]
        for one in hit:
            until(
                lambda one=one: len(one.welcomes) > 1 and len(one.frames) > one.welcomes[1][1] + 8,
                300,
                'a player back',
            )
            welcome = one.welcomes[1]
            last, first = one.frames[welcome[1] - 1], one.frames[welcome[1]]
            per = welcome[2]['shift_frames']
            lost = (last[1] + 1) / per - shifts(kept[one].data)
            print(
                f'player {one.seed}: no picture for {first[0] - last[0]:.2f} s, goes on from '
                f'{lost * per / welcome[2]["fps"]:.2f} s before the last picture; its moment was '
                f'{dead - kept[one].taken_at:.2f} s old',
                flush=True,
            )
        others = [one for one in players if one not in hit]
        print(
            f'{len(others)} others were not told anything:',
            not any(
                note['type'] == 'waiting' and when > dead
                for one in others
                for when, note in one.notes
            ),
        )
        took = until(lambda: len(worlds()) >= most, 300, 'another world in its place')
        print(f'replaced: {len(worlds())} worlds again, {took:.0f} s later', flush=True)
        time.sleep(args.seconds)
        print('frames a second of each', fps(players, args.seconds), flush=True)
        for one in players[1:]:
            one.stopping = True
        if most > fewest:
            took = until(lambda: len(worlds()) < most, 300, 'fewer worlds')
            print(f'one player left: {len(worlds())} worlds after {took:.0f} s')
            until(lambda: fps(players[:1], 1)[0] > 0, 60, 'the last player to go on')
        began = time.monotonic()
    print(
        f'stopped after {time.monotonic() - began:.0f} s; the last player was told '
        f'{[note["message"] for _, note in players[0].notes][-2:]}'
    )
    print('processes left:', len(processes() - before))


if __name__ == '__main__':
    main()
