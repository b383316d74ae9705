"""Recordings of CarRacing-v3: nine keys in, 16 frames per second out, and a driver.

The game is gymnasium's. Its physics run at 50 steps per second, 25 steps for 8 frames. Only kept
frames are drawn, with the game's geometry and final zoom, without status bar, skid marks and score,
at [64 96 3]. One key is held for the four frames of a latent frame, a quarter of a second.

The nine keys are the vocabulary of The Matrix. CarRacing has no reverse gear: `B` brakes. `N` lets
the engine drag the car slowly to a stop. Gas and steering are those of a keyboard game, with a top
speed and a steering angle that falls with speed, so that a held key turns at a steady rate and does
not spin the car.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from matrix_jax.data.records import CONTROLS, FRAMES_PER_LATENT, Clip, wrap

HEIGHT, WIDTH, FPS = 64, 96, 16
NEEDS = ('gymnasium', 'Box2D', 'pygame')
ABOUT = {}
TOP_SPEED = 32.0  # units/s; the road is 13 units wide, the picture shows 62 x 41 units
TURN_RATE = 1.6  # rad/s of a held steering key in motion
PHYSICS_RATE = 50
GAS, ENGINE_DRAG, BRAKE = 0.3, 0.012, 0.06
WHEELBASE, STEER_LIMIT = 3.24, 0.4
SUPERSAMPLE = 4  # frames are drawn larger by this factor and averaged
CAR_ROW = 0.8  # row of the car as a share of the height
LOST_DISTANCE, LOST_SECONDS = 25.0, 3.0
LEAVE_STRAIGHT, LEAVE_TURNING = (
    10.0,
    18.0,
)  # units off the centreline at which the driver stops playing about


class TrackTheme(NamedTuple):
    road: tuple[int, int, int]
    ground: tuple[int, int, int]
    patch: tuple[int, int, int]
    captions: tuple[str, ...]


THEMES = {
    'meadow': TrackTheme(
        (102, 102, 102),
        (102, 204, 102),
        (102, 230, 102),
        (
            'A red car drives on a grey road through a green meadow.',
            'A red racing car on a grey road, green grass on both sides, a sunny meadow.',
            'Driving a red car along a grey track in a green meadow, seen from above.',
        ),
    ),
    'snow': TrackTheme(
        (112, 120, 134),
        (226, 232, 240),
        (240, 245, 250),
        (
            'A red car drives on a blue-grey road through white snow at daylight.',
            'A red racing car on a slate grey road, white snow on both sides, a winter day.',
            'Driving a red car along a grey track in a white snowy field, seen from above.',
        ),
    ),
    'desert': TrackTheme(
        (96, 78, 66),
        (222, 184, 120),
        (232, 198, 138),
        (
            'A red car drives on a brown road through a yellow sand desert.',
            'A red racing car on a dark brown road, yellow sand on both sides, a hot desert.',
            'Driving a red car along a brown track in a sandy desert, seen from above.',
        ),
    ),
    'night': TrackTheme(
        (66, 68, 92),
        (16, 22, 46),
        (22, 30, 58),
        (
            'A red car drives on a grey road through dark blue land at night.',
            'A red racing car on a dim grey road, dark blue fields on both sides, at night.',
            'Driving a red car along a grey track in the dark of the night, seen from above.',
        ),
    ),
    'autumn': TrackTheme(
        (84, 80, 88),
        (196, 108, 40),
        (212, 126, 52),
        (
            'A red car drives on a dark grey road through orange autumn fields.',
            'A red racing car on a dark road, orange leaves on both sides, an autumn day.',
            'Driving a red car along a dark grey track in an orange autumn land, seen from above.',
        ),
    ),
}


class CarRacingGame:
    """One CarRacing-v3 world, headless: `reset` to a track and a place on it, then `hold` keys.

    `track` [P 3] is the centreline in driving order as (x, y, heading); heading 0 points to +y,
    left is positive.
    """

    def __init__(self):
        os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')
        os.environ.setdefault('PYGAME_HIDE_SUPPORT_PROMPT', '1')
        import pygame
        from gymnasium.envs.box2d import car_dynamics, car_racing

        self.pygame, self.car_class = pygame, car_dynamics.Car
        self.scale = car_racing.ZOOM * car_racing.SCALE * WIDTH * SUPERSAMPLE / car_racing.WINDOW_W
        size = car_racing.GRASS_DIM
        corners = np.array([(1, 0), (0, 0), (0, 1), (1, 1)])
        grid = [(x, y) for x in range(-20, 20, 2) for y in range(-20, 20, 2)]
        self.patches = size * (np.array(grid)[:, None] + corners)
        self.env = car_racing.CarRacing()
        # The environment would draw every physics step.
        self.env._render = lambda mode: None
        self.surface = pygame.Surface((WIDTH * SUPERSAMPLE, HEIGHT * SUPERSAMPLE))

    def close(self):
        self.env.close()

    def reset(self, seed: int, theme: str, start: float = 0.0, backwards: bool = False):
        """Starts a new track; the car stands at `start`, a share of the lap."""
        env = self.env
        self.colors = THEMES[theme]
        env.road_color = np.array(self.colors.road, dtype=float)
        env.reset(seed=seed)
        # Copied, as the game repaints visited tiles in place.
        self.roads = np.array([polygon for polygon, _ in env.road_poly])
        self.road_colors = [tuple(int(c) for c in color) for _, color in env.road_poly]
        track = np.array([(x, y, heading) for _, heading, x, y in env.track])
        if backwards:
            track = track[::-1] + [0, 0, np.pi]
        self.track = np.roll(track, -int(start * len(track)), axis=0)
        env.car.destroy()
        x, y, heading = self.track[0]
        env.car = self.car_class(env.world, heading, x, y)
        self.ticks = 0
        env.step(None)

    def hold(self, symbol: str, frames: int = FRAMES_PER_LATENT, draw: bool = True):
        """Holds one key -> (frames uint8 [F H W 3], telemetry float32 [F 6])."""
        pictures, states = [], []
        for _ in range(frames):
            before, self.ticks = self.ticks, self.ticks + 1
            for _ in range(self.ticks * PHYSICS_RATE // FPS - before * PHYSICS_RATE // FPS):
                self.env.step(self._pedals(symbol))
            states.append(self.telemetry())
            if draw:
                pictures.append(self.frame())
        return np.array(pictures, np.uint8), np.array(states, np.float32)

    def _pedals(self, symbol):
        speed = np.hypot(*self.env.car.hull.linearVelocity)
        angle = min(STEER_LIMIT, TURN_RATE * WHEELBASE / max(speed, 1.0))
        steer = angle * (symbol.endswith('R') - symbol.endswith('L'))
        gas = GAS * float(np.clip((TOP_SPEED - speed) / 4, 0, 1)) if symbol[0] == 'D' else 0.0
        return np.array([steer, gas, {'D': 0.0, 'N': ENGINE_DRAG, 'B': BRAKE}[symbol[0]]])

    def telemetry(self) -> tuple[float, ...]:
        """Telemetry of the car, in the order of `records.TELEMETRY`."""
        car = self.env.car
        wheels = sum(bool(wheel.tiles) for wheel in car.wheels) / len(car.wheels)
        x, y = car.hull.position
        return (
            wheels,
            car.hull.angularVelocity,
            float(np.hypot(*car.hull.linearVelocity)),
            x,
            y,
            car.hull.angle,
        )

    def frame(self) -> np.ndarray:
        """Current picture uint8 [H W 3]."""
        colors, draw = self.colors, self.pygame.draw.polygon
        self.surface.fill(colors.ground)
        for points in self._visible(self.patches)[0]:
            draw(self.surface, colors.patch, points)
        roads, shown = self._visible(self.roads)
        for points, index in zip(roads, shown):
            draw(self.surface, self.road_colors[index], points)
        for body in self.env.car.drawlist:
            color = tuple(int(255 * c) for c in body.color)
            for fixture in body.fixtures:
                corners = np.array([tuple(body.transform * v) for v in fixture.shape.vertices])
                draw(self.surface, color, self._project(corners))
        small = self.pygame.transform.smoothscale(self.surface, (WIDTH, HEIGHT))
        return np.ascontiguousarray(self.pygame.surfarray.array3d(small).swapaxes(0, 1))

    def _project(self, points):
        hull = self.env.car.hull
        s, c = np.sin(hull.angle), np.cos(hull.angle)
        offset = points - np.array(tuple(hull.position))
        across = (offset @ np.array([c, s])) * self.scale
        ahead = (offset @ np.array([-s, c])) * self.scale
        width, height = self.surface.get_size()
        return np.stack([width / 2 + across, height * CAR_ROW - ahead], axis=-1)

    def _visible(self, polygons):
        points = self._project(polygons)
        low, high = points.min(axis=1), points.max(axis=1)
        shown = np.flatnonzero(
            (high >= 0).all(axis=1) & (low <= self.surface.get_size()).all(axis=1)
        )
        return points[shown].tolist(), shown


class Driver:
    """Chooses one key per latent frame, with the track in view; half of the time it experiments.

    Follow: the best plan of the next three keys for a kinematic car, with the speed set by the
    curves ahead. Perturb: a random key for 0.5 to 2.5 s, then back to the road. Hold: one key for
    2 to 6 s, or a brake to a stop and a new start.
    """

    ODD_KEYS = dict(zip(CONTROLS, (0.06, 0.08, 0.08, 0.1, 0.18, 0.18, 0.08, 0.12, 0.12)))
    HELD_KEYS = dict(zip(CONTROLS, (0.3, 0.12, 0.12, 0.1, 0.06, 0.06, 0.08, 0.08, 0.08)))
    PLANS = np.stack(np.meshgrid(*[[0, 1, -1]] * 3, indexing='ij'), axis=-1).reshape(-1, 3)

    def __init__(self, game: CarRacingGame, rng: np.random.Generator):
        self.game, self.rng = game, rng
        self.pedal, self.steer = 'D', 0
        self.script = []  # keys still to press before following again
        self._follow_for(2.0, 5.0)

    def key(self, follow: bool = False) -> str:
        """Key for the next latent frame; with `follow`, the car always keeps to the road."""
        if follow or (self.left > 0 and not self.script):
            self.left -= not follow
            return self._follow()
        if not self.script:
            self.script = self._play()
            self._follow_for(3.0, 8.0)
        symbol = self.script.pop()
        if self.distance() > (LEAVE_TURNING if len(symbol) > 1 else LEAVE_STRAIGHT):
            self.script = []  # turn back before the road is out of sight
        self.pedal, self.steer = symbol[0], symbol.endswith('L') - symbol.endswith('R')
        return symbol

    def _follow_for(self, low, high):
        self.left = self._blocks(low, high)
        self.lane = self.rng.uniform(-3, 3)
        self.cruise = self.rng.choice([TOP_SPEED, self.rng.uniform(16, 30)], p=[0.7, 0.3])

    def _blocks(self, low, high):
        return int(round(self.rng.uniform(low, high) * FPS / FRAMES_PER_LATENT))

    def _pick(self, weights):
        p = np.array(list(weights.values()))
        return str(self.rng.choice(list(weights), p=p / p.sum()))

    def _play(self):
        if self.rng.random() < 0.55:
            return [self._pick(self.ODD_KEYS)] * self._blocks(0.5, 2.5)
        symbol = self._pick(self.HELD_KEYS)
        if symbol[0] != 'B':
            return [symbol] * self._blocks(2.0, 6.0)
        return ['D'] * self._blocks(0.5, 2.0) + [symbol] * self._blocks(
            1.5, 3.0
        )  # popped from the end

    def _follow(self):
        _, _, speed, x, y, heading = self.game.telemetry()
        track = self.game.track
        nearest = int(np.argmin(np.hypot(track[:, 0] - x, track[:, 1] - y)))
        ahead = track[(nearest + np.arange(1, 14)) % len(track), 2]
        bend = np.abs(wrap(np.diff(ahead))).reshape(-1, 3).mean(axis=1).max() / 3.5
        target = float(np.clip(0.75 * TURN_RATE / max(bend, 1e-3), 12.0, self.cruise))
        if speed > target + 6 or (self.pedal == 'B' and speed > target + 1):
            self.pedal = 'B'
        elif speed < target - (2 if self.pedal == 'N' else 0) or target >= TOP_SPEED - 1:
            self.pedal = 'D'
        else:
            self.pedal = 'N'
        self.steer = self._plan(x, y, heading, speed)
        return self.pedal + {1: 'L', 0: '', -1: 'R'}[self.steer]

    def _plan(self, x, y, heading, speed):
        """First steering of the best of 27 plans of three key holds."""
        track, hold = self.game.track, FRAMES_PER_LATENT / FPS
        speed = max(speed, 6.0)
        rate = min(TURN_RATE, speed * STEER_LIMIT / WHEELBASE)
        cost = 0.02 * np.abs(np.diff(self.PLANS, axis=1, prepend=self.steer)).sum(axis=1).astype(
            float
        )
        cost += 0.015 * np.abs(self.PLANS).sum(axis=1)
        px, py, ph = (np.full(len(self.PLANS), v, float) for v in (x, y, heading))
        for steer in self.PLANS.T:
            for _ in range(2):
                ph = ph + steer * rate * hold / 2
                px, py = px - np.sin(ph) * speed * hold / 2, py + np.cos(ph) * speed * hold / 2
            near = np.argmin(np.hypot(track[:, 0] - px[:, None], track[:, 1] - py[:, None]), axis=1)
            cx, cy, ch = track[near].T
            side = (
                (cx - px) * np.cos(ch) + (cy - py) * np.sin(ch) + self.lane
            )  # to the right of the car
            tx, ty, _ = track[(near + 3) % len(track)].T
            aim = np.arctan2(-(tx - px), ty - py)
            cost += (np.clip(side, -30, 30) / 7) ** 2 + 1.5 * wrap(aim - ph) ** 2
        return int(self.PLANS[int(np.argmin(cost)), 0])

    def distance(self) -> float:
        """Distance of the car from the centreline; past LOST_DISTANCE the road is out of view."""
        x, y = self.game.telemetry()[3:5]
        return float(np.hypot(self.game.track[:, 0] - x, self.game.track[:, 1] - y).min())


def record(
    game: CarRacingGame, seed: int, theme: str, frames: int, rng: np.random.Generator
) -> Clip:
    """Records an episode of up to `frames` = 1 + 4k frames on the track `seed`.

    It ends early if the car gets lost.
    """
    game.reset(seed, theme, start=rng.random(), backwards=bool(rng.random() < 0.5))
    driver = Driver(game, rng)
    caption = THEMES[theme].captions[int(rng.integers(len(THEMES[theme].captions)))]
    symbol = (
        'N' if rng.random() < 0.2 else 'D'
    )  # some episodes start at a standstill, the rest on the move
    for _ in range(4 if symbol == 'N' else 4 + int(rng.integers(8))):
        symbol = 'N' if symbol == 'N' else driver.key(follow=True)
        state = game.hold(symbol, draw=False)[1]
    pictures, keys, states = [game.frame()[None]], [symbol], [state[-1:]]
    away = 0
    for _ in range((frames - 1) // FRAMES_PER_LATENT):
        keys.append(driver.key())
        picture, state = game.hold(keys[-1])
        pictures.append(picture)
        states.append(state)
        away = away + 1 if driver.distance() > LOST_DISTANCE else 0
        if away * FRAMES_PER_LATENT > LOST_SECONDS * FPS:
            break
    index = np.array([CONTROLS.index(k) for k in keys], np.int8)
    controls = np.concatenate([index[:1], np.repeat(index[1:], FRAMES_PER_LATENT)])
    return Clip(
        frames=np.concatenate(pictures),
        controls=controls,
        caption=caption,
        theme=theme,
        seed=seed,
        fps=FPS,
        telemetry=np.concatenate(states),
    )


new_game = CarRacingGame  # what `collect` opens
