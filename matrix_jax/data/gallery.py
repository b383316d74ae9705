"""Galleries: maps for ViZDoom written by code, a different one for each seed.

A gallery has four to eight rooms on a grid of three by three cells, and open passages between
neighbours. The seed chooses the designs of the rooms (`gallery_designs`), their places, sizes and
directions, and the passages.

`wad` writes the map as UDMF text, with textures and a palette. The engine builds the nodes.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from matrix_jax.data import gallery_textures as textures
from matrix_jax.data import udmf
from matrix_jax.data.gallery_designs import DESIGNS, RoomDesign

MAP = 'MAP01'
GRID = 3  # cells per side
CELL_SIZE = 896  # map units
ROOM_SIZES = (512, 576, 640, 704, 768)  # map units per side of a room
ALIGNMENT = 32  # walls and doorways lie at multiples of it, in map units
ROOM_COUNTS = range(4, 9)
LOOP_PROBABILITY = 0.4  # of a passage between neighbours that are connected already
DOOR_WIDTH = 128  # map units
PILASTER_WIDTH = 16  # map units of the light strips beside a doorway
PILLAR_RADIUS = 44  # map units from the centre to a corner
WALKER_RADIUS = 16.0  # map units
NORTH, EAST, SOUTH, WEST = range(4)
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))


class Box(NamedTuple):
    """A rectangle in map units."""

    x0: int
    y0: int
    x1: int
    y1: int

    def contains(self, x: float, y: float, margin: float = 0.0) -> bool:
        """Whether a point is inside, at least `margin` from every side."""
        return (
            self.x0 + margin <= x <= self.x1 - margin and self.y0 + margin <= y <= self.y1 - margin
        )

    @property
    def center(self) -> np.ndarray:
        """Centre [2]."""
        return np.array([self.x0 + self.x1, self.y0 + self.y1]) / 2


class Room(NamedTuple):
    """A room of a gallery.

    Attributes:
      design: its design.
      cell: column and row in the grid.
      box: its floor.
      first_side: side of the first wall of the design: NORTH, EAST, SOUTH or WEST.
      pillar: centre of the pillar; None without one.
    """

    design: RoomDesign
    cell: tuple[int, int]
    box: Box
    first_side: int
    pillar: tuple[int, int] | None


class Passage(NamedTuple):
    """A passage between two rooms.

    Attributes:
      first: number of a room.
      second: number of the room EAST or NORTH of it.
      side: EAST or NORTH.
      box: its floor, without the doorways.
    """

    first: int
    second: int
    side: int
    box: Box


class GalleryLayout:
    """Rooms and passages of a gallery; every room can be reached.

    Args:
      seed: the same seed gives the same gallery.

    Attributes:
      rooms: tuple of `Room`.
      passages: tuple of `Passage`.
    """

    def __init__(self, seed: int):
        rng = np.random.default_rng([seed, 7])
        cells, pairs = _draw_cells(rng)
        designs = rng.permutation(len(DESIGNS))[: len(cells)]
        self.rooms = tuple(
            _draw_room(rng, DESIGNS[number], cell) for number, cell in zip(designs, cells)
        )
        self.passages = tuple(
            _draw_passage(rng, self.rooms, first, second) for first, second in pairs
        )

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Two captions that name all rooms."""
        names = [room.design.name for room in self.rooms]
        listed = ', the '.join(names[:-1]) + f' and the {names[-1]}'
        return (
            f'Walking through a bright gallery of {len(names)} rooms, first person: the {listed}.',
            f'A colourful gallery seen by a walker, with the {listed}.',
        )

    def room_at(self, x: float, y: float, margin: float = 0.0) -> int | None:
        """Number of the room that contains a point, or None.

        Args:
          x: of the point, in map units.
          y: of the point, in map units.
          margin: least distance from the walls and the pillar, in map units.
        """
        for number, room in enumerate(self.rooms):
            if room.box.contains(x, y, margin):
                if room.pillar and np.hypot(x - room.pillar[0], y - room.pillar[1]) < (
                    PILLAR_RADIUS * np.cos(np.pi / 8) + margin
                ):
                    return None
                return number
        return None

    def contains(self, x: float, y: float, margin: float = 0.0) -> bool:
        """Whether a point is in a room or a passage, at least `margin` from every wall."""
        if self.room_at(x, y, margin) is not None:
            return True
        for passage in self.passages:
            x0, y0, x1, y1 = box = passage.box
            # The ends are open, so `margin` counts from the sides only.
            longer = (
                Box(x0 - DOOR_WIDTH, y0, x1 + DOOR_WIDTH, y1)
                if passage.side == EAST
                else Box(x0, y0 - DOOR_WIDTH, x1, y1 + DOOR_WIDTH)
            )
            within = box.contains(x, y) or self.room_at(x, y) in (passage.first, passage.second)
            if within and longer.contains(x, y, margin):
                return True
        return False

    def picture(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Centre [2] of the picture in a room, and the unit vector [2] away from its wall."""
        room = self.rooms[number]
        start, end = self._picture_span(number)
        at = _corner(room.box, room.first_side) + _along(room.first_side) * (start + end) / 2
        return at, -np.array(DIRECTIONS[room.first_side], float)

    def doors(self, number: int) -> dict[int, int]:
        """Side of a room -> index of the passage there."""
        found = {}
        for index, passage in enumerate(self.passages):
            if passage.first == number:
                found[passage.side] = index
            elif passage.second == number:
                found[(passage.side + 2) % 4] = index
        return found

    def doorway(self, number: int, side: int) -> tuple[int, int] | None:
        """Doorway in a wall of a room; None without one.

        Returns:
          (start, end) in map units from the left end of the wall, seen from inside.
        """
        index = self.doors(number).get(side)
        if index is None:
            return None
        start = _corner(self.rooms[number].box, side)
        middle = float((self.passages[index].box.center - start) @ _along(side))
        return round(middle) - DOOR_WIDTH // 2, round(middle) + DOOR_WIDTH // 2

    def _picture_span(self, number: int) -> tuple[int, int]:
        """Extent of the picture on the first wall of a room: (start, end) as in `doorway`."""
        room = self.rooms[number]
        length, door = _length(room.box, room.first_side), self.doorway(number, room.first_side)
        if door is None:
            free = 0, length
        else:
            free = max(
                (0, door[0] - PILASTER_WIDTH),
                (door[1] + PILASTER_WIDTH, length),
                key=lambda span: span[1] - span[0],
            )
        start = (free[0] + free[1] - textures.PICTURE_WIDTH) // 2
        return start, start + textures.PICTURE_WIDTH

    def textmap(self) -> str:
        """Returns the map as UDMF text."""
        level = udmf.Textmap()
        rooms = [
            level.add_sector(
                textures.floor(room.design.color), room.design.ceiling, textures.ROOM_HEIGHT
            )
            for room in self.rooms
        ]
        halls = [level.add_sector('HALLFLR', 'LAMPS', textures.DOOR_HEIGHT) for _ in self.passages]
        for number, room in enumerate(self.rooms):
            for side in range(4):
                self._add_wall(level, rooms, halls, number, side)
            if room.pillar:
                _add_pillar(level, rooms[number], room)
        for passage, hall in zip(self.passages, halls):
            sides = (NORTH, SOUTH) if passage.side == EAST else (EAST, WEST)
            for side in sides:
                start = _corner(passage.box, side)
                level.add_line(
                    start, start + _along(side) * _length(passage.box, side), hall, 'HALL'
                )
        level.add_player(self.rooms[0].box.x0 + 96, self.rooms[0].box.y0 + 96)
        return level.text()

    def _add_wall(self, level, rooms, halls, number: int, side: int):
        """Adds one wall of a room with its pattern, picture and doorway."""
        room = self.rooms[number]
        texture = textures.wall(*room.design.walls[(side - room.first_side) % 4])
        corner, along = _corner(room.box, side), _along(side)
        parts = []  # (start, end, texture; None is open)
        door = self.doorway(number, side)
        if door:
            parts += [
                (door[0] - PILASTER_WIDTH, door[0], 'PILASTER'),
                (*door, None),
                (door[1], door[1] + PILASTER_WIDTH, 'PILASTER'),
            ]
        if side == room.first_side:
            parts.append((*self._picture_span(number), textures.picture(room.design.picture)))
        at, length = 0, _length(room.box, side)
        for start, end, special in [
            *sorted(parts, key=lambda part: part[0]),
            (length, length, None),
        ]:
            if start > at:
                level.add_line(
                    corner + along * at, corner + along * start, rooms[number], texture, at
                )
            if end > start:
                ends = corner + along * start, corner + along * end
                if special:
                    level.add_line(*ends, rooms[number], special)
                else:
                    hall = halls[self.doors(number)[side]]
                    level.add_opening(*ends, rooms[number], hall, texture, start)
            at = end


@lru_cache(maxsize=8)
def layout(seed: int) -> GalleryLayout:
    """The gallery of a seed, cached."""
    return GalleryLayout(seed)


def wad(seed: int, gamma: float) -> bytes:
    """Returns the WAD of a gallery: map, palette and textures.

    Args:
      seed: seed of the layout.
      gamma: gamma by which the recorder brightens frames; colours are stored darker by it.
    """
    return udmf.pack(
        [
            (MAP, b''),
            ('TEXTMAP', layout(seed).textmap().encode()),
            ('ENDMAP', b''),
            *_shared_lumps(gamma),
        ]
    )


@lru_cache(maxsize=2)
def _shared_lumps(gamma: float) -> list[tuple[str, bytes]]:
    """Lumps that all galleries share."""
    return [
        ('PLAYPAL', textures.playpal(gamma)),
        ('COLORMAP', textures.COLORMAP),
        ('TX_START', b''),
        *textures.png_files(gamma).items(),
        ('TX_END', b''),
    ]


# --- the layout -----------------------------------------------------------------------------------


def _draw_cells(rng):
    """Draws connected cells of the grid, and the pairs of them that get a passage."""
    count = int(rng.integers(ROOM_COUNTS.start, ROOM_COUNTS.stop))
    cells, pairs = [tuple(map(int, rng.integers(GRID, size=2)))], []
    while len(cells) < count:
        number = int(rng.integers(len(cells)))
        way = DIRECTIONS[int(rng.integers(4))]
        cell = cells[number][0] + way[0], cells[number][1] + way[1]
        if cell not in cells and all(0 <= one < GRID for one in cell):
            cells.append(cell)
            pairs.append((number, len(cells) - 1))
    for first in range(count):
        for second in range(first):
            near = sum(abs(a - b) for a, b in zip(cells[first], cells[second])) == 1
            if near and (second, first) not in pairs and rng.random() < LOOP_PROBABILITY:
                pairs.append((second, first))
    return cells, pairs


def _draw_room(rng, design: RoomDesign, cell) -> Room:
    low, size = [], [int(one) for one in rng.choice(ROOM_SIZES, 2)]
    for middle, length in zip(cell, size):
        free = (ROOM_SIZES[-1] - length) // 2 // ALIGNMENT
        low.append(
            middle * CELL_SIZE - length // 2 + ALIGNMENT * int(rng.integers(-free, free + 1))
        )
    box = Box(low[0], low[1], low[0] + size[0], low[1] + size[1])
    pillar = None
    if design.pillar:
        # Off the centre, but far enough from the walls to walk around it.
        pillar = tuple(
            int(start + length * rng.choice([0.36, 0.64])) for start, length in zip(low, size)
        )
    return Room(design, cell, box, int(rng.integers(4)), pillar)


def _draw_passage(rng, rooms, first: int, second: int) -> Passage:
    if sum(rooms[second].cell) < sum(rooms[first].cell):
        first, second = second, first
    one, other = rooms[first], rooms[second]
    side = EAST if other.cell[0] > one.cell[0] else NORTH
    axis = 1 if side == EAST else 0  # along the walls with the doorways
    low = max(one.box[axis], other.box[axis]) + DOOR_WIDTH // 2 + PILASTER_WIDTH + ALIGNMENT
    high = (
        min(one.box[axis + 2], other.box[axis + 2]) - DOOR_WIDTH // 2 - PILASTER_WIDTH - ALIGNMENT
    )
    middle = int(rng.integers(low // ALIGNMENT + 1, high // ALIGNMENT + 1)) * ALIGNMENT
    box = (
        Box(one.box.x1, middle - DOOR_WIDTH // 2, other.box.x0, middle + DOOR_WIDTH // 2)
        if side == EAST
        else Box(middle - DOOR_WIDTH // 2, one.box.y1, middle + DOOR_WIDTH // 2, other.box.y0)
    )
    return Passage(first, second, side, box)


def _corner(box: Box, side: int) -> np.ndarray:
    """Corner [2] where a side of a box begins, clockwise."""
    return np.array([(box.x0, box.y1), (box.x1, box.y1), (box.x1, box.y0), (box.x0, box.y0)][side])


def _along(side: int) -> np.ndarray:
    """Unit vector [2] along a side, clockwise, as the sector of a line is to its right."""
    return np.array(DIRECTIONS[(side + 1) % 4])


def _length(box: Box, side: int) -> int:
    return box.x1 - box.x0 if side in (NORTH, SOUTH) else box.y1 - box.y0


def _add_pillar(level: udmf.Textmap, sector: int, room: Room):
    """Adds a pillar: an eight-sided hole in the sector of its room."""
    turns = np.pi / 8 + np.arange(9) * np.pi / 4
    points = np.array(room.pillar) + PILLAR_RADIUS * np.stack(
        [np.cos(turns), np.sin(turns)], axis=1
    )
    for start, end in zip(points, points[1:]):
        level.add_line(start, end, sector, textures.pillar(room.design.pillar))
