"""A page that asks a person which of two clips is generated.

Each pair shows recorded frames after the autoencoder, and a stream with the same start and the same
controls, in random order. Somebody who cannot tell them apart is right in half of the pairs.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.evals.video import Streams, bar, reconstruct, spread

TOGETHER = 4  # streams of one batch


@dataclasses.dataclass(frozen=True)
class Pair:
    """One question: uint8 frames [F H W 3] of both clips, and where the generated one is shown."""

    recorded: np.ndarray
    generated: np.ndarray
    generated_is_left: bool


def pairs(
    world, params, evaluator, clips: Sequence, count: int, seconds: float, seed: int
) -> list[Pair]:
    """Returns `count` pairs from evenly spaced clips.

    Args:
      world, params: from `worlds.open_run`.
      evaluator: module with `shape` and `recorded_controls`, see `evals.report`.
      clips: held-out clips.
      count: number of pairs.
      seconds: length of each clip.
      seed: seed of the order and of the noise.

    Raises:
      UsageError: there are fewer clips than pairs, or they are too short.
    """
    if len(clips) < count:
        raise UsageError(f'--blind: got {count}, expected at most the {len(clips)} held-out clips')
    context, group = evaluator.shape(world)
    per = world.vocabulary.frames_per_control
    frames = math.ceil(seconds * world.cfg.fps)
    controls = world.round_up_controls(math.ceil(frames / per))
    # Whole encoder chunks of 8 frames, and more than the start shows.
    needed = 1 + 8 * math.ceil((world.start_frames + controls * per) / 8)
    streams, order = Streams(world, params), np.random.default_rng(seed)
    chosen = [clips[index] for index in spread(clips, count)]
    shortest = min(len(clip.frames) for clip in chosen)
    if shortest < needed:
        raise UsageError(
            f'--data: got held-out clips of {shortest} frames, expected at least {needed} for '
            f'{seconds} seconds'
        )
    found = []
    for first in bar('pairs')(range(0, count, TOGETHER)):
        batch = chosen[first : first + TOGETHER]
        batch += batch[-1:] * (TOGETHER - len(batch))  # the same batch size compiles once
        recorded = np.stack([clip.frames[:needed] for clip in batch])
        true = reconstruct(world, params, recorded, context, group)[:, :frames]
        made = streams.follow(
            recorded[:, : world.start_frames],
            [evaluator.recorded_controls(world, clip, controls) for clip in batch],
            seed + first,
            prompts=[clip.caption for clip in batch],
        )
        made = made[:, made.shape[1] - controls * per :][:, :frames]
        found += [
            Pair(real, ours, bool(order.random() < 0.5))
            for real, ours in zip(true, made, strict=True)
        ]
    return found[:count]


def page(name: str, shown: Sequence[Pair], fps: float) -> str:
    """Returns one HTML file with all clips in it, which counts the answers.

    Args:
      name: name of the world.
      shown: from `pairs`.
      fps: frames per second.
    """
    questions = [
        {
            'clips': [
                _data_url(frames, fps)
                for frames in (
                    (pair.generated, pair.recorded)
                    if pair.generated_is_left
                    else (pair.recorded, pair.generated)
                )
            ],
            'generated': 0 if pair.generated_is_left else 1,
        }
        for pair in shown
    ]
    template = (Path(__file__).parent / 'blind.html').read_text(encoding='utf-8')
    return template.replace('WORLD', name).replace('QUESTIONS', json.dumps(questions))


def _data_url(frames: np.ndarray, fps: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'clip.mp4'
        video.write_video(path, frames, fps=fps)
        return 'data:video/mp4;base64,' + base64.b64encode(path.read_bytes()).decode()
