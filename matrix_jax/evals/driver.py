"""A driver that sees only frames of CarRacing, and a detector of where the car is.

This module holds all that they know of the game: the colours of each theme, where the car is drawn,
the scale of the picture, and how keys accelerate and turn the car.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import numpy as np

from matrix_jax.data import carracing
from matrix_jax.data.carracing import FPS, FRAMES_PER_LATENT, HEIGHT, THEMES, TOP_SPEED, WIDTH
from matrix_jax.evals import drift

CAR = (51, 48)  # row and column of the car's centre
SCALE = 1.556  # pixels per unit
CAR_BOX = (slice(47, 56), slice(45, 52))
RING = (slice(44, 59), slice(43, 54))  # around the car, which is cut out
ABOVE_CAR = 44  # rows of the picture
RED, BLACK, WHITE = (204, 0, 0), (0, 0, 0), (255, 255, 255)
THEME_NAMES = tuple(THEMES)


# --- where the car is ------------------------------------------------------------------------


def palette(theme: str) -> np.ndarray:
    """Colours float32 [6 3]: road, ground, patch, and red, black and white of car and kerbs."""
    colors = THEMES[theme]
    return np.array([colors.road, colors.ground, colors.patch, RED, BLACK, WHITE], np.float32)


def classes(frames, theme: str) -> np.ndarray:
    """Index of the nearest colour of `palette` [...] for pixels uint8 [... 3]."""
    colors = palette(theme)
    # |x - c|^2 without |x|^2, which is the same for all colours.
    return np.argmin((colors**2).sum(-1) - 2 * (frames.astype(np.float32) @ colors.T), axis=-1)


def road(frames, theme: str) -> np.ndarray:
    """Road mask [... H W] of frames uint8 [... H W 3]; the car's pixels are as those around it."""
    mask = classes(frames, theme) == 0
    mask[..., CAR_BOX[0], CAR_BOX[1]] = (ring_share(frames, theme) > 0.5)[..., None, None]
    return mask


def ring_share(frames, theme: str) -> np.ndarray:
    """Share of road [...] in the ring around the car, of frames uint8 [... H W 3]."""
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[RING] = True
    inside[CAR_BOX] = False
    return (classes(frames[..., inside, :], theme) == 0).mean(axis=-1)


def on_road(frames, theme: str, least: float = 0.35) -> np.ndarray:
    """Whether the car is on the road [...], from the pixels around it."""
    return ring_share(frames, theme) >= least


def road_area(frames, theme: str) -> np.ndarray:
    """Share of the picture that is road [...], of frames uint8 [... H W 3]."""
    return road(frames, theme).mean(axis=(-2, -1))


def car_seen(frames, least: float = 5) -> np.ndarray:
    """Whether the place of the car is red [...], of frames uint8 [... H W 3]."""
    red = frames.astype(np.int16)[..., CAR_BOX[0], CAR_BOX[1], :]
    red = (red[..., 0] > 90) & (red[..., 0] > 2 * red[..., 1]) & (red[..., 0] > 2 * red[..., 2])
    return red.sum(axis=(-2, -1)) >= least


def measures(theme: str) -> dict:
    """Measures for `drift.seconds`: road (share of the picture), car (share of frames with it),
    palette (share of pixels near the theme's colours) and motion (pixels per frame, downwards)."""
    return {
        'motion': partial(drift.ground_motion, rows=ABOVE_CAR),
        'road': partial(road_area, theme=theme),
        'car': car_seen,
        'palette': partial(palette_match, theme=theme),
    }


def palette_match(frames, theme: str, near: float = 40.0) -> np.ndarray:
    """Share of pixels near the road, ground or patch colour [...], of frames uint8 [... H W 3]."""
    colors, pixels = palette(theme)[:3], frames.astype(np.float32)
    apart = (pixels**2).sum(-1) + ((colors**2).sum(-1) - 2 * pixels @ colors.T).min(-1)
    return (apart < near**2).mean(axis=(-2, -1))


# --- the driver ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the frame-only driver.

    Attributes:
      lag: latent frames between the choice of a key and the first frame it affects; 0 in the game,
        more in a stream whose window holds earlier keys.
      cruise: target speed in units/s.
      holds: key holds of a plan beyond the lag.
      change: cost of each change of the steering key.
    """

    lag: int = 0
    cruise: float = 20.0
    holds: int = 3
    change: float = 0.05


class FrameDriver:
    """Chooses one key per latent frame from the newest frame and its earlier keys.

    Finds the road by colour, moves the car forward under the keys that have not shown yet, tries
    all plans of the next holds, and returns the first key of the plan that stays on the road best.

    Args:
      cfg: settings.
      theme: theme whose colours to look for.
      given: the `cfg.lag` keys that have not shown yet, oldest first.
      speed: current speed in units/s.

    Raises:
      ValueError: the number of keys is not the lag.
    """

    def __init__(self, cfg: Config, theme: str, given: list[str], speed: float = TOP_SPEED):
        if len(given) != cfg.lag:
            raise ValueError(f'driver.given: got {len(given)} keys, expected lag = {cfg.lag}')
        self.cfg, self.theme, self.given, self.speed = cfg, theme, list(given), speed
        self.plans = np.array(list(itertools.product((0, 1, -1), repeat=cfg.holds)))

    def key(self, frame) -> str:
        """The next key, from the newest frame uint8 [H W 3]."""
        mask = road(frame, self.theme)
        steer, cost = self._plan(mask)
        speed = self.speed
        for symbol in self.given:
            speed = advance(speed, symbol)
        # No plan stays on the road: slow down for tighter turns.
        target = self.cfg.cruise * (0.7 if cost > 0.5 else 1.0)
        pedal = 'D' if speed < target - 1 else 'B' if speed > target + 6 else 'N'
        symbol = pedal + {1: 'L', 0: '', -1: 'R'}[steer]
        self.given.append(symbol)
        self.speed = advance(self.speed, self.given.pop(0))
        return symbol

    def _plan(self, mask):
        """(first steering, mean cost) of the best plan on a road mask [H W]."""
        given = [steering(symbol) for symbol in self.given]
        plans = np.concatenate(
            [np.broadcast_to(given, (len(self.plans), len(given))), self.plans], axis=1
        )
        points = paths(plans, self.speed)[:, 2 * len(given) :]
        cost = off_road(mask, points)
        change = np.abs(np.diff(plans[:, max(len(given) - 1, 0) :], axis=1)).sum(axis=1)
        total = cost + self.cfg.change * (change + 0.5 * np.abs(self.plans).mean(axis=1))
        best = int(np.argmin(total))
        return int(self.plans[best, 0]), float(cost[best])


def steering(symbol: str) -> int:
    """Steering of a symbol: 1 left, 0 none, -1 right."""
    return ('L' in symbol) - ('R' in symbol)


def advance(speed: float, symbol: str) -> float:
    """Speed after a symbol is held for a quarter second, as measured in the game."""
    if symbol[0] == 'D':
        return speed + min(10.4, 0.7 * (TOP_SPEED - speed))
    return max(speed - {'N': 0.95, 'B': 4.6}[symbol[0]], 0.0)


def paths(plans, speed: float) -> np.ndarray:
    """Path of the car (row, column) [P 2K 2] in the current picture, two points per hold.

    Args:
      plans: steering [P K] of K holds.
      speed: units/s.
    """
    speed = max(speed, 6.0)
    rate = min(carracing.TURN_RATE, speed * carracing.STEER_LIMIT / carracing.WHEELBASE)
    half = FRAMES_PER_LATENT / FPS / 2
    turns = np.repeat(plans, 2, axis=1) * rate * half
    heading = np.cumsum(turns, axis=1) - turns / 2
    step = speed * half * SCALE
    rows = CAR[0] - np.cumsum(np.cos(heading) * step, axis=1)
    columns = CAR[1] - np.cumsum(np.sin(heading) * step, axis=1)
    return np.stack([rows, columns], axis=-1)


def off_road(mask, points) -> np.ndarray:
    """Mean cost [P] of points [P K 2] on a road mask [H W]: 0 in the middle of the road, 1 at its
    edge, more with the distance from the road. Points outside the picture are moved to its border.
    """
    limit = np.array(mask.shape) - 1
    points = np.clip(points, 0, limit)
    where = np.argwhere(mask)[::5]
    if not len(where):
        return np.zeros(len(points))
    offsets = points.reshape(-1, 1, 2).astype(np.float32) - where.astype(np.float32)
    apart = np.sqrt((offsets**2).sum(-1).min(axis=-1)).reshape(points.shape[:2])
    row, column = np.round(points).astype(int).transpose(2, 0, 1)
    near = np.minimum(blur(mask, 6)[row, column], 0.5)
    wide = blur(mask, 8)[row, column]
    return (1 - 2 * near + 0.3 * (1 - wide) + np.maximum(apart - 2, 0) / 6).mean(axis=1)


def blur(mask, radius: int) -> np.ndarray:
    """Mean of a mask [H W] over squares of 2 radius + 1 pixels, with repeated borders."""
    size = 2 * radius + 1
    total = np.pad(mask.astype(np.float32), radius, mode='edge').cumsum(0).cumsum(1)
    total = np.pad(total, ((1, 0), (1, 0)))
    height, width = mask.shape
    return (
        total[size : size + height, size : size + width]
        - total[:height, size : size + width]
        - total[size : size + height, :width]
        + total[:height, :width]
    ) / size**2


# --- the real game ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DriveStart:
    """A place on a held-out track and the keys that lead to it; `begin` replays them.

    Attributes:
      seed: seed of the track.
      theme: its colours.
      place: where the car starts, as a share of the lap.
      keys: keys pressed from there on by the driver that knows the track.
    """

    seed: int
    theme: str
    place: float
    keys: tuple[str, ...]


def starts(game, count: int, holds: int, seed: int = 0) -> list[DriveStart]:
    """`count` starts on held-out tracks (odd seeds), themes in turn, with the car in motion.

    Args:
      game: a `carracing.CarRacingGame`.
      holds: key holds before the start.
      seed: seed of tracks and places.
    """
    rng, found = np.random.default_rng(seed), []
    for index in range(count):
        theme = THEME_NAMES[index % len(THEME_NAMES)]
        place, track = float(rng.random()), 100001 + 2 * (index + 1000 * seed)
        game.reset(track, theme, place)
        driver, keys = carracing.Driver(game, rng), []
        for _ in range(holds):
            keys.append(driver.key(follow=True))
            game.hold(keys[-1], draw=False)
        found.append(DriveStart(track, theme, place, tuple(keys)))
    return found


def begin(game, start: DriveStart, shown: int):
    """Replays a start.

    Returns:
      (frames uint8 [F H W 3] of the last `shown` latent frames, F = 1 + 4 (shown - 1); their keys;
      telemetry [F 6]).
    """
    game.reset(start.seed, start.theme, start.place)
    hidden = len(start.keys) - shown + 1
    for key in start.keys[:hidden]:
        game.hold(key, draw=False)
    frames, states = [game.frame()[None]], [np.array([game.telemetry()], np.float32)]
    for key in start.keys[hidden:]:
        picture, state = game.hold(key)
        frames.append(picture)
        states.append(state)
    return np.concatenate(frames), list(start.keys[hidden - 1 :]), np.concatenate(states)


def play(game, keys):
    """Presses keys -> (frames uint8 [F H W 3], telemetry float32 [F 6])."""
    parts = [game.hold(key) for key in keys]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def drive_game(game, start: DriveStart, cfg: Config, holds: int, key: str | None = None):
    """Drives the real game -> (frames uint8 [F H W 3], telemetry [F 6], keys).

    Args:
      game, start: where to drive.
      cfg: settings of the driver. A `lag` delays its keys in the game as in a stream; the last
        `lag` keys of the start are then still to show.
      holds: number of key holds.
      key: key to hold instead of driving.
    """
    known = len(start.keys) - cfg.lag
    given = list(start.keys[known:])
    frames, _, states = begin(game, dataclasses.replace(start, keys=start.keys[:known]), 1)
    driver = FrameDriver(cfg, start.theme, given, float(states[-1, 2]))
    newest, pictures, telemetry, pressed = frames[-1], [], [], list(given)
    for index in range(holds):
        pressed.append(key or driver.key(newest))
        picture, state = game.hold(pressed[index])
        pictures.append(picture)
        telemetry.append(state)
        newest = picture[-1]
    return np.concatenate(pictures), np.concatenate(telemetry), pressed[:holds]


def judge(frames, theme: str) -> dict[str, float]:
    """Seconds on the road of a drive uint8 [F H W 3], and seconds until it leaves it for 3 s."""
    on = on_road(frames, theme)
    span = 3 * FPS
    seen = np.convolve(on, np.ones(span), 'valid') if len(on) >= span else np.ones(1)
    lost = np.flatnonzero(seen < 0.5)
    first = (lost[0] if len(lost) else len(on)) / FPS
    return {'seconds_on_road': float(on.sum() / FPS), 'seconds_until_lost': float(first)}
