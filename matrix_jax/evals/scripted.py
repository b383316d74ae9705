"""Streams under scripted keys, and the real game under the same keys from the same place.

A script runs in two ways: with its keys known in advance, as `matrix-jax generate` does (`run`), or
as played, each key pressed when its frames are due (`run_played`). Every other stream is mirrored,
game and keys included: the tracks of this game bend to the left more than to the right, and
obedience must not depend on that.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from matrix_jax.controls.driving import FRAMES_PER_CONTROL, SYMBOLS
from matrix_jax.data.loader import MIRROR_SIGN
from matrix_jax.data.records import MIRRORED
from matrix_jax.evals import driver
from matrix_jax.evals.video import Streams, indices

SCRIPTS = ('left', 'right', 'straight', 'mixed')
HELD = {'left': 'DL', 'right': 'DR', 'straight': 'D'}


@dataclasses.dataclass(frozen=True)
class ScriptedDrives:
    """Streams of one script, and the real game under the same keys from the same place.

    Attributes:
      keys: per stream, one symbol per latent frame, those of the context first.
      real, made: uint8 [B F H W 3], F = 1 + 4 (T-1); both begin with the real context.
      telemetry: telemetry of the real game [B F 6].
      context: frames that both share.
    """

    keys: list[list[str]]
    real: np.ndarray
    made: np.ndarray
    telemetry: np.ndarray
    context: int


def script(name: str, count: int, seed: int) -> list[str]:
    """`count` symbols: one key held, or all nine in turn for one to two seconds each."""
    if name in HELD:
        return [HELD[name]] * count
    rng, keys = np.random.default_rng(seed), []
    while len(keys) < count:
        # Three more with gas: with each symbol once, the car would stand still most of the time.
        for symbol in rng.permutation([*SYMBOLS, 'D', 'DL', 'DR']):
            keys += [str(symbol)] * int(rng.integers(4, 9))
    return keys[:count]


def mirrored(keys: list[str]) -> list[str]:
    """Symbols with left and right swapped."""
    return [SYMBOLS[MIRRORED[SYMBOLS.index(key)]] for key in keys]


def play(game, start, shown: int, keys: list[str], mirror: bool):
    """Plays the game under keys, mirrored or not.

    Args:
      start: a `driver.DriveStart`.
      shown: latent frames to show before the keys.
      keys: symbols, as the mirrored game sees them.
      mirror: whether to mirror frames, telemetry and keys.

    Returns:
      (frames uint8 [F H W 3], telemetry [F 6], the keys of the frames shown before).
    """
    frames, before, states = driver.begin(game, start, shown)
    if keys:
        more, after = driver.play(game, mirrored(keys) if mirror else keys)
        frames, states = np.concatenate([frames, more]), np.concatenate([states, after])
    if mirror:
        return frames[:, :, ::-1], states * MIRROR_SIGN, mirrored(before)
    return frames, states, before


def run(
    world, params, game, starts, seconds: int, seed: int, bar=None
) -> dict[str, ScriptedDrives]:
    """Runs all scripts with their keys known in advance.

    The start clip fills the window, so it already shows the first keys of the script. Where keys
    bind makes no difference here; `run_played` measures that.

    Args:
      world, params: from `worlds.open_run`.
      game: a `carracing.CarRacingGame`.
      starts: from `driver.starts`.
      seconds: length of each stream.
      seed: seed of scripts and noise.
      bar: `bar(name)` wraps a range of steps, such as a `tqdm`.
    """
    bar = bar or (lambda name: lambda steps: steps)
    stream = world.cfg.stream
    streams, count = Streams(world, params, 'late'), _count(world, seconds)
    found = {}
    for name in SCRIPTS:
        keys = _scripts(name, max(count, stream.frames), seed, len(starts))
        real, states, before = _in_game(game, starts, stream.context, keys)
        keys = [first + after for first, after in zip(before, keys, strict=True)]
        made = streams.script(
            _prompts(starts),
            real[:, : 1 + FRAMES_PER_CONTROL * (stream.frames - 1)],
            np.stack([indices(one) for one in keys]),
            count,
            seed,
            bar(name),
        )
        found[name] = _drives(keys, real, made, states, stream.context)
    return found


def run_played(
    world, params, game, starts, seconds: int, seed: int, bar=None
) -> dict[str, ScriptedDrives]:
    """Runs all scripts as a player would: shift i gets key i, just before its frames are shown.

    Keys bind early, at the stream's `head_group`. The first window shows what the keys before the
    script lead to, so a key changes nothing until the frames that were bound before it have passed.
    The game obeys at once.

    Args: as for `run`.
    """
    bar = bar or (lambda name: lambda steps: steps)
    stream = world.cfg.stream
    streams, count = Streams(world, params, 'early'), _count(world, seconds)
    # The script begins behind the condition frames; the rest of the window is still to be shown.
    ahead = stream.frames - stream.context
    places = [dataclasses.replace(start, keys=start.keys[:-ahead]) for start in starts]
    clips, _, known = _in_game(game, starts, stream.frames, [[] for _ in starts])
    known = np.stack([indices(one[: stream.known_controls]) for one in known])
    found = {}
    for name in SCRIPTS:
        keys = _scripts(name, count, seed, len(starts))
        real, states, before = _in_game(game, places, stream.context, keys)
        pressed = np.stack([indices(one) for one in keys])
        made = streams.run(
            streams.start(_prompts(starts), clips, known, seed),
            lambda shift, _, pressed=pressed: pressed[:, shift : shift + 1],
            count,
            bar(f'{name}, played'),
        )
        keys = [first + after for first, after in zip(before, keys, strict=True)]
        found[name] = _drives(keys, real, made, states, stream.context)
    return found


def _count(world, seconds: int) -> int:
    return seconds * world.cfg.fps // FRAMES_PER_CONTROL


def _scripts(name: str, count: int, seed: int, streams: int) -> list[list[str]]:
    return [script(name, count, seed + index) for index in range(streams)]


def _prompts(starts) -> list[str]:
    return [driver.THEMES[start.theme].captions[0] for start in starts]


def _in_game(game, starts, shown: int, keys: list[list[str]]):
    """`play` of every start, odd ones mirrored -> (frames [B ...], telemetry [B ...], keys)."""
    frames, states, before = zip(
        *(
            play(game, start, shown, one, mirror=index % 2 == 1)
            for index, (start, one) in enumerate(zip(starts, keys, strict=True))
        ),
        strict=True,
    )
    return np.stack(frames), np.stack(states), list(before)


def _drives(keys, real, made, states, context: int) -> ScriptedDrives:
    """Streams and game behind the same context of latent frames, cut to the same length."""
    first = 1 + FRAMES_PER_CONTROL * (context - 1)
    length = first + made.shape[1]
    return ScriptedDrives(
        [one[: context + made.shape[1] // FRAMES_PER_CONTROL] for one in keys],
        real[:, :length],
        np.concatenate([real[:, :first], made], axis=1),
        states[:, :length],
        first,
    )
