"""Pseudo-actions for footage with known camera poses: poses -> keys and mouse.

Inverse dynamics of a walker: the mouse is the turn of the view, and keys follow from the movement
of the camera over the ground. The velocity that a game keeps without a key (`drag`) is subtracted
first in world coordinates, as a walker who turns slides sideways without pressing a key. Height is
ignored: stairs, lifts and falls press nothing, and the tilt of the camera does not matter.

Poses cannot reveal keys held against a wall, or keys released in the air, where nothing slows the
camera.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from matrix_jax.data.records import KEYS, MOUSE_RATE, POSE, Clip, RecordError, wrap

X, Y, YAW, PITCH = (POSE.index(name) for name in ('x', 'y', 'yaw', 'pitch'))
DIAGONAL = np.sin(np.pi / 8)  # eight directions of 45 degrees each
WAYS = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])  # (forward, left) of W S A D
FITS = 0.35  # share of pushes that a walker must explain; noise reaches 0.27, games 0.5 to 0.9
MOST = 1.9  # largest push in units of one key; two perpendicular keys make 1.4


@dataclass(frozen=True)
class Walker:
    """How keys move the camera.

    Attributes:
      speed: final speed under a held key, in units per second.
      drag: share of the velocity that remains after a frame without keys; 0 = stops at once.
      least: share of a key's push that counts as pressed.
      still: mouse movement below which the view did not turn.
      smooth: odd number of frames whose majority decides whether a key is pressed.
    """

    speed: float
    drag: float = 0.0
    least: float = 0.4
    still: float = 0.004
    smooth: int = 3

    def __post_init__(self):
        for name, low, high in (
            ('speed', 1e-9, np.inf),
            ('drag', 0, 0.99),
            ('least', 0, 1),
            ('still', 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f'walker.{name}: got {value:g}, expected {low:g} .. {high:g}')
        if self.smooth < 1 or self.smooth % 2 != 1:
            raise ValueError(f'walker.smooth: got {self.smooth}, expected an odd number')


def label(clip: Clip, walker: Walker | None) -> Clip:
    """The clip with keys and mouse that fit its poses; without a walker, the mouse alone.

    Raises:
      RecordError: the clip has no poses.
    """
    if not clip.knows('pose'):
        raise RecordError('clip.pose: is unknown, expected the camera of every frame')
    if walker is None:
        return replace(clip, mouse=mouse(clip.pose, clip.fps))
    return replace(
        clip,
        keyboard=keyboard(clip.pose, clip.fps, walker),
        mouse=mouse(clip.pose, clip.fps, walker.still),
    )


def mouse(poses, fps: float, still: float = 0.004) -> np.ndarray:
    """Mouse float32 [F 2], pitch (up) and yaw (right), of poses [F 6]; frame 0 copies frame 1."""
    turned = wrap(np.diff(np.asarray(poses, np.float64)[:, [PITCH, YAW]], axis=0)) * [1, -1]
    found = turned * fps / np.radians(MOUSE_RATE)
    return _from_second(np.where(np.abs(found) < still, 0, found)).astype(np.float32)


def keyboard(poses, fps: float, walker: Walker) -> np.ndarray:
    """Keys W S A D int8 [F 4] of poses [F 6]; frame 0 copies frame 1."""
    push = pushes(poses, fps, walker)
    size = np.hypot(*push.T)
    ways = push / np.maximum(size, 1e-9)[:, None] @ WAYS.T > DIAGONAL
    found = ways & (size > walker.least)[:, None]
    # A push above MOST is a collision; the keys before it are assumed to be still held.
    known = np.maximum.accumulate(np.where(size < MOST, np.arange(len(size)), 0))
    return _from_second(_majority(found[known], walker.smooth)).astype(np.int8)


def pushes(poses, fps: float, walker: Walker) -> np.ndarray:
    """Pushes forward and left float [F-1 2] of poses [F 6], in units of one key.

    The velocity before the first frame is unknown, so frame 1 copies frame 2.
    """
    over = ground(poses) * fps / walker.speed
    before = np.concatenate([over[:1], over[:-1]])
    push = turned(over - walker.drag * before, headings(poses)) / (1 - walker.drag)
    return np.concatenate([push[1:2], push[1:]]) if len(push) > 1 else push


def ground(poses) -> np.ndarray:
    """Movement over the ground from frame to frame, x and y float [F-1 2], of poses [F 6]."""
    return np.diff(np.asarray(poses, np.float64)[:, [X, Y]], axis=0)


def headings(poses) -> np.ndarray:
    """Yaws [F-1] of the frames of poses [F 6] after the first."""
    return np.asarray(poses, np.float64)[1:, YAW]


def turned(ways, yaw) -> np.ndarray:
    """Movements [N 2] over the ground as forward and left of a camera with `yaw` [N]."""
    x, y = ways.T
    return np.stack([x * np.cos(yaw) + y * np.sin(yaw), y * np.cos(yaw) - x * np.sin(yaw)], -1)


def calibrate(clips: Iterable[Clip], **fields) -> Walker:
    """Walker of a game, fitted to clips with known keys.

    Fits v' = drag v + push to frames with held keys, repeatedly leaving out frames with large
    errors, which walls cause.

    Args:
      clips: clips with keys and poses.
      fields: other attributes of the walker.

    Raises:
      ValueError: too few frames with held keys.
    """
    rows, wanted = [], []
    for clip in clips:
        over, yaw = ground(clip.pose) * clip.fps, headings(clip.pose)[1:]
        push = clip.keyboard[2:] @ WAYS
        held = (clip.keyboard[2:] == clip.keyboard[1:-1]).all(axis=1) & push.any(axis=1)
        kept, way = turned(over[:-1], yaw), turned(over[1:], yaw)
        rows.append(np.stack([kept, push], axis=-1)[held].reshape(-1, 2))
        wanted.append(way[held].reshape(-1))
    rows, wanted = np.concatenate(rows), np.concatenate(wanted)
    if len(wanted) < 16:
        raise ValueError(f'calibrate: got {len(wanted) // 2} frames of held keys, expected 8')
    best = np.ones(len(wanted), bool)
    for _ in range(20):
        (drag, push), *_ = np.linalg.lstsq(rows[best], wanted[best], rcond=None)
        error = np.abs(rows @ (drag, push) - wanted)
        best = error <= 2 * np.median(error) + 1e-6 * np.abs(wanted).max()
    drag = float(np.clip(drag, 0, 0.98))
    return Walker(speed=float(push) / (1 - drag), drag=drag, **fields)


def estimate(paths: Iterable[np.ndarray], fps: float, **fields) -> Walker | None:
    """Walker of unlabelled footage: speed and drag for which most pushes are of one or two keys.

    None if no walker fits, as when nobody walks.

    Args:
      paths: poses [F 6] of each clip.
      fps: frames per second.
      fields: other attributes of the walker.
    """
    ways = [ground(path) * fps for path in paths]
    before, after = (
        np.concatenate([way[part] for way in ways]) for part in (slice(None, -1), slice(1, None))
    )
    speeds = np.hypot(*after.T)
    speeds = speeds[speeds > 0.2 * speeds.max(initial=1e-9)]
    if not len(speeds):
        return None
    speeds = np.quantile(speeds, np.linspace(0.3, 1, 36))
    scores = {}
    for drag in np.arange(0, 0.96, 0.02):
        size = np.hypot(*(after - drag * before).T) / (1 - drag)
        for speed in speeds:
            one, pressed = size / speed, np.count_nonzero(size > 0.2 * speed)
            fits = np.minimum(np.abs(one - 1), np.abs(one - np.sqrt(2))) < 0.1
            scores[float(speed), float(drag)] = np.count_nonzero(fits) / max(pressed, 1)
    speed, drag = max(scores, key=scores.get)
    return Walker(speed=speed, drag=drag, **fields) if scores[speed, drag] > FITS else None


def blocked(poses, fps: float, keys, walker: Walker) -> np.ndarray:
    """Frames [F] whose movement the keys [F 4] do not explain: something blocks the way."""
    missing = pushes(poses, fps, walker) - np.asarray(keys)[1:] @ WAYS
    return _from_second(np.hypot(*missing.T) > 0.5)


def agreement(found, truth, where=None) -> dict[str, dict[str, float]]:
    """Accuracy, recall and precision of each key [F 4], and the share of frames with all correct.

    Args:
      found, truth: keys [F 4].
      where: frames to judge, bool [F]; None = all.
    """
    chosen = np.ones(len(truth), bool) if where is None else where
    found, truth = np.asarray(found)[chosen] > 0, np.asarray(truth)[chosen] > 0
    scores = {'all': {'accuracy': float((found == truth).all(axis=1).mean())}}
    for key, one, wanted in zip(KEYS, found.T, truth.T, strict=True):
        both = float((one & wanted).sum())
        scores[key] = {
            'accuracy': float((one == wanted).mean()),
            'recall': both / max(int(wanted.sum()), 1),
            'precision': both / max(int(one.sum()), 1),
        }
    return scores


def cameras(matrices, up=(0.0, -1.0, 0.0)) -> np.ndarray:
    """Camera-to-world matrices [F 4 4] -> poses float32 [F 6].

    Args:
      matrices: in the convention of structure from motion: z ahead, x right, y down.
      up: up direction of the world; the default assumes a level first camera.

    Raises:
      ValueError: another shape, or a first camera that looks straight up or down.
    """
    matrices = np.asarray(matrices, np.float64)
    if matrices.ndim != 3 or matrices.shape[1:] != (4, 4):
        raise ValueError(f'cameras: got {list(matrices.shape)}, expected [F 4 4]')
    up = np.asarray(up, np.float64) / np.linalg.norm(up)
    right, ahead = matrices[:, :3, 0], matrices[:, :3, 2]
    first = ahead[0] - (ahead[0] @ up) * up
    if np.linalg.norm(first) < 1e-3:
        raise ValueError('cameras: the first one looks straight up or down, expected a heading')
    x = first / np.linalg.norm(first)
    axes = np.stack([x, np.cross(up, x), up], axis=-1)
    place, ahead, right = matrices[:, :3, 3] @ axes, ahead @ axes, right @ axes
    yaw, pitch = np.arctan2(ahead[:, 1], ahead[:, 0]), np.arcsin(np.clip(ahead[:, 2], -1, 1))
    level = np.stack([np.sin(yaw), -np.cos(yaw), np.zeros_like(yaw)], -1)
    raised = np.cross(level, ahead)
    roll = np.arctan2(-(right * raised).sum(-1), (right * level).sum(-1))
    return np.column_stack([place, yaw, pitch, roll]).astype(np.float32)


def _from_second(values):
    """Prepends a copy of the first value: [F-1 ...] of frames 1 .. F-1 -> [F ...]."""
    if not len(values):
        raise ValueError('poses: got 1 frame, expected 2 or more')
    return np.concatenate([values[:1], values])


def _majority(flags, width: int) -> np.ndarray:
    """Majority of flags bool [N K] over `width` neighbouring frames."""
    half = width // 2
    padded = np.pad(flags, ((half, half), (0, 0)), 'edge')
    around = np.lib.stride_tricks.sliding_window_view(padded, width, axis=0)
    return around.sum(axis=-1) > half
