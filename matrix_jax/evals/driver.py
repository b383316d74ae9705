"""A driver that sees only frames, and a judge of where the car is: the closed loop of CarRacing.

All that is known of this game beyond its frames stands here: colours by theme, where the car is
drawn, the scale of the picture, and how fast keys move and turn the car.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import numpy as np

from matrix_jax.data import carracing
from matrix_jax.data.carracing import FPS, FRAMES_PER_LATENT, HEIGHT, THEMES, TOP_SPEED, WIDTH

CAR = (51, 48)  # row and column of the car's centre
SCALE = 1.556  # pixels per unit
CAR_BOX = (slice(47, 56), slice(45, 52))
RING = (slice(44, 59), slice(43, 54))  # around the car; the car itself is cut out
RED, BLACK, WHITE = (204, 0, 0), (0, 0, 0), (255, 255, 255)
THEME_NAMES = tuple(THEMES)


# --- the judge -------------------------------------------------------------------------------


def palette(theme: str) -> np.ndarray:
    """float32 [6 3]: road, ground, patch, and the red, black and white of car and kerbs."""
    colors = THEMES[theme]
    return np.array([colors.road, colors.ground, colors.patch, RED, BLACK, WHITE], np.float32)


def classes(frames, theme: str) -> np.ndarray:
    """Pixels uint8 [... 3] -> index of the nearest colour of `palette` [...]."""
    colors = palette(theme)
    # |x - c|^2 less |x|^2, which is the same for all colours.
    return np.argmin((colors**2).sum(-1) - 2 * (frames.astype(np.float32) @ colors.T), axis=-1)


def road(frames, theme: str) -> np.ndarray:
    """Frames uint8 [... H W 3] -> bool [... H W]: road, the car's own pixels as those around it."""
    mask = classes(frames, theme) == 0
    mask[..., CAR_BOX[0], CAR_BOX[1]] = (ring_share(frames, theme) > 0.5)[..., None, None]
    return mask


def ring_share(frames, theme: str) -> np.ndarray:
    """Frames uint8 [... H W 3] -> share of road in the ring around the car [...]."""
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[RING] = True
    inside[CAR_BOX] = False
    return (classes(frames[..., inside, :], theme) == 0).mean(axis=-1)


def on_road(frames, theme: str, least: float = 0.35) -> np.ndarray:
    """Frames uint8 [... H W 3] -> bool [...]: the car is on the road, by the pixels around it."""
    return ring_share(frames, theme) >= least


def road_area(frames, theme: str) -> np.ndarray:
    """Frames uint8 [... H W 3] -> share of the picture that is road [...]."""
    return road(frames, theme).mean(axis=(-2, -1))


def car_seen(frames, least: float = 5) -> np.ndarray:
    """Frames uint8 [... H W 3] -> bool [...]: the red of a car where the car has to be."""
    red = frames.astype(np.int16)[..., CAR_BOX[0], CAR_BOX[1], :]
    red = (red[..., 0] > 90) & (red[..., 0] > 2 * red[..., 1]) & (red[..., 0] > 2 * red[..., 2])
    return red.sum(axis=(-2, -1)) >= least


def measures(theme: str) -> dict:
    """What `drift.seconds` measures besides: road (share of the picture), car (share of frames that
    show it) and palette (share of pixels near the theme's colours)."""
    return {
        'road': partial(road_area, theme=theme),
        'car': car_seen,
        'palette': partial(palette_match, theme=theme),
    }


def palette_match(frames, theme: str, near: float = 40.0) -> np.ndarray:
    """Frames uint8 [... H W 3] -> share of pixels near road, ground or patch colour [...]."""
    colors, pixels = palette(theme)[:3], frames.astype(np.float32)
    apart = (pixels**2).sum(-1) + ((colors**2).sum(-1) - 2 * pixels @ colors.T).min(-1)
    return (apart < near**2).mean(axis=(-2, -1))


# --- the driver ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The frame-only driver.

    Attributes:
      lag: latent frames between the choice of a key and the first frames that it moves; 0 in the
        game, more in a stream whose window holds keys that are already given.
      cruise: speed that it keeps, units/s.
      holds: key holds of a plan beyond the lag.
      change: cost of each change of the steering key.
    """

    lag: int = 0
    cruise: float = 20.0
    holds: int = 3
    change: float = 0.05


class FrameDriver:
    """Presses one key per latent frame, from the last frame and the keys it pressed before.

    It finds the road by colour, rolls the car forward under the keys that are on their way, tries
    all plans of the next holds, and takes the first key of the plan that stays on the road best.
    """

    def __init__(self, cfg: Config, theme: str, given: list[str], speed: float = TOP_SPEED):
        """
        Args:
          theme: whose colours to look for.
          given: the keys on their way, oldest first; `cfg.lag` of them.
          speed: units/s now.
        """
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
        # The road bends more than a plan at this speed can follow: less speed, tighter turns.
        target = self.cfg.cruise * (0.7 if cost > 0.5 else 1.0)
        pedal = 'D' if speed < target - 1 else 'B' if speed > target + 6 else 'N'
        symbol = pedal + {1: 'L', 0: '', -1: 'R'}[steer]
        self.given.append(symbol)
        self.speed = advance(self.speed, self.given.pop(0))
        return symbol

    def _plan(self, mask):
        """(first steering of the best plan, its mean cost) on a road mask [H W]."""
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
    """1 left, 0 none, -1 right."""
    return ('L' in symbol) - ('R' in symbol)


def advance(speed: float, symbol: str) -> float:
    """Speed after a hold of a quarter second, as measured in the game."""
    if symbol[0] == 'D':
        return speed + min(10.4, 0.7 * (TOP_SPEED - speed))
    return max(speed - {'N': 0.95, 'B': 4.6}[symbol[0]], 0.0)


def paths(plans, speed: float) -> np.ndarray:
    """Where the car goes: steering [P K] held K times at a speed -> [P 2K 2], row and column.

    The picture is the driver's view now: the car at `CAR`, ahead is up. Two points per hold.
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
    """Mean cost of points [P K 2] on a road mask [H W]: 0 in the middle of the road, 1 at its edge.

    Points outside the picture count as the nearest ones at its border. Cost grows with the distance
    to the road, so that a car on the grass finds back.
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
    """Mean of a mask [H W] over squares of 2 radius + 1; the border continues outward."""
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
    """A place on a held-out track, and how the game came there; `begin` goes there again.

    Attributes:
      seed, theme, place: of the track, the colours, the share of the lap.
      keys: what the driver with the truth pressed until here; the last ones are drawn.
    """

    seed: int
    theme: str
    place: float
    keys: tuple[str, ...]


def starts(game, count: int, holds: int, seed: int = 0) -> list[DriveStart]:
    """`count` starts on held-out tracks (odd seeds), themes in turn, the car rolling on the road.

    Args:
      holds: key holds before the start.
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
    """Plays a start again -> (frames uint8 [F H W 3] of the last `shown` latent frames, F = 1 + 4k;
    their keys; telemetry [F 6])."""
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
    """Drives the real game -> (frames uint8 [F H W 3], telemetry [F 6], keys pressed).

    Args:
      cfg: of the driver; its `lag` delays the keys in the game as the window of a stream does, and
        the last `lag` keys of the start are those on their way.
      key: hold this key in place of driving.
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
    """Of a drive uint8 [F H W 3]: seconds on the road, and seconds until it was left for 3 s."""
    on = on_road(frames, theme)
    span = 3 * FPS
    seen = np.convolve(on, np.ones(span), 'valid') if len(on) >= span else np.ones(1)
    lost = np.flatnonzero(seen < 0.5)
    first = (lost[0] if len(lost) else len(on)) / FPS
    return {'seconds_on_road': float(on.sum() / FPS), 'seconds_until_lost': float(first)}
