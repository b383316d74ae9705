"""Streams under scripted keys, and the real game under the same keys from the same place.

Every other stream is seen in a mirror, game and keys with it: the tracks of this game bend to the
left more than to the right, and obedience to a side is not to depend on that.
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
      keys: per stream, a symbol per latent frame, those of the context first.
      real, made: uint8 [B F H W 3], F = 1 + 4 (T-1), the real context first in both.
      telemetry: of the real game [B F 6].
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
        # Gas moves the car: with each symbol once, it would stand still most of the time.
        for symbol in rng.permutation([*SYMBOLS, 'D', 'DL', 'DR']):
            keys += [str(symbol)] * int(rng.integers(4, 9))
    return keys[:count]


def mirrored(keys: list[str]) -> list[str]:
    """Symbols with left and right in each other's place."""
    return [SYMBOLS[MIRRORED[SYMBOLS.index(key)]] for key in keys]


def play(game, start, shown: int, keys: list[str], mirror: bool):
    """The game under keys, seen in a mirror or not.

    Args:
      shown: latent frames before the keys.

    Returns:
      (frames uint8 [F H W 3], telemetry [F 6], keys of the frames that were shown before).
    """
    frames, before, states = driver.begin(game, start, shown)
    more, after = driver.play(game, mirrored(keys) if mirror else keys)
    frames, states = np.concatenate([frames, more]), np.concatenate([states, after])
    if mirror:
        return frames[:, :, ::-1], states * MIRROR_SIGN, mirrored(before)
    return frames, states, before


def run(
    world, params, game, starts, seconds: int, seed: int, bar=None
) -> dict[str, ScriptedDrives]:
    """All scripts in the game and in the world.

    Args:
      bar: `bar(name)` wraps a range of steps, such as a `tqdm`.
    """
    bar = bar or (lambda name: lambda steps: steps)
    stream, per = world.cfg.stream, FRAMES_PER_CONTROL
    streams = Streams(world, params, 'tail')
    count = seconds * world.cfg.fps // per
    found = {}
    for name in SCRIPTS:
        new = [
            script(name, max(count, stream.frames), seed + index) for index in range(len(starts))
        ]
        played = [
            play(game, start, stream.context, keys, mirror=index % 2 == 1)
            for index, (start, keys) in enumerate(zip(starts, new, strict=True))
        ]
        real = np.stack([frames for frames, _, _ in played])
        keys = [before + after for (_, _, before), after in zip(played, new, strict=True)]
        prompts = [driver.THEMES[start.theme].captions[0] for start in starts]
        made = streams.script(
            prompts,
            real[:, : 1 + per * (stream.frames - 1)],
            np.stack([indices(one) for one in keys]),
            count,
            seed,
            bar(name),
        )
        context, length = real.shape[1] - per * len(new[0]), per * count
        real = real[:, : context + length]
        made = np.concatenate([real[:, :context], made], axis=1)
        states = np.stack([states for _, states, _ in played])[:, : context + length]
        found[name] = ScriptedDrives(
            [one[: stream.context + count] for one in keys], real, made, states, context
        )
    return found
