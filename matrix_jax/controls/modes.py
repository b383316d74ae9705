"""The modes of Matrix-Game 2.0 (arXiv 2508.13009) and 3.0: keys of a game, and whether a mouse."""

from __future__ import annotations

import dataclasses

IDLE = 'idle'
SPEED = 0.1  # mouse movement of a word without an amount
LIMIT = 1.0  # largest mouse movement
MOUSE = {'up': (1, 0), 'down': (-1, 0), 'left': (0, -1), 'right': (0, 1)}  # pitch, yaw


@dataclasses.dataclass(frozen=True)
class Mode:
    """The keys and mouse of a game.

    Attributes:
      name: name of the mode.
      keys: word of each number of the keyboard vector; None for the number that means no key.
      mouse: whether the game has a mouse.
      letters: (other word, word of `keys` or `MOUSE` that it stands for).
      alone: whether at most one key can be pressed at a time.
      pad: (letter, row, column) of each key on the screen.
    """

    name: str
    keys: tuple[str | None, ...]
    mouse: bool = True
    letters: tuple[tuple[str, str], ...] = ()
    alone: bool = False
    pad: tuple[tuple[str, int, int], ...] = (('W', 0, 1), ('A', 1, 0), ('S', 1, 1), ('D', 1, 2))

    @property
    def width(self) -> int:
        """Width A of an action."""
        return len(self.keys) + 2 * self.mouse

    @property
    def words(self) -> tuple[str, ...]:
        """All words, without the letters that stand for others."""
        return (*filter(None, self.keys), *(MOUSE if self.mouse else ()), IDLE)


# A car is steered by the mouse: A and D are its left and right.
MODES = {
    mode.name: mode
    for mode in (
        Mode('universal', ('W', 'S', 'A', 'D')),
        Mode('gta_drive', ('W', 'S'), letters=(('A', 'left'), ('D', 'right'))),
        Mode(
            'templerun',
            (None, 'jump', 'slide', 'turnleft', 'turnright', 'leftside', 'rightside'),
            mouse=False,
            alone=True,
            letters=(
                ('W', 'jump'),
                ('S', 'slide'),
                ('Z', 'turnleft'),
                ('C', 'turnright'),
                ('A', 'leftside'),
                ('D', 'rightside'),
                ('nomove', IDLE),
            ),
            pad=(('Z', 0, 0), ('W', 0, 1), ('C', 0, 2), ('A', 1, 0), ('S', 1, 1), ('D', 1, 2)),
        ),
        Mode('matrix_game_3', ('W', 'S', 'A', 'D', 'space', 'attack')),
        Mode('no_actions', (), mouse=False, pad=()),
    )
}
