"""Recording of a data set from a game, in resumable shards that depend only on the settings.

`claim` and `pooled` also serve `ingest`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from matrix_jax.data import carracing, doom
from matrix_jax.data.records import SUFFIX, Clip, Shard, write_shard


class GameModule(Protocol):
    """A module that records clips of a game.

    Attributes:
      FPS, HEIGHT, WIDTH: rate and size of the frames.
      THEMES: names of the themes, with their settings.
      NEEDS: modules that must be installed.
      ABOUT: further entries of the manifest.
      new_game: returns a game with `close()`.
    """

    FPS: int
    HEIGHT: int
    WIDTH: int
    THEMES: Mapping[str, Any]
    NEEDS: tuple[str, ...]
    ABOUT: dict
    new_game: Callable[[], Any]

    def record(self, game, seed: int, theme: str, frames: int, rng) -> Clip:
        """Records an episode of up to `frames` = 1 + 4k frames; odd seeds are held out."""
        ...


GAMES: dict[str, GameModule] = {'CarRacing-v3': carracing, 'vizdoom': doom}

EPISODE_FRAMES = 257  # 16 s
# Gallery episodes are longer, so that the walker returns to what it has seen.
LONG_FRAMES = {doom.GALLERY: 961}  # by theme; 60 s
SHORTEST_FRAMES = 65
SHARD_FRAMES = 16 * EPISODE_FRAMES
MANIFEST = 'manifest.json'


@dataclass(frozen=True)
class RecordingPlan:
    """Settings of a recording; the same settings always give the same shards."""

    env: str
    hours: float
    themes: tuple[str, ...]
    seed: int
    held_out: float
    height: int
    width: int
    fps: int

    def shards(self) -> list[tuple[str, int, int]]:
        """(split, number, least frames) of every shard; both splits grow evenly."""
        total = math.ceil(self.hours * 3600 * self.fps)
        held = math.ceil(total * self.held_out)
        sizes = {}
        for split, frames in (('train', total - held), ('heldout', held)):
            for number in range(math.ceil(frames / SHARD_FRAMES)):
                sizes[split, number] = min(SHARD_FRAMES, frames - number * SHARD_FRAMES)
        counts = {split: sum(s == split for s, _ in sizes) for split in ('train', 'heldout')}
        order = sorted(sizes, key=lambda s: (s[1] / counts[s[0]], s[0] != 'train'))
        return [(*shard, sizes[shard]) for shard in order]


def plan(env: str, hours: float, themes: str, seed: int, held_out: float) -> RecordingPlan:
    """Checks the settings of a recording.

    Raises:
      ValueError: a setting is invalid; the message names it.
    """
    if not 0 < hours <= 10_000:
        raise ValueError(f'--hours: got {hours:g}, expected more than 0, at most 10000')
    if not 0 <= held_out < 1:
        raise ValueError(f'--held-out: got {held_out:g}, expected 0 <= fraction < 1')
    if not 0 <= seed < 2**32:
        raise ValueError(f'--seed: got {seed}, expected 0 .. 2^32 - 1')
    game = GAMES[env]
    names = tuple(name.strip() for name in themes.split(','))
    names = tuple(game.THEMES) if themes == 'all' else names
    wrong = [name for name in names if name not in game.THEMES]
    if wrong or len(set(names)) != len(names):
        raise ValueError(
            f"--themes: got {themes!r}, expected 'all' or different names of "
            + ', '.join(game.THEMES)
        )
    return RecordingPlan(
        env, float(hours), names, seed, float(held_out), game.HEIGHT, game.WIDTH, game.FPS
    )


def run(settings: RecordingPlan, out: Path, workers: int) -> int:
    """Records the missing shards, with a progress bar -> number of frames in the folder."""
    check_workers(workers)
    claim(settings, out, GAMES[settings.env].ABOUT)
    from tqdm import tqdm

    todo, frames = [], 0
    for split, number, least in settings.shards():
        path = out / f'{split}-{number:05d}{SUFFIX}'
        if path.exists():
            frames += count_frames(path)
        else:
            todo.append((settings, split, number, least, path))
    total = frames + sum(least for _, _, _, least, _ in todo)
    with tqdm(total=total, initial=frames, unit='frame', unit_scale=True) as bar:
        for made in pooled(_shard, todo, workers):
            frames += made
            bar.total += max(0, bar.n + made - bar.total)
            bar.update(made)
    return frames


def check_workers(workers: int):
    """Raises ValueError unless `workers` is a sensible number of processes."""
    if not 1 <= workers <= 256:
        raise ValueError(f'--workers: got {workers}, expected 1 .. 256')


def count_frames(path: Path) -> int:
    """Number of frames in one shard."""
    shard = Shard(path)
    return sum(len(shard[i].frames) for i in range(len(shard)))


def claim(settings, out: Path, more=()):
    """Writes the manifest of a new folder, or checks that of an existing one.

    Args:
      settings: dataclass whose fields must all agree.
      out: the folder.
      more: further entries that must agree.

    Raises:
      ValueError: the folder holds other data; the message names the settings that differ.
    """
    path, ours = out / MANIFEST, json.loads(json.dumps({**asdict(settings), **dict(more)}))
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f'{path}: not JSON ({error})') from error
        keys = [k for k in ours if not isinstance(theirs, dict) or theirs.get(k) != ours[k]]
        if keys:
            found = ', '.join(
                f'{k} {theirs.get(k)!r} (asked {ours[k]!r})' if isinstance(theirs, dict) else k
                for k in keys
            )
            raise ValueError(f'{path}: recorded with other settings: {found}; use another --out')
        return
    if out.exists() and any(out.glob(f'*{SUFFIX}')):
        raise ValueError(f'{out}: holds shards without a {MANIFEST}; use another --out')
    out.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    part.write_text(json.dumps(ours, indent=1) + '\n')
    part.replace(path)


def pooled(work, todo, workers):
    """Yields `work(job)` of all jobs from `workers` processes, in order of completion."""
    if workers == 1 or len(todo) < 2:
        yield from map(work, todo)
        return
    count = min(workers, len(todo))
    # Ctrl-C stops the parent, which ends the workers; unfinished shards keep a temporary name.
    quiet = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context('spawn').Pool(count, signal.signal, quiet) as pool:
        yield from pool.imap_unordered(work, todo)


def _shard(job) -> int:
    """Records one shard; its content depends only on the settings, split and number."""
    settings, split, number, least, path = job
    held = split == 'heldout'
    rng = np.random.default_rng([settings.seed, held, number])
    module = GAMES[settings.env]
    game = module.new_game()
    frames = 0

    def episodes():
        nonlocal frames
        index = int(rng.integers(len(settings.themes)))
        while frames < least:
            track = int(rng.integers(2**30)) * 2 + held
            theme = settings.themes[index % len(settings.themes)]
            longest = LONG_FRAMES.get(theme, EPISODE_FRAMES)
            wanted = max(SHORTEST_FRAMES, min(longest, least - frames + 3 & ~3 | 1))
            clip = module.record(game, track, theme, wanted, rng)
            if len(clip.frames) >= SHORTEST_FRAMES:
                index += 1
                frames += len(clip.frames)
                yield clip

    try:
        write_shard(path, episodes())
    finally:
        game.close()
    return frames
