"""Obedience of first-person worlds: a probe that reads keys and mouse from frames.

The probe trains on recorded clips with known keys and mouse. It then judges recordings of maps it
never saw, which is the ceiling, and generated clips. It reads four numbers per latent frame, each
odd or even under a mirror: yaw and pitch of the mouse, W minus S, and D minus A. Keys held against
a wall move nothing, so no probe can find them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np

from matrix_jax.data.records import KEYS, Clip
from matrix_jax.evals import control

AXES = {
    'yaw': {1: 'right', 0: 'none', -1: 'left'},
    'pitch': {1: 'up', 0: 'none', -1: 'down'},
    'ahead': {1: 'W', 0: 'none', -1: 'S'},
    'side': {1: 'D', 0: 'none', -1: 'A'},
}
STILL = 0.02  # mouse movement below which no turn is asked for
W, S, A, D = (KEYS.index(key) for key in 'WSAD')


@dataclasses.dataclass(frozen=True)
class Config(control.Config):
    """The probe of keyboard and mouse; `scale` follows AXES: a turning key, and a pressed key."""

    scale: tuple[float, ...] = (0.1, 0.1, 1.0, 1.0)
    steps: int = 2400
    parity: ClassVar[tuple[int, ...]] = (-1, 1, 1, -1)


def axes(keyboard, mouse) -> np.ndarray:
    """Movement along AXES float32 [F 4] that keys [F 4] and mouse [F 2] ask for."""
    keys = np.asarray(keyboard, np.float32)
    pitch, yaw = np.asarray(mouse, np.float32).T
    return np.stack([yaw, pitch, keys[:, W] - keys[:, S], keys[:, D] - keys[:, A]], axis=-1)


def examples(cfg: Config, clips: Iterable, skip: int = 0) -> control.Examples:
    """Windows of clips of (frames uint8 [F H W 3], axes [F 4]); see `control.examples`."""
    return control.examples(
        cfg, ((frames, asked, asked) for frames, asked in clips), skip, range(len(AXES))
    )


def recorded(clips: Iterable[Clip]):
    """(frames, axes) of the clips with known keys and mouse."""
    return (
        (clip.frames, axes(clip.keyboard, clip.mouse))
        for clip in clips
        if clip.knows('keyboard') and clip.knows('mouse')
    )


def sides(asked) -> np.ndarray:
    """Signs int [M 4] of axes [M 4]: 1, 0 or -1."""
    return (np.sign(asked) * (np.abs(asked) >= STILL)).astype(int)


def train(
    cfg: Config,
    data: control.Examples,
    windows: int = 3000,
    progress: Callable = lambda steps: steps,
):
    """Trains a probe -> (parameters, the threshold of each axis [4])."""
    params = control.train(cfg, data, progress)
    some = control.sample(data, windows)
    found = control.read(cfg, params, some) / cfg.scale
    return params, [
        control.threshold(*one) for one in zip(found.T, sides(some.controls).T, strict=True)
    ]


def obedience(cfg: Config, probe, data: control.Examples) -> dict[str, dict[str, float]]:
    """Scores of each axis: recall of its sides, that of chance (`shuffled`), and `slope`, movement
    seen per movement asked.

    Args:
      cfg: the probe's config.
      probe: from `train`.
      data: windows of real or generated frames with their actions.
    """
    params, limits = probe
    found, asked = control.read(cfg, params, data) / cfg.scale, data.controls / cfg.scale
    result = {}
    for index, (name, names) in enumerate(AXES.items()):
        side = sides(data.controls)[:, index]
        result[name] = control.score(found[:, index], side, limits[index], names)
        if side.any():
            result[name]['slope'] = float(
                found[:, index] @ asked[:, index] / (asked[:, index] @ asked[:, index])
            )
    return result
