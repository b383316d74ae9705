"""Agent of first-person recordings: walks where there is room and tries all actions.

It chooses keys (W S A D) and mouse (pitch, yaw) once per latent frame, a quarter of a second. It
follows an intent for several of them: walk, combine keys and a turn, stand, turn, or look up or
down. If it gets stuck or sees a wall ahead, it drops the intent and turns to where there is room.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from matrix_jax.data.records import FRAMES_PER_LATENT, MOUSE_RATE

TURN = 0.1  # mouse of a held turning key in the published vocabulary
TURNS = (0.03, 0.2)  # range of other mouse speeds
HOLD = FRAMES_PER_LATENT / 16  # seconds per choice
TURN_RADIANS = np.radians(MOUSE_RATE) * HOLD  # turn of a mouse of 1 in that time
NEAR, FAR = 72.0, 300.0  # map units ahead: a wall to stop at, room to walk into
STUCK = 14.0  # map units per latent frame; a held key makes 60
PITCH_LIMIT = np.radians(18)
# Probabilities of keys (forward and back, left and right) and intents.
FORWARD = {'W': 0.54, 'S': 0.16, '': 0.3}
SIDE = {'': 0.36, 'A': 0.32, 'D': 0.32}
AWAY = {'': 0.36, 'S': 0.18, 'A': 0.15, 'D': 0.15, 'SA': 0.08, 'SD': 0.08}
INTENTS = {'walk': 0.28, 'combine': 0.46, 'stand': 0.08, 'turn': 0.02, 'look': 0.16}


class Sight(NamedTuple):
    """Distances to the nearest wall.

    Attributes:
      ahead: map units [N].
      bearing: directions [N] in radians from straight ahead, left positive.
    """

    ahead: np.ndarray
    bearing: np.ndarray

    @property
    def front(self) -> float:
        """Free distance straight ahead, over the width of the walker."""
        return float(self.ahead[np.abs(self.bearing) < 0.15].min())


class Explorer:
    """Chooses the actions of a recording: call `choose(sight)`, play them, then `moved(poses)`."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.left, self.intent = 0, 'stand'
        self.keys, self.mouse = '', (0.0, 0.0)
        self.last, self.pitch, self.stuck, self.held = None, 0.0, False, 0

    def start(self):
        """Chooses the actions held before the first frame."""
        self.intent, self.left = str(self.rng.choice(['walk', 'stand'], p=[0.75, 0.25])), 4
        self.keys = 'W' if self.intent == 'walk' else ''

    def choose(self, sight: Sight):
        """(int8 [4] W S A D, float32 [2] pitch and yaw) of the next latent frame."""
        bump = 'W' in self.keys and sight.front < NEAR and self.rng.random() < 0.85
        if self.intent == 'free':
            self.turned += 1
            if sight.front > FAR / 2 and self.turned >= 3:
                self.left = 0
        elif self.stuck or bump:
            self._free(sight)
        if self.left <= 0:
            self._decide(sight)
        self.left -= 1
        if self.intent == 'walk':
            self.mouse = 0.0, self._steer(sight)
        if self.intent != 'look':
            self.mouse = self.level(), self.mouse[1]
        elif abs(self.pitch + self.mouse[0] * TURN_RADIANS) > PITCH_LIMIT:
            self.mouse = 0.0, self.mouse[1]
        return self.pressed()

    def moved(self, poses):
        """Observes the poses [4 6] of the latent frame that was played."""
        same, self.pitch = self.keys == self.held, float(poses[-1, 4])
        self.held = self.keys
        if self.last is not None and self.keys:
            way = float(np.hypot(*(poses[-1, :2] - self.last[:2])))
            # The first latent frame after a change of keys is slow.
            self.stuck = same and way < STUCK
        else:
            self.stuck = False
        self.last = poses[-1]

    def level(self) -> float:
        """Mouse pitch that turns the view back to the horizon, at most the speed of a key."""
        back = -self.pitch / TURN_RADIANS
        return float(np.clip(back, -TURN, TURN)) if abs(back) > 0.004 else 0.0

    def pressed(self):
        """The current actions, in the format of `choose`."""
        return (
            np.array([key in self.keys for key in 'WSAD'], np.int8),
            np.array(self.mouse, np.float32),
        )

    def _blocks(self, low: float, high: float) -> int:
        return int(round(self.rng.uniform(low, high) / HOLD))

    def _pick(self, weights) -> str:
        p = np.array(list(weights.values()))
        return str(self.rng.choice(list(weights), p=p / p.sum()))

    def _speed(self) -> float:
        return TURN if self.rng.random() < 0.6 else float(self.rng.uniform(*TURNS))

    def _side(self) -> int:
        return int(self.rng.integers(2)) * 2 - 1

    def _decide(self, sight: Sight):
        rng, intent = self.rng, self._pick(INTENTS)
        if self.intent == 'free' and rng.random() < 0.6:
            intent = 'walk'
        if intent == 'walk' and sight.front < NEAR:
            return self._free(sight)
        self.intent, self.keys, self.mouse = intent, '', (0.0, 0.0)
        if intent == 'walk':
            self.keys = 'W' + self._pick({'': 0.8, 'A': 0.1, 'D': 0.1})
            self.left = self._blocks(1.0, 4.0)
        elif intent == 'combine':
            self.keys = self._pick(FORWARD) + self._pick(SIDE)
            turn = 0.0 if rng.random() < 0.55 and self.keys else self._side() * self._speed()
            self.mouse, self.left = (0.0, turn), self._blocks(0.5, 2.0)
        elif intent == 'turn':
            self.mouse, self.left = (0.0, self._side() * self._speed()), self._blocks(0.5, 2.5)
        elif intent == 'stand':
            self.left = self._blocks(0.5, 1.5)
        else:
            self.keys = self._pick({'': 0.5, 'W': 0.5})
            turn = 0.0 if rng.random() < 0.6 else self._side() * self._speed()
            self.mouse = self._side() * float(rng.choice([0.04, TURN])), turn
            self.left = self._blocks(0.5, 1.5)

    def _free(self, sight: Sight):
        """Turns away from a wall to the open side, sometimes with a step back or aside."""
        self.intent, self.left, self.turned = 'free', self._blocks(0.75, 2.5), 0
        open_left = sight.ahead[sight.bearing > 0].mean()
        open_right = sight.ahead[sight.bearing < 0].mean()
        side = (
            self._side()
            if abs(open_left - open_right) < 20
            else (-1 if open_left > open_right else 1)
        )
        self.keys = self._pick(AWAY)
        self.mouse = 0.0, side * max(self._speed(), 0.06)

    def _steer(self, sight: Sight) -> float:
        """Mouse yaw towards the most room; 0 while there is enough room ahead."""
        room = np.convolve(sight.ahead, np.ones(5) / 5, 'same') - 60 * np.abs(sight.bearing)
        if sight.front > FAR and self.rng.random() < 0.9:
            return 0.0
        aim = float(sight.bearing[int(np.argmax(room))])
        if abs(aim) < 0.1:
            return 0.0
        return float(np.clip(-aim / TURN_RADIANS, -TURN, TURN))
