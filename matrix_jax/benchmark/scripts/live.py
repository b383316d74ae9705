r"""Tests the live player under load, with faulty clients and over time; prints one line per figure.

    python -m matrix_jax.benchmark.scripts.live load --players 8 --seconds 30
    python -m matrix_jax.benchmark.scripts.live load --players 1 --entry tail
    python -m matrix_jax.benchmark.scripts.live load --players 1 --world.stream.head_group 0 \
        --without hurry,lead
    python -m matrix_jax.benchmark.scripts.live clock --step-ms 70
    python -m matrix_jax.benchmark.scripts.live faults --seconds 90
    python -m matrix_jax.benchmark.scripts.live floods --seconds 30 --rounds 4
    python -m matrix_jax.benchmark.scripts.live soak --shifts 20000

Fields of the recipe follow the options. Exits with 1 if a bound is broken; its line begins with
BROKEN. Clients run in their own processes (`live_clients`), so they do not share the server's
interpreter.

`clock` runs nothing: it follows the engine's clock with steps of a given length, with and without
what shortens the time from key to picture, so that a busy machine does not matter. `load` also
replays every player's log alone on the same program and compares each frame that the
player saw, byte by byte (of the JPEG). `faults` runs two good players beside a slow reader, a
client that is killed repeatedly, one that connects and drops, one that sends invalid messages, and
invalid HTTP; it compares them with the same players beside good ones. `floods` compares two good
players beside a third one with the same beside one who sends keys, restarts and prompts without
pause, in turns, because a machine is not always equally fast. `soak` runs one player on a
socket with an engine that never waits.
"""

import argparse
import asyncio
import contextlib
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
from matrix_jax.benchmark.scripts.live_checks import (
    Bounds,
    Counted,
    decode,
    memory,
    spelt,
    statistics,
)
from matrix_jax.serve.runtime import batched_stream, pace, replay, session_log, start_frames
from matrix_jax.serve.runtime import engine as engines
from matrix_jax.serve.web import server as run
from matrix_jax.serve.web.app import WorldApp
from matrix_jax.serve.web.hosted_world import HostedWorld

CLIENTS = Path(__file__).with_name('live_clients.py')
FAST = 1e-3  # seconds per shift of an engine that never waits
FAULTY = 4  # players that the faulty clients occupy: slow, killed, dropping, invalid
REFUSED_SECONDS = 0.1
SLOWER = 0.10  # allowed relative increase of the 95th percentile beside faults
GROWTH = 128 * 2**20  # bytes that faults may leave in caches and in the allocator
ENCODE_SECONDS = 1e-3  # of a small frame
SLOPE = 1e6  # bytes per 1,000 shifts

# What shortens the time from key to picture -> how an engine does without it.
LEVERS = {
    'hurry': lambda engine: setattr(engine.pace, 'most_hurry', 1.0),
    'lead': lambda engine: setattr(engine.pace, 'spreads', float('inf')),
    'single': lambda engine: setattr(engine, 'frames_at_once', engine.stream.frames_per_step),
}


@contextlib.contextmanager
def server(recipe, **fields):
    """Context of a running server: (port, HostedWorld, Counted)."""
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


def start(what: str, port: int, args, **more) -> subprocess.Popen:
    """Starts clients in a new process."""
    given = {'port': port, 'seconds': args.seconds, **more}
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
    """Waits for clients and returns their results."""
    said, _ = clients.communicate()
    if clients.returncode:
        raise SystemExit(f'clients ended with {clients.returncode}')
    return json.loads(said)


def show(found: list[dict], name: str) -> float:
    """Prints the rates and latencies of players -> 95th percentile of the latencies in ms."""
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
    """Replays each log alone on the same program; every frame that a player saw must be equal."""
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
    """Bounds that hold after every test: no crash, no recompilation."""
    compiled = one.metrics.compiled._value.get()
    bounds.hold(
        one.engine.alive and not counted.errors,
        'no crash',
        f'engine alive {one.engine.alive}, errors {counted.errors[:3]}',
    )
    bounds.hold(compiled == 0, 'recompilations', f'{compiled:.0f}')


# --- the clock alone ---------------------------------------------------------------------------


def clock(recipe, args, bounds: Bounds):
    """Times from key to picture by the engine's clock, with each lever left out in turn."""
    cfg, per = recipe.world.stream, recipe.world.frames_per_control
    stream = cfg.with_control_binding('early' if args.entry == 'head' else args.entry)
    period = stream.controls_per_step * per / recipe.world.fps
    for without in ([], *([name] for name in LEVERS), list(LEVERS)):
        late = np.sort(follow_clock(period, stream.lag, args.step_ms / 1e3, per, without))
        half, most = 1e3 * np.quantile(late, (0.5, 0.95))
        print(
            f'{"":7}{"without " + ", ".join(without) if without else "with all":28}'
            f'key to picture p50 {half:.0f}, p95 {most:.0f} ms of {len(late)}'
        )


def follow_clock(
    period: float, lag: int, seconds: float, frames: int, without: list[str], keys: int = 4000
) -> list[float]:
    """Seconds from key to picture of keys that come at random, one or two a second.

    Args:
      period: seconds that the frames of a step last.
      lag: steps between the one that takes a key and the one that shows it.
      seconds: time of a step, which varies by a tenth of it.
      frames: frames of a step, each of which takes `ENCODE_SECONDS` to encode.
      without: levers to leave out.
      keys: how many keys.
    """
    chance, clock = np.random.default_rng(0), pace.Pace(period)
    clock.most_hurry = 1.0 if 'hurry' in without else clock.most_hurry
    clock.spreads = float('inf') if 'lead' in without else clock.spreads
    encode = ENCODE_SECONDS * (frames if 'single' in without else 1)
    pressed, waiting, late, now, step = 5.0, [], [], 0.0, 0
    while len(late) < keys:
        begin = now + max(0.0, clock.wait(now))
        while pressed < begin:
            now = max(now, pressed)
            clock.hurry(now)
            waiting.append((step + lag, pressed))
            pressed += chance.uniform(0.6, 1.4)
            begin = now + max(0.0, clock.wait(now))
        now = begin + seconds * chance.normal(1, 0.1)
        shown = clock.collect(begin, now)
        late += [shown + encode - key for wanted, key in waiting if wanted == step]
        waiting = [(wanted, key) for wanted, key in waiting if wanted > step]
        step += 1
    return late


# --- what is run -------------------------------------------------------------------------------


def load(recipe, args, bounds: Bounds):
    """As many players as there is room for, and one too many."""
    with server(
        recipe, players=args.players, control_binding=args.entry, together=args.together
    ) as (port, one, counted):
        for name in args.without:
            LEVERS[name](one.engine)
        show(end(start('play', port, args)), 'one player')
        if args.players > 1:
            found = end(start('play', port, args, players=args.players + 1))
            show(found, f'{args.players} players')
            refused = [player['refused'] for player in found if 'refused' in player]
            bounds.hold(
                len(refused) == 1 and refused[0] < REFUSED_SECONDS,
                'one too many',
                f'refused after {[f"{1e3 * seconds:.0f} ms" for seconds in refused]}',
            )
            compare(one, found, bounds)
        print(f'{"":7}step: {1e3 * one.engine.seconds:.0f} ms')
        still(one, counted, bounds)


def good(port: int, args) -> list[dict]:
    """Results of two good players."""
    return end(start('play', port, args, players=2))


def kill(port: int, args, over: threading.Event) -> int:
    """Starts and kills clients one after the other -> number of clients killed."""
    count = 0
    while not over.is_set():
        victim = start('play', port, args, seed=50)
        over.wait(args.seconds / 4)
        count += victim.poll() is None  # it may have been refused
        victim.kill()
        victim.communicate()
    return count


def faults(recipe, args, bounds: Bounds):
    """Two good players, first beside other good ones, then beside faulty clients."""
    from concurrent.futures import ThreadPoolExecutor

    with server(
        recipe, players=args.players, control_binding=args.entry, together=args.together
    ) as (port, one, counted):
        others = start('play', port, args, players=FAULTY, seed=20)
        calm = show(good(port, args), f'two players, {FAULTY} good ones beside them')
        end(others)
        rests(one)
        counted.found.clear()
        before, tasks, files = memory(), count_tasks(one), open_files()
        over = threading.Event()
        slow = start('slow', port, args, seed=40)
        bad = start(
            'storm',
            port,
            args,
            connects=args.connects,
            messages=args.messages,
            requests=args.requests,
        )
        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(kill, port, args, over)
            found = good(port, args)
            over.set()
        wild = show(found, f'two players, {FAULTY} faults beside them')
        [said], [slow] = end(bad), end(slow)
        rests(one)
        taken = counted.found.pop('taken')
        bounds.hold(
            said['connects'] == args.connects,
            'connects and drops',
            f'{said["connects"]} in {said["connects_took"]:.0f} s, {said["seated"]} of '
            f'them seated; clients killed: {killed.result()}',
        )
        bounds.hold(
            taken >= args.messages,
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


def floods(recipe, args, bounds: Bounds):
    """Two good players, in turns beside a third one and beside one who floods the server."""
    with server(recipe, players=3, control_binding=args.entry) as (port, one, _):
        late: dict[str, list[float]] = {'calm': [], 'flood': []}
        for turn in range(2 * args.rounds):
            kind = 'flood' if turn % 2 else 'calm'
            third = start('flood' if turn % 2 else 'play', port, args)
            found = good(port, args)
            show(found, f'two players, {kind}')
            late[kind] += [value for player in found for value in player.get('latencies', ())]
            told = end(third)[0]
            if kind == 'flood':
                print(f'{"":7}{told["sent"]} messages, {told["joined"]} times joined', flush=True)
            rests(one)
        calm, wild = (float(np.quantile(late[kind], 0.95)) for kind in ('calm', 'flood'))
        bounds.hold(
            wild / calm - 1 <= SLOWER,
            'p95 of the two good players',
            f'{1e3 * calm:.0f} ms, beside a flood {1e3 * wild:.0f} ms: {wild / calm - 1:+.0%}',
        )


def rests(one: HostedWorld):
    """Waits until no session is left."""
    end = time.monotonic() + 20
    while one.manager.sessions and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(3)


def count_tasks(one: HostedWorld) -> int:
    """Number of tasks in the event loop of the server."""
    return len(asyncio.all_tasks(one.manager.loop))


def open_files() -> int:
    return len(os.listdir('/proc/self/fd'))


def soak(recipe, args, bounds: Bounds):
    """Many shifts of one player without pacing: memory, compilations, contrast of the frames."""
    with server(recipe, players=1, control_binding=args.entry) as (port, one, counted):
        engine, points = one.engine, []
        prompt, begun = start_frames.choose(engine.stream.world, one.manager.folder, None, None)
        clip = start_frames.load(engine.stream, one.manager.folder, begun, None)
        first = statistics(clip[-1])
        print(f'{"":7}start clip: {spelt(first)}', flush=True)
        engines.HISTORY_SECONDS *= FAST / engine.period  # as many moments as at its own pace
        engine.pace.period = FAST
        every, began = max(1, args.shifts // 20), time.monotonic()
        # A few shifts more, so that the player is still there at the last measurement.
        frames = (args.shifts + every) * engine.stream.frames_per_step
        player = start('last', port, args, frames=frames)
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
            engine.steps >= args.shifts,
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
        late = np.array(points[len(points) // 2 :], float)  # the rewind memory fills up before that
        slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] * 1000
        bounds.hold(
            slope < SLOPE,
            'memory',
            f'{slope / 1e6:+.3f} MB in 1,000 shifts, from shift {late[0, 0]:.0f} on',
        )
        still(one, counted, bounds)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('what', choices=('load', 'clock', 'faults', 'floods', 'soak'))
    parser.add_argument('--recipe', default=recipes.DEFAULT_WORLD)
    parser.add_argument('--weights')
    parser.add_argument('--entry', default='head')
    parser.add_argument('--seconds', type=float, default=30)
    parser.add_argument('--step-ms', type=float, default=70, help='of clock (default 70)')
    for name, usual in (
        ('players', 8),
        ('together', 1),
        ('shifts', 20_000),
        ('connects', 200),
        ('messages', 10_000),
        ('requests', 1000),
        ('rounds', 4),
    ):
        parser.add_argument(f'--{name}', type=int, default=usual)
    parser.add_argument(
        '--without',
        default='',
        help=f'levers to leave out, separated by commas: {", ".join(LEVERS)}',
    )
    args, fields = parser.parse_known_args()
    args.without = list(filter(None, args.without.split(',')))
    if unknown := set(args.without) - set(LEVERS):
        parser.error(f'--without: got {", ".join(sorted(unknown))}, expected {", ".join(LEVERS)}')
    if args.what == 'faults' and args.players < FAULTY + 4:
        parser.error(
            f'--players: got {args.players}, expected at least {FAULTY + 4}: two good '
            f'players, {FAULTY} faults, and places that lost players still hold'
        )
    given = [f'--weights={args.weights}'] if args.weights else []
    bounds = Bounds()
    runs = {'load': load, 'clock': clock, 'faults': faults, 'floods': floods, 'soak': soak}
    runs[args.what](recipes.load(args.recipe, given + fields), args, bounds)
    sys.exit(bounds.broken > 0)


if __name__ == '__main__':
    main()
