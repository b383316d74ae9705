"""Agent of gallery recordings: an `Explorer` that knows the map and follows plans.

A visitor walks through doorways to the rooms that it has visited least, walks sideways and
backwards, turns fully around, stands still, holds keys for seconds, even against a wall, and steps
back from walls. For worlds with memory it looks at a landmark (a picture or a pillar), turns away
or leaves the room for 2 to 10 seconds, and looks at the landmark again. Sometimes it chooses as
`Explorer` does. In all other plans it looks up or down for a moment every few seconds.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from matrix_jax.data.explorer import TURN, TURN_RADIANS, Explorer, Sight
from matrix_jax.data.gallery import DIRECTIONS, PILLAR_RADIUS, GalleryLayout
from matrix_jax.data.records import wrap

REACHED = 48.0  # map units within which a point counts as reached
DOOR_DISTANCE = 112.0  # map units of route points from the doorway
DETOUR = PILLAR_RADIUS + 56.0  # map units from the centre of a pillar on the way around it
AIM_TOLERANCE = 0.05  # radians from the aim that are not corrected
TURN_FIRST = 0.9  # radians from the aim above which the visitor turns before it walks
# Weights of plans, of what happens between two looks at a landmark, and of keys that are held.
PLANS = {
    'visit': 0.25,
    'revisit': 0.1,
    'stroll': 0.26,
    'wander': 0.07,
    'hold': 0.24,
    'spin': 0.02,
    'idle': 0.06,
}
PAUSES = {'still': 0.3, 'stroll': 0.45, 'leave': 0.25}
HELD_KEYS = {
    'W': 0.2,
    'S': 0.16,
    'A': 0.19,
    'D': 0.19,
    'WA': 0.05,
    'WD': 0.05,
    'SA': 0.04,
    'SD': 0.04,
    '': 0.08,
}
LEAST_SPEED = 0.06  # mouse of the slowest turn to a point or by an angle
SIDEWAYS = 0.4  # probability that a visit begins without a turn to the doorway
# Keys of the eight directions, from ahead to the left.
EIGHTHS = ('W', 'WA', 'A', 'SA', 'S', 'SD', 'D', 'WD')
# Keys, and the yaw of the mouse, right positive; None if `Explorer` has chosen.
Choice = tuple[str, float] | None


class Visitor(Explorer):
    """Chooses the actions of a recording in one gallery.

    Call `moved` once before the first `choose`.
    """

    def __init__(self, rng: np.random.Generator, gallery: GalleryLayout):
        super().__init__(rng)
        self.gallery, self.visits = gallery, Counter()
        self.sight: Sight  # set by `choose`, before any plan reads it
        self.choices, self.pitches = self._choices(), self._pitches()

    def choose(self, sight: Sight):
        """(int8 [4] W S A D, float32 [2] pitch and yaw) of the next latent frame."""
        self.sight = sight
        choice = next(self.choices)
        if choice is not None:
            self.keys, self.mouse = choice[0], (next(self.pitches), choice[1])
        return self.pressed()

    def moved(self, poses):
        """Observes the poses [4 6] of the latent frame that was played."""
        super().moved(poses)
        if (room := self.room) is not None:
            self.visits[room] += 1

    @property
    def position(self) -> np.ndarray:
        """Current position [2] in map units."""
        return self.last[:2].astype(float)

    @property
    def room(self) -> int | None:
        """Number of the current room; None in a passage."""
        return self.gallery.room_at(*self.position)

    def _choices(self) -> Iterator[Choice]:
        while True:
            yield from getattr(self, f'_{self._pick(PLANS)}')()

    # --- plans: each yields a choice per latent frame ---------------------------------------------

    def _visit(self) -> Iterator[Choice]:
        """Walks to a point in the room that was visited least."""
        if (here := self._room_or_next()) is None:
            return
        others = [number for number in range(len(self.gallery.rooms)) if number != here]
        least = min(self.visits[number] for number in others)
        goal = int(self.rng.choice([n for n in others if self.visits[n] == least]))
        route = self._route(here, goal)
        if self.rng.random() < SIDEWAYS:
            yield from self._strafe_to(route[0], self._blocks(1, 4))
        for point in route:
            if not (yield from self._walk_to(point)):
                return
        yield from self._walk_to(self._random_point(goal))

    def _revisit(self) -> Iterator[Choice]:
        """Looks at a landmark, turns away or leaves for some seconds, and looks at it again."""
        if (number := self.room) is None:
            yield from self._visit()
            return
        landmark = self._landmark(number)
        if self.rng.random() < 0.6:
            yield from self._walk_to(self._viewpoint(number, landmark))
        yield from self._face(landmark)
        yield from self._stay(0.5, 2.0)
        before = self.position
        seconds, kind = self.rng.uniform(2, 10), self._pick(PAUSES)
        if kind == 'leave':
            doors = list(self.gallery.doors(number).values())
            passage = self.gallery.passages[doors[int(self.rng.integers(len(doors)))]]
            other = passage.second if passage.first == number else passage.first
            for point in [*self._route(number, other), *self._route(other, number), before]:
                if not (yield from self._walk_to(point)):
                    return
        else:
            yield from self._turn(self._side() * self.rng.uniform(np.pi / 3, np.pi))
            yield from (
                self._stay(seconds, seconds) if kind == 'still' else self._walk_around(seconds)
            )
        yield from self._face(landmark)
        yield from self._stay(0.5, 1.5)

    def _stroll(self) -> Iterator[Choice]:
        """Walks around in the room."""
        yield from self._walk_around(self.rng.uniform(3, 9))

    def _wander(self) -> Iterator[Choice]:
        """Chooses as `Explorer` does."""
        self.left = 0
        for _ in range(self._blocks(3, 8)):
            super().choose(self.sight)
            yield None

    def _hold(self) -> Iterator[Choice]:
        """Holds one combination of keys and turn; steps back after a while at a wall."""
        keys = self._pick(HELD_KEYS)
        yaw = self._side() * self._speed() if not keys or self.rng.random() < 0.35 else 0.0
        limit, stuck = self._blocks(0.5, 3.0), 0
        for _ in range(self._blocks(2, 8)):
            yield keys, yaw
            stuck += self.stuck
            if stuck > limit:
                yield from self._step_back()
                return

    def _spin(self) -> Iterator[Choice]:
        """Turns fully around, sometimes twice."""
        side, speed = self._side(), max(LEAST_SPEED, self._speed())
        yield from self._turn(side * 2 * np.pi, speed)
        yield from self._stay(0.25, 1.0)
        if self.rng.random() < 0.3:
            yield from self._turn(self._side() * 2 * np.pi, speed)

    def _idle(self) -> Iterator[Choice]:
        """Stands still."""
        yield from self._stay(1.0, 6.0)

    def _pitches(self) -> Iterator[float]:
        """Yields the pitch of the mouse: level, and sometimes up or down."""
        while True:
            for _ in range(self._blocks(2, 10)):
                yield self.level()
            speed = float(self.rng.choice([0.04, TURN]))
            pitch = self._side() * speed
            for _ in range(1 if speed == TURN else int(self.rng.integers(1, 4))):
                yield pitch
            for _ in range(self._blocks(0.25, 1.5)):
                yield 0.0

    # --- parts of plans ---------------------------------------------------------------------------

    def _stay(self, low: float, high: float) -> Iterator[Choice]:
        """Stands still for `low` to `high` seconds."""
        for _ in range(max(1, self._blocks(low, high))):
            yield '', 0.0

    def _turn(self, angle: float, speed: float | None = None) -> Iterator[Choice]:
        """Turns by an angle in radians, left positive."""
        speed = speed or max(LEAST_SPEED, self._speed())
        amount = abs(angle) / TURN_RADIANS
        while amount > 1e-3:
            yield '', float(-np.sign(angle) * min(speed, amount))
            amount -= speed

    def _angle_to(self, point) -> float:
        """Angle in radians from the view to a point, left positive."""
        x, y = point - self.position
        return float(wrap(np.arctan2(y, x) - self.last[3]))

    def _yaw_for(self, angle: float, speed: float) -> float:
        """Mouse yaw that turns by an angle, at most `speed`; 0 within AIM_TOLERANCE."""
        if abs(angle) <= AIM_TOLERANCE:
            return 0.0
        return float(np.clip(-angle / TURN_RADIANS, -speed, speed))

    def _face(self, point) -> Iterator[Choice]:
        """Turns until a point is ahead."""
        speed = max(LEAST_SPEED, self._speed())
        for _ in range(60):
            angle = self._angle_to(point)
            if abs(angle) <= AIM_TOLERANCE:
                return
            yield '', self._yaw_for(angle, speed)

    def _walk_to(self, point) -> Generator[Choice, None, bool]:
        """Walks to a point of the current room or passage; returns whether it arrived."""
        speed, blocked = max(TURN, self._speed()), 0
        for goal in self._avoid_pillar(point):
            for _ in range(80):
                angle, distance = self._angle_to(goal), np.hypot(*(goal - self.position))
                # A near miss counts as reached, because turning back takes seconds.
                if distance < REACHED or distance < 2 * REACHED and abs(angle) > TURN_FIRST:
                    break
                straight = distance > 2 * REACHED and abs(angle) < 2 * AIM_TOLERANCE
                yield (
                    '' if abs(angle) > TURN_FIRST else 'W',
                    0.0 if straight else self._yaw_for(angle, speed),
                )
                blocked += self.stuck
                if blocked > 1:
                    yield from self._step_back()
                    return False
            else:
                return False
        return True

    def _step_back(self) -> Iterator[Choice]:
        """Steps back from a wall and turns to the side with more room."""
        keys = self._pick({'S': 0.6, 'SA': 0.2, 'SD': 0.2})
        for _ in range(self._blocks(0.5, 1.5)):
            yield keys, 0.0
        left, right = (self.sight.ahead[self.sight.bearing * side > 0].mean() for side in (1, -1))
        yield from self._turn((1 if left > right else -1) * self.rng.uniform(np.pi / 3, np.pi))

    def _walk_around(self, seconds: float) -> Iterator[Choice]:
        """Walks to random points of the room in any direction, mostly without turning."""
        left = self._blocks(seconds, seconds)
        while left > 0 and (number := self.room) is not None:
            yaw = self._side() * self.rng.uniform(0.02, 0.06) * (self.rng.random() < 0.3)
            left -= 1 + (
                yield from self._strafe_to(
                    self._random_point(number), max(2, min(left, self._blocks(1, 3))), yaw
                )
            )

    def _strafe_to(self, point, blocks: int, yaw: float = 0.0) -> Generator[Choice, None, int]:
        """Walks to a point without turning to it; returns the number of latent frames."""
        for used in range(blocks):
            if np.hypot(*(point - self.position)) < REACHED:
                return used
            yield self._keys_to(point), float(yaw)
            if self.stuck:
                yield '', 0.0
                return used + 2
        return blocks

    def _keys_to(self, point) -> str:
        """Keys whose direction is nearest to that of a point; prefers one key to two."""
        eighths = self._angle_to(point) / (np.pi / 4)
        single = round(eighths / 2) * 2
        return EIGHTHS[(single if abs(eighths - single) < 0.7 else round(eighths)) % 8]

    # --- places -----------------------------------------------------------------------------------

    def _room_or_next(self) -> int | None:
        """Number of the current room, or of a room at the current passage."""
        if (number := self.room) is not None:
            return number
        for passage in self.gallery.passages:
            if passage.box.contains(*self.position):
                return passage.first if self.rng.random() < 0.5 else passage.second
        return None

    def _route(self, start: int, goal: int) -> list[np.ndarray]:
        """Points before and behind each doorway on the shortest route between two rooms."""
        before: dict[int, Any] = {start: None}  # room -> (room, side, passage) that leads to it
        queue = deque([start])
        while queue:
            number = queue.popleft()
            for side, index in self.gallery.doors(number).items():
                passage = self.gallery.passages[index]
                other = passage.second if passage.first == number else passage.first
                if other not in before:
                    before[other] = number, side, passage
                    queue.append(other)
        points = []
        while (step := before[goal]) is not None:
            goal, side, passage = step
            direction, box = np.array(DIRECTIONS[side], float), passage.box
            half = abs(np.array([box.x1 - box.x0, box.y1 - box.y0]) @ direction) / 2 + DOOR_DISTANCE
            points += [box.center + direction * half, box.center - direction * half]
        return points[::-1]

    def _avoid_pillar(self, point) -> list[np.ndarray]:
        """`point`, and before it a point beside the pillar if that is in the way."""
        number = self.room
        pillar = None if number is None else self.gallery.rooms[number].pillar
        if pillar is None:
            return [point]
        start, along = self.position, point - self.position
        share = np.clip((pillar - start) @ along / max(along @ along, 1e-9), 0, 1)
        offset = start + share * along - pillar
        distance = np.hypot(*offset)
        if distance >= PILLAR_RADIUS + 28 or share in (0, 1):
            return [point]
        across = (
            offset / distance
            if distance > 1
            else np.array([-along[1], along[0]]) / np.hypot(*along)
        )
        return [pillar + across * DETOUR, point]

    def _random_point(self, number: int) -> np.ndarray:
        """Random point of a room that is not close to a wall."""
        box = self.gallery.rooms[number].box
        while True:
            point = self.rng.uniform((box.x0, box.y0), (box.x1, box.y1))
            if self.gallery.room_at(*point, margin=72) is not None:
                return point

    def _landmark(self, number: int) -> np.ndarray:
        """Position of the picture or the pillar of a room."""
        pillar = self.gallery.rooms[number].pillar
        if pillar is not None and self.rng.random() < 0.3:
            return np.array(pillar, float)
        return self.gallery.picture(number)[0]

    def _viewpoint(self, number: int, landmark) -> np.ndarray:
        """Random point of a room, neither close to a landmark nor far from it."""
        for _ in range(40):
            point = self._random_point(number)
            if 180 < np.hypot(*(point - landmark)) < 420:
                return point
        return self._random_point(number)
