"""Writes maps for ZDoom as UDMF text (namespace "ZDoom"), and packs them into a WAD."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def pack(lumps: Sequence[tuple[str, bytes]]) -> bytes:
    """Returns a WAD: a header, the lumps (name, bytes), and a directory of them."""
    content = b''.join(data for _, data in lumps)
    start, directory = 12, b''
    for name, data in lumps:
        directory += struct.pack('<ii8s', start, len(data), name.encode('ascii'))
        start += len(data)
    return struct.pack('<4sii', b'PWAD', len(lumps), start) + content + directory


class Textmap:
    """Builder of a UDMF map: add sectors first, then the lines around them."""

    def __init__(self):
        self.blocks, self.vertices, self.sides, self.sectors = [], {}, 0, 0

    def text(self) -> str:
        """Returns the map, the content of the lump TEXTMAP."""
        return 'namespace = "ZDoom";\n' + '\n'.join(self.blocks) + '\n'

    def add_player(self, x: int, y: int):
        """Adds the start of the player."""
        skills = ''.join(f'skill{number} = true; ' for number in range(1, 6))
        self.blocks.append(
            f'thing {{ x = {x}; y = {y}; angle = 45; type = 1; single = true; {skills}}}'
        )

    def add_sector(self, floor: str, ceiling: str, height: int) -> int:
        """Adds a sector with the floor at height 0 -> number of the sector."""
        self.blocks.append(
            f'sector {{ heightfloor = 0; heightceiling = {height}; texturefloor = '
            f'"{floor}"; textureceiling = "{ceiling}"; lightlevel = 255; }}'
        )
        self.sectors += 1
        return self.sectors - 1

    def add_line(self, start, end, sector: int, texture: str, offset: int = 0):
        """Adds a wall; the sector lies to its right, seen from `start`."""
        side = self._add_side(sector, f'texturemiddle = "{texture}"; offsetx = {offset}; ')
        self._add_line(start, end, f'sidefront = {side}; blocking = true; ')

    def add_opening(self, start, end, sector: int, behind: int, texture: str, offset: int):
        """Adds an opening to the lower sector `behind`, with wall above it."""
        front = self._add_side(sector, f'texturetop = "{texture}"; offsetx = {offset}; ')
        back = self._add_side(behind, '')
        self._add_line(
            start,
            end,
            f'sidefront = {front}; sideback = {back}; twosided = true; dontpegtop = true; ',
        )

    def _add_side(self, sector: int, more: str) -> int:
        self.blocks.append(f'sidedef {{ sector = {sector}; {more}}}')
        self.sides += 1
        return self.sides - 1

    def _add_line(self, start, end, more: str):
        ends = ' '.join(
            f'{name} = {self._vertex(point)};' for name, point in (('v1', start), ('v2', end))
        )
        self.blocks.append(f'linedef {{ {ends} {more}}}')

    def _vertex(self, point) -> int:
        point = tuple(round(float(one), 3) for one in point)
        if point not in self.vertices:
            self.vertices[point] = len(self.vertices)
            self.blocks.append(f'vertex {{ x = {point[0]}; y = {point[1]}; }}')
        return self.vertices[point]
