"""ViZDoom under the scripts of an evaluation, from the places where the streams begin."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence

import numpy as np

from matrix_jax.data import doom
from matrix_jax.data.doom_maps import THEMES, place
from matrix_jax.data.records import KEYS, Clip


def can_play(clips: Sequence[Clip]) -> bool:
    """Whether ViZDoom is installed and the clips are recordings of it with known poses."""
    installed = all(importlib.util.find_spec(name) for name in doom.NEEDS)
    return installed and all(clip.theme in THEMES and clip.knows('pose') for clip in clips)


def play(clips: Sequence[Clip], vectors) -> np.ndarray:
    """Frames uint8 [B F H W 3] of the game; frame 0 is that of the pose that a clip begins with.

    An episode that ends early repeats its last frame.

    Args:
      clips: recorded clips, see `can_play`.
      vectors: keys and mouse [B F 6] of each frame; those of frame 0 are not read.

    Raises:
      RuntimeError: the walker could not be put at the pose of a clip.
    """
    videos = []
    with contextlib.closing(doom.VizDoomGame()) as game:
        for clip, actions in zip(clips, vectors, strict=True):
            if not game.begin_at(place(clip.theme, clip.seed), clip.seed, clip.pose[0]):
                raise RuntimeError(
                    f'{clip.theme}, seed {clip.seed}: cannot stand at {clip.pose[0]}'
                )
            frames = [game.frame()]
            for action in actions[1:]:
                shown, _ = game.hold(action[: len(KEYS)], action[len(KEYS) :], frames=1)
                frames.append(shown[0] if len(shown) else frames[-1])
            videos.append(np.stack(frames))
    return np.stack(videos)
