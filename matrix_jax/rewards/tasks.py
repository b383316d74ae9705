"""What a reward network reads from frames, and the reward and the end that follow from it.

    on_road     driving: the share of wheels on the road, times the speed; off the road it ends
    landmark    walking: how much nearer the walker came to a picture or a pillar; there it ends

A network has one output in [0, 1] for each of a task's `outputs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.data import gallery
from matrix_jax.data.carracing import TOP_SPEED
from matrix_jax.data.records import TELEMETRY, wrap

OFF_ROAD = 0.25  # a smaller share of wheels on the road counts as off the road
OFF_STEPS = 2  # steps in a row off the road after which an episode ends
# A landmark straight ahead counts as 1 from the first distance on, and as 0 from the second; it
# counts less with the angle to the view, and as 0 from `VIEW` on. Map units, radians.
NEAR, FAR = 160.0, 640.0
VIEW = np.deg2rad(45)
REACHED = 0.75  # what a landmark that is reached counts at least


class Task(NamedTuple):
    """A task; `init` and `step` are pure and have no batch.

    Attributes:
      outputs: names of the outputs K of the network.
      truth: `(seed of the clip, telemetry [6], pose [6] or None) -> outputs [K]` of a frame.
      init: `values [K] -> state`, at the start of an episode.
      step: `(state, values [K]) -> (state, reward [], terminated [])`.
      scores: `(values [N K], truth [N K]) -> name -> score`.
    """

    outputs: tuple[str, ...]
    truth: Callable[[int, np.ndarray, np.ndarray | None], np.ndarray]
    init: Callable[[jax.Array], Any]
    step: Callable[[Any, jax.Array], tuple[Any, jax.Array, jax.Array]]
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]]


# --- driving -------------------------------------------------------------------------------------


def _road_truth(seed: int, telemetry: np.ndarray, pose: np.ndarray | None) -> np.ndarray:
    on_road, speed = (telemetry[TELEMETRY.index(name)] for name in ('on_road', 'speed'))
    if not np.isfinite(on_road + speed):
        raise UsageError('--data: got a clip without telemetry, expected on_road and speed')
    return np.array([on_road, np.clip(speed / TOP_SPEED, 0, 1)], np.float32)


def _road_init(values: jax.Array) -> jax.Array:
    """Steps in a row off the road, int32 []."""
    return jnp.zeros((), jnp.int32)


def _road_step(state: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    on_road, speed = values
    state = jnp.where(on_road < OFF_ROAD, state + 1, 0)
    return state, on_road * speed, state >= OFF_STEPS


def _road_scores(values: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    seen, real = (each[:, 0] < OFF_ROAD for each in (values, truth))
    return {
        **_detection('off_road', seen, real),
        'on_road_error': float(np.abs(values - truth)[:, 0].mean()),
        'speed_error': float(TOP_SPEED * np.abs(values - truth)[:, 1].mean()),
    }


# --- walking -------------------------------------------------------------------------------------


def landmark_nearness(layout: gallery.GalleryLayout, pose: np.ndarray) -> float:
    """How near and how straight ahead a landmark of the walker's room is, from 0 to 1.

    Args:
      layout: the gallery.
      pose: pose of the camera [6].
    """
    x, y, yaw = float(pose[0]), float(pose[1]), float(pose[3])
    number = layout.room_at(x, y)
    if number is None:
        return 0.0
    pillar = layout.rooms[number].pillar
    found = [0.0]
    for place in [layout.picture(number)[0], *([np.array(pillar)] if pillar else [])]:
        away = place - (x, y)
        angle = abs(float(wrap(np.arctan2(away[1], away[0]) - yaw)))
        distance = np.clip((FAR - np.hypot(*away)) / (FAR - NEAR), 0, 1)
        found.append(float(distance * max(0.0, 1 - angle / VIEW)))
    return max(found)


def _landmark_truth(seed: int, telemetry: np.ndarray, pose: np.ndarray | None) -> np.ndarray:
    if pose is None or not np.isfinite(pose).all():
        raise UsageError('--data: got a clip without poses, expected clips of galleries')
    return np.array([landmark_nearness(gallery.layout(seed), pose)], np.float32)


def _landmark_init(values: jax.Array) -> jax.Array:
    """Nearness of the step before, float32 []."""
    return values[0]


def _landmark_step(state: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    nearness = values[0]
    reached = nearness >= REACHED
    return nearness, nearness - state + reached, reached


def _landmark_scores(values: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {
        **_detection('reached', *(each[:, 0] >= REACHED for each in (values, truth))),
        'nearness_error': float(np.abs(values - truth)[:, 0].mean()),
    }


TASKS = {
    'on_road': Task(
        ('on_road', 'speed'), _road_truth, _road_init, _road_step, _road_scores
    ),
    'landmark': Task(
        ('nearness',), _landmark_truth, _landmark_init, _landmark_step, _landmark_scores
    ),
}  # fmt: skip


def _detection(name: str, seen: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Share of equal judgements, and of each kind of frame that is recognised; NaN without one."""

    def share(of: np.ndarray) -> float:
        return float((seen == real)[of].mean()) if of.any() else float('nan')

    return {
        f'{name}_accuracy': share(np.ones(len(real), bool)),
        f'{name}_recognised': share(real),
        f'not_{name}_recognised': share(~real),
    }
