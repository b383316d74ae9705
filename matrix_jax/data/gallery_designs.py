"""The twelve designs of gallery rooms.

Each design has four walls with different colours and patterns, a picture that no other design has,
and a checkered floor; every other design has a pillar. No two of the 48 walls are alike, so one
wall of a room tells what the other three look like.
"""

from __future__ import annotations

from typing import NamedTuple

from matrix_jax.data import gallery_textures as textures


class RoomDesign(NamedTuple):
    """Design of a room.

    Attributes:
      color: colour of the first wall and of the floor.
      picture: one of `gallery_textures.PICTURES`.
      walls: four (colour, pattern), clockwise; the picture hangs on the first.
      pillar: colour of the pillar; None without one.
      ceiling: name of the texture; F_SKY1 shows the sky.
    """

    color: str
    picture: str
    walls: tuple[tuple[str, str], ...]
    pillar: str | None
    ceiling: str

    @property
    def name(self) -> str:
        """Description in captions."""
        return f'{self.color} room with the {self.picture}'


def _designs() -> tuple[RoomDesign, ...]:
    names, patterns, designs = textures.COLOR_NAMES, list(textures.PATTERNS), []
    for number, (color, picture) in enumerate(zip(names, textures.PICTURES)):
        # These steps put each colour in four rooms with four patterns, and give the walls of a
        # room different colours and patterns.
        hues = [number + step for step in (0, 4, 7, 9)]
        walls = tuple(
            (names[hue % 12], patterns[(hue + step) % 6]) for hue, step in zip(hues, (0, 1, 2, 4))
        )
        designs.append(
            RoomDesign(
                color,
                picture,
                walls,
                names[(number + 6) % 12] if number % 2 else None,
                ('LAMPS', 'F_SKY1', 'COFFERS')[number % 3],
            )
        )
    return tuple(designs)


DESIGNS = _designs()
