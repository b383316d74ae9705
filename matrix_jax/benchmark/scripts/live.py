"""The live player under load, faults and time: measured figures, one line each.

    python -m matrix_jax.benchmark.scripts.live load --players 8 --seconds 30
    python -m matrix_jax.benchmark.scripts.live load --players 1 --entry tail
    python -m matrix_jax.benchmark.scripts.live faults --seconds 90
    python -m matrix_jax.benchmark.scripts.live soak --shifts 20000

Exits with 1 where a bound does not hold; its line begins with BROKEN. Clients are processes of
their own on this machine (`live_clients.py`), so that they do not share the server's interpreter.

`load` also plays every player's log again, alone on the same program, and compares each frame that
the player saw, byte by byte (of the JPEG). `faults` has two good players beside a slow reader, a
client that is killed again and again, one who comes and goes, one who talks nonsense, and HTTP
that makes no sense; before that, as many good players as these, for comparison. `soak` has one
player on a socket, and a world that does not keep pace.
"""

import argparse
import asyncio
import collections
import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np

from matrix_jax import recipes
from matrix_jax.serve.runtime import batched_stream, replay, session_log, start_frames
from matrix_jax.serve.runtime import engine as engines
from matrix_jax.serve.web import server as run
from matrix_jax.serve.web.app import WorldApp
from matrix_jax.serve.web.hosted_world import HostedWorld

CLIENTS = Path(__file__).with_name('live_clients.py')
STORM, COUNTED = b'storm', '/counted'  # as the clients have it
FAST = 1e-3  # seconds of a shift, for an engine that shall not keep pace
FAULTY = 4  # worlds in use by the faults: slow, killed, come and gone, nonsense
REFUSED_SECONDS = 0.1
SLOWER = 0.10  # by which others may be slower in the storm, at the 95th percentile
GROWTH = 128 * 2**20  # bytes that a storm may leave behind, in caches and in the allocator
SLOPE = 1e6  # bytes in 1,000 shifts


class Bounds:
    """Figures, and which of them are not as they must be."""

    def __init__(self):
        self.broken = 0

    def hold(self, fine: bool, name: str, figures: str):
        """Prints one line."""
        self.broken += not fine
        print(f'{"ok" if fine else "BROKEN":7}{name}: {figures}', flush=True)


class Counted(logging.Handler):
    """ASGI around the server: counts what the storm's sockets say and are told, what HTTP is
    answered, and, as a handler of logs, errors; it tells them at COUNTED."""

    def __init__(self, served):
        super().__init__(logging.ERROR)
        self.served, self.found, self.errors = served, collections.Counter(), []

    def emit(self, record):
        self.errors.append(record.getMessage())

    async def __call__(self, scope, receive, send):
        if scope['type'] == 'http' and scope['path'] == COUNTED:
            from starlette.responses import JSONResponse

            return await JSONResponse({'taken': self.found['taken']})(scope, receive, send)
        storm = scope['type'] == 'websocket' and scope['query_string'] == STORM

        async def heard():
            message = await receive()
            if storm and message['type'] == 'websocket.receive':
                self.found['taken'] += 1
            return message

        async def told(message):
            if storm and message['type'] == 'websocket.close':
                self.found[f'closed with {message.get("code")}'] += 1
            elif storm and message.get('text', '').startswith('{"type": "error"'):
                self.found['answered as wrong'] += 1
            elif message['type'] == 'http.response.start':
                self.found[f'HTTP {message["status"]}'] += 1
            await send(message)

        try:
            await self.served(scope, heard, told)
        except Exception as error:
            self.errors.append(repr(error))
            raise


@contextlib.contextmanager
def server(recipe, **fields):
    """(port, HostedWorld, Counted) of a running server."""
    cfg = run.Config(port=0, **fields)
    stream, folder = batched_stream.open_stream(
        recipe, cfg.players, cfg.control_binding, cfg.together
    )
    one = HostedWorld(stream, folder, recipe.name, grace=2.0)
    counted = Counted(WorldApp({recipe.name: one}).asgi())
    logging.getLogger().addHandler(counted)
    with run.listen(cfg) as listening:
        web = run.uvicorn_server(counted, cfg.players)
        thread = threading.Thread(target=web.run, args=([listening],))
        thread.start()
        while not web.started and thread.is_alive():
            time.sleep(0.05)
        try:
            yield listening.getsockname()[1], one, counted
        finally:
            web.should_exit = True
            thread.join()


def start(what: str, port: int, options, **more) -> subprocess.Popen:
    """Clients in a process of their own."""
    given = {'port': port, 'seconds': options.seconds, **more}
    return subprocess.Popen(
        [
            sys.executable,
            str(CLIENTS),
            what,
            *(f'--{name}={value}' for name, value in given.items()),
        ],
        text=True,
        stdout=subprocess.PIPE,
    )


def end(clients: subprocess.Popen) -> list[dict]:
    """What they saw."""
    said, _ = clients.communicate()
    if clients.returncode:
        raise SystemExit(f'clients ended with {clients.returncode}')
    return json.loads(said)


def show(found: list[dict], name: str) -> float:
    """Prints one line -> p95 of the latencies."""
    playing = [one for one in found if 'fps' in one]
    late = np.sort(np.concatenate([one['latencies'] for one in playing]))
    half, most = 1e3 * np.quantile(late, (0.5, 0.95))
    print(
        f'{"":7}{name}: frames a second of each',
        [round(one['fps'], 1) for one in playing],
        f'| key to picture p50 {half:.0f}, p95 {most:.0f} ms of {len(late)}',
        flush=True,
    )
    return most


def compare(one: HostedWorld, found: list[dict], bounds: Bounds):
    """Plays each log again, alone, on the same program; all frames that were seen must be equal."""
    stream, equal, other = one.engine.stream.empty_copy(), 0, 0
    for player in found:
        if 'log' not in player:
            continue
        log = session_log.from_json(player['log'])
        for index, frame in enumerate(replay.frames(stream, one.manager.folder, log)):
            if str(index) in player['seen']:
                same = zlib.crc32(one.engine.encode_frame(frame)) == player['seen'][str(index)]
                equal, other = equal + same, other + (not same)
    bounds.hold(
        equal > 0 and not other,
        'the same players alone',
        f'{equal} frames equal byte by byte, {other} not',
    )


def still(one: HostedWorld, counted: Counted, bounds: Bounds):
    """What holds at the end of everything."""
    compiled = one.metrics.compiled._value.get()
    bounds.hold(
        one.engine.alive and not counted.errors,
        'no crash',
        f'engine alive {one.engine.alive}, errors {counted.errors[:3]}',
    )
    bounds.hold(compiled == 0, 'recompilations', f'{compiled:.0f}')


# --- what is run -------------------------------------------------------------------------------


def load(recipe, options, bounds: Bounds):
    """A full house, and one player too many."""
    with server(
        recipe, players=options.players, control_binding=options.entry, together=options.together
    ) as (port, one, counted):
        show(end(start('play', port, options)), 'one player')
        if options.players > 1:
            found = end(start('play', port, options, players=options.players + 1))
            show(found, f'{options.players} players')
            refused = [player['refused'] for player in found if 'refused' in player]
            bounds.hold(
                len(refused) == 1 and refused[0] < REFUSED_SECONDS,
                'one too many',
                f'refused after {[f"{1e3 * seconds:.0f} ms" for seconds in refused]}',
            )
            compare(one, found, bounds)
        print(f'{"":7}step: {1e3 * one.engine.seconds:.0f} ms')
        still(one, counted, bounds)


def good(port: int, options) -> list[dict]:
    """What two good players saw."""
    return end(start('play', port, options, players=2))


def kill(port: int, options, over: threading.Event) -> int:
    """Clients that are killed, one after the other -> how many."""
    count = 0
    while not over.is_set():
        victim = start('play', port, options, seed=50)
        over.wait(options.seconds / 4)
        count += victim.poll() is None  # a full house may have sent it away
        victim.kill()
        victim.communicate()
    return count


def faults(recipe, options, bounds: Bounds):
    """Two good players, first beside other good ones, then beside faults."""
    from concurrent.futures import ThreadPoolExecutor

    with server(
        recipe, players=options.players, control_binding=options.entry, together=options.together
    ) as (port, one, counted):
        others = start('play', port, options, players=FAULTY, seed=20)
        calm = show(good(port, options), f'two players, {FAULTY} good ones beside them')
        end(others)
        rests(one)
        counted.found.clear()
        before, tasks, files = memory(), count_tasks(one), open_files()
        over = threading.Event()
        slow = start('slow', port, options, seed=40)
        bad = start(
            'storm',
            port,
            options,
            connects=options.connects,
            messages=options.messages,
            requests=options.requests,
        )
        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(kill, port, options, over)
            found = good(port, options)
            over.set()
        wild = show(found, f'two players, {FAULTY} faults beside them')
        [said], [slow] = end(bad), end(slow)
        rests(one)
        taken = counted.found.pop('taken')
        bounds.hold(
            said['connects'] == options.connects,
            'connects and drops',
            f'{said["connects"]} in {said["connects_took"]:.0f} s, {said["seated"]} of '
            f'them seated; clients killed: {killed.result()}',
        )
        bounds.hold(
            taken >= options.messages,
            'nonsense',
            f'{taken} messages taken by the server '
            f'in {said["took"]:.0f} s; {dict(sorted(counted.found.items()))}',
        )
        wrong = sum(count for status, count in said['http'].items() if int(status) >= 500)
        bounds.hold(
            not wrong,
            'HTTP',
            f'{sum(said["http"].values())} requests by status, 0 where only closed: {said["http"]}',
        )
        bounds.hold(said['big'] == 1009, '10 MB message', f'closed with {said["big"]}')
        print(f'{"":7}slow reader: {slow["fps"]:.1f} frames a second')
        bounds.hold(
            wild / calm - 1 <= SLOWER, 'p95 of the two good players', f'{wild / calm - 1:+.0%}'
        )
        left = len(one.manager.sessions), count_tasks(one) - tasks
        bounds.hold(
            left[0] == 0 and left[1] <= 0 and not any(one.engine.slots),
            'left behind',
            f'{left[0]} sessions, {left[1]:+d} tasks, {open_files() - files:+d} open files',
        )
        grown = memory() - before
        bounds.hold(grown < GROWTH, 'memory', f'{grown / 2**20:+.1f} MiB')
        still(one, counted, bounds)


def rests(one: HostedWorld):
    """Waits until the last player's place is given up."""
    end = time.monotonic() + 20
    while one.manager.sessions and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(3)


def count_tasks(one: HostedWorld) -> int:
    """Tasks in the event loop of the server."""
    return len(asyncio.all_tasks(one.manager.loop))


def open_files() -> int:
    return len(os.listdir('/proc/self/fd'))


def soak(recipe, options, bounds: Bounds):
    """Many shifts, unpaced, of one player on a socket: memory, compilations, whether pictures stay
    pictures."""
    with server(recipe, players=1, control_binding=options.entry) as (port, one, counted):
        engine, points = one.engine, []
        prompt, begun = start_frames.choose(engine.stream.world, one.manager.folder, None, None)
        clip = start_frames.load(engine.stream, one.manager.folder, begun, None)
        first = statistics(clip[-1])
        print(f'{"":7}start clip: {spelt(first)}', flush=True)
        engines.HISTORY_SECONDS *= FAST / engine.period  # as many moments as at its own pace
        engine.period = FAST
        every, began = max(1, options.shifts // 20), time.monotonic()
        # A few more than are looked at: the player is still there at the last look.
        frames = (options.shifts + every) * engine.stream.frames_per_step
        player = start('last', port, options, frames=frames)
        while engine.alive and player.poll() is None:
            sessions = list(one.manager.sessions.values())
            if engine.steps >= every * (len(points) + 1) and sessions and sessions[0].last:
                session = sessions[0]
                points.append((engine.steps, memory()))
                newest = statistics(decode(session.last.data))
                print(
                    f'{"":7}shift {engine.steps}, frame {session.last.index}: {spelt(newest)}, '
                    f'memory {points[-1][1] / 2**20:.1f} MiB',
                    flush=True,
                )
                steps = len(session.slot.log.controls)
                whole = session.slot.frames, steps * engine.stream.frames_per_step
            time.sleep(0.02)
        saw, took = end(player)[0], time.monotonic() - began
        bounds.hold(
            engine.steps >= options.shifts,
            'shifts',
            f'{engine.steps}, {1e3 * took / engine.steps:.1f} ms each',
        )
        bounds.hold(
            abs(whole[0] - whole[1]) <= engine.stream.frames_per_step,
            'frame counter',
            f'{whole[0]} at frame {whole[1]} of the log; the player saw {saw["got"]} of '
            f'{saw["newest"] + 1}, in order',
        )
        bounds.hold(
            newest[1] > first[1] / 4 and newest[2] > first[2] / 4,
            'pictures',
            f'{spelt(newest)} at the end, {spelt(first)} at the start',
        )
        late = np.array(points[len(points) // 2 :], float)  # the past fills up before that
        slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] * 1000
        bounds.hold(
            slope < SLOPE,
            'memory',
            f'{slope / 1e6:+.3f} MB in 1,000 shifts, from shift {late[0, 0]:.0f} on',
        )
        still(one, counted, bounds)


def decode(data: bytes) -> np.ndarray:
    """JPEG -> uint8 [H W 3]."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def statistics(frame: np.ndarray) -> tuple[float, float, float]:
    """Whether a picture is one: mean, deviation, edges; mush has neither of the last two."""
    frame = frame.astype(float)
    return frame.mean(), frame.std(), np.abs(np.diff(frame, axis=1)).mean()


def spelt(found: tuple) -> str:
    return 'mean {:.0f}, deviation {:.0f}, edges {:.1f}'.format(*found)


def memory() -> int:
    """Bytes of this process that are no file: RssAnon + VmSwap."""
    with open(f'/proc/{os.getpid()}/status', encoding='utf-8') as file:
        lines = dict(line.split(':', 1) for line in file)
    return sum(int(lines[name].split()[0]) for name in ('RssAnon', 'VmSwap')) * 1024


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('what', choices=('load', 'faults', 'soak'))
    parser.add_argument('--recipe', default=recipes.DEFAULT_WORLD)
    parser.add_argument('--weights')
    parser.add_argument('--entry', default='head')
    parser.add_argument('--seconds', type=float, default=30)
    for name, usual in (
        ('players', 8),
        ('together', 1),
        ('shifts', 20_000),
        ('connects', 200),
        ('messages', 10_000),
        ('requests', 1000),
    ):
        parser.add_argument(f'--{name}', type=int, default=usual)
    options = parser.parse_args()
    if options.what == 'faults' and options.players < FAULTY + 4:
        parser.error(
            f'--players: got {options.players}, expected at least {FAULTY + 4}: two good '
            f'players, {FAULTY} faults, and places that lost players still hold'
        )
    given = [f'--weights={options.weights}'] if options.weights else []
    bounds = Bounds()
    {'load': load, 'faults': faults, 'soak': soak}[options.what](
        recipes.load(options.recipe, given), options, bounds
    )
    sys.exit(bounds.broken > 0)


if __name__ == '__main__':
    main()
