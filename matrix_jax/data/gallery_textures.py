"""Textures of the galleries: wall patterns, pictures, floors and a sky in one small palette.

ViZDoom draws with a palette of 256 colours, which the WAD replaces. Colours are given here as they
look in recordings. They are stored darker, because `doom.VizDoomGame` brightens frames by a gamma.
The light is even: `COLORMAP` leaves all colours as they are at every light level.

Patterns repeat every 128 map units, coarse enough for frames of [96 160]. Pictures are symmetric,
because training mirrors clips.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np

ROOM_HEIGHT = 160  # map units from floor to ceiling, and pixels of a wall texture
DOOR_HEIGHT = 112  # map units
TILE = 128  # map units after which a wall pattern repeats
SKIRTING = 16  # map units below the pattern of a wall, and above it
PICTURE_WIDTH = 160  # map units
SKY_SIZE = 240, 1024  # rows and columns; the columns cover a full turn

COLORS = {
    'red': (206, 60, 56),
    'orange': (238, 142, 54),
    'yellow': (244, 206, 76),
    'lime': (164, 200, 72),
    'green': (58, 142, 82),
    'teal': (44, 160, 156),
    'cyan': (128, 202, 232),
    'blue': (58, 98, 190),
    'purple': (126, 84, 172),
    'pink': (236, 142, 178),
    'brown': (146, 96, 62),
    'grey': (132, 140, 150),
}
COLOR_NAMES = tuple(COLORS)
WHITE, CREAM, DARK, BLACK = (246, 244, 238), (228, 220, 202), (52, 54, 68), (0, 0, 0)
SKY_TOP, SKY_LOW, CLOUD, SUN = (74, 138, 214), (190, 222, 244), (250, 250, 252), (255, 240, 170)
SKY_SHADES = 24


def _mix(first, second, share: float) -> tuple[int, int, int]:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second))


class Tones(NamedTuple):
    """A colour and shades of it, RGB 0 to 255."""

    base: tuple[int, int, int]
    light: tuple[int, int, int]
    pale: tuple[int, int, int]
    dark: tuple[int, int, int]


TONES = {
    name: Tones(color, _mix(color, WHITE, 0.38), _mix(color, WHITE, 0.62), _mix(color, DARK, 0.45))
    for name, color in COLORS.items()
}
SKY = [_mix(SKY_TOP, SKY_LOW, step / (SKY_SHADES - 1)) for step in range(SKY_SHADES)]


def playpal(gamma: float) -> bytes:
    """The lump PLAYPAL: 14 equal palettes of 256 colours, stored darker by `gamma`."""
    used = [
        BLACK,
        BLACK,
        WHITE,
        CREAM,
        DARK,
        CLOUD,
        SUN,
        *SKY,
        *(tone for tones in TONES.values() for tone in tones),
    ]
    colors = np.array(used + [BLACK] * (256 - len(used)))
    stored = np.round(255 * (colors / 255) ** gamma).astype(np.uint8)
    return stored.tobytes() * 14


COLORMAP = bytes(range(256)) * 34  # the lump: each of 34 light levels keeps all colours


def png_files(gamma: float) -> dict[str, bytes]:
    """Name in maps -> PNG of each texture, stored darker by `gamma`."""
    drawn = {
        'HALL': _hall(),
        'PILASTER': _pilaster(),
        'SKY1': _sky(),
        'HALLFLR': _checks(CREAM, TONES['grey'].pale),
        'LAMPS': _lamps(WHITE, CREAM),
        'COFFERS': _coffers(),
    }
    for color in COLOR_NAMES:
        drawn[floor(color)] = _checks(WHITE, TONES[color].pale)
        drawn[pillar(color)] = _rings(color)
        for pattern in PATTERNS:
            drawn[wall(color, pattern)] = _draw_wall(color, pattern)
    for number, (name, draw) in enumerate(PICTURES.items()):
        drawn[picture(name)] = _draw_picture(COLOR_NAMES[number], draw)
    return {name: _png(pixels, gamma) for name, pixels in drawn.items()}


def wall(color: str, pattern: str) -> str:
    """Name of the texture of a wall; names have at most eight characters."""
    return f'W{COLOR_NAMES.index(color):02d}{pattern[:5]}'.upper()


def floor(color: str) -> str:
    """Name of the texture of a floor."""
    return f'F{COLOR_NAMES.index(color):02d}'


def pillar(color: str) -> str:
    """Name of the texture of a pillar."""
    return f'P{COLOR_NAMES.index(color):02d}'


def picture(name: str) -> str:
    """Name of the texture of one of PICTURES."""
    return f'I{list(PICTURES).index(name):02d}'


def _png(pixels, gamma: float) -> bytes:
    from PIL import Image

    stored = np.round(255 * (pixels / 255) ** gamma).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(stored).save(file, 'PNG')
    return file.getvalue()


def _paint(mask, true, false) -> np.ndarray:
    """Mask [H W] -> pixels uint8 [H W 3] in two colours."""
    return np.where(np.asarray(mask)[..., None], true, false).astype(np.uint8)


# --- walls ----------------------------------------------------------------------------------------

# Masks of x and y in map units, over the 128 x 128 between skirting and cornice.
PATTERNS = {
    'stripes': lambda x, y: x // 64 == 0,
    'bands': lambda x, y: y // 32 % 2 == 0,
    'checks': lambda x, y: (x // 64 + y // 64) % 2 == 0,
    'dots': lambda x, y: np.hypot(x - 64, y - 64) < 44,
    'lozenge': lambda x, y: abs(x - 63.5) + abs(y - 63.5) < 60,
    'zigzag': lambda x, y: (y + abs(x - 63.5)).astype(int) // 64 % 2 == 0,
}


def _draw_wall(color: str, pattern: str) -> np.ndarray:
    tones = TONES[color]
    y, x = np.mgrid[: ROOM_HEIGHT - 2 * SKIRTING, :TILE]
    return _framed(_paint(PATTERNS[pattern](x, y), tones.light, tones.base), tones.dark)


def _framed(panel, skirting) -> np.ndarray:
    """Adds a cornice above a panel [128 W 3] and a skirting below -> [160 W 3]."""
    strip = np.ones((SKIRTING, panel.shape[1], 3), np.uint8)
    return np.concatenate(
        [strip * np.array(WHITE, np.uint8), panel, strip * np.array(skirting, np.uint8)]
    )


def _hall() -> np.ndarray:
    y, _ = np.mgrid[:DOOR_HEIGHT, :TILE]
    pixels = _paint(abs(y - 56) < 12, TONES['grey'].pale, CREAM)
    pixels[-SKIRTING:] = TONES['grey'].dark
    return pixels


def _pilaster() -> np.ndarray:
    return _framed(_paint(np.ones((ROOM_HEIGHT - 2 * SKIRTING, 16)), WHITE, WHITE), DARK)


def _rings(color: str) -> np.ndarray:
    y, _ = np.mgrid[:ROOM_HEIGHT, :TILE]
    return _paint(y // 40 % 2 == 0, WHITE, TONES[color].base)


# --- floors, ceilings, sky ------------------------------------------------------------------------


def _checks(first, second) -> np.ndarray:
    y, x = np.mgrid[:256, :256]
    return _paint((x // 128 + y // 128) % 2 == 0, first, second)


def _lamps(lamp, ceiling) -> np.ndarray:
    y, x = np.mgrid[:256, :256]
    return _paint((abs(x - 128) < 40) & (abs(y - 128) < 40), lamp, ceiling)


def _coffers() -> np.ndarray:
    y, x = np.mgrid[:256, :256]
    return _paint((x % 128 < 24) | (y % 128 < 24), TONES['brown'].light, TONES['brown'].pale)


def _sky() -> np.ndarray:
    rows, columns = SKY_SIZE
    y, x = np.mgrid[:rows, :columns]
    shade = np.clip(y * SKY_SHADES // (rows * 2 // 3), 0, SKY_SHADES - 1)
    pixels = np.array(SKY, np.uint8)[shade]
    for middle, row, size in ((90, 60, 34), (300, 84, 26), (520, 50, 40), (780, 78, 30)):
        for aside, below, scale in ((-1.1, 0.2, 0.6), (0, 0, 1), (1.1, 0.15, 0.7)):
            away = np.hypot((x - middle - aside * size) / 1.6, y - row - below * size)
            pixels[away < size * scale * 0.55] = CLOUD
    pixels[np.hypot(x - 650, y - 56) < 24] = SUN
    return pixels


# --- pictures -------------------------------------------------------------------------------------

# Each function draws on a `_Canvas`, in a square from -1 to 1, y down.


def _heart(canvas):
    canvas.circle(-0.4, -0.3, 0.44, 'red')
    canvas.circle(0.4, -0.3, 0.44, 'red')
    canvas.polygon([(-0.8, -0.12), (0.8, -0.12), (0, 0.9)], 'red')


def _sun(canvas):
    for turn in np.arange(8) * np.pi / 4:
        across = np.array([-np.sin(turn), np.cos(turn)]) * 0.2
        way = np.array([np.cos(turn), np.sin(turn)])
        canvas.polygon([way * 0.4 + across, way * 0.4 - across, way * 0.98], 'orange')
    canvas.circle(0, 0, 0.5, 'yellow')


def _crown(canvas):
    canvas.polygon(
        [(-0.85, 0.6), (-0.95, -0.6), (-0.42, 0), (0, -0.85), (0.42, 0), (0.95, -0.6), (0.85, 0.6)],
        'yellow',
    )
    canvas.box(-0.85, 0.5, 0.85, 0.8, 'red')


def _tree(canvas):
    canvas.box(-0.16, 0.4, 0.16, 0.95, 'brown')
    canvas.polygon([(-0.85, 0.55), (0.85, 0.55), (0, -0.35)], 'green')
    canvas.polygon([(-0.62, -0.02), (0.62, -0.02), (0, -0.95)], 'green')


def _frog(canvas):
    for side in (-1, 1):
        canvas.circle(side * 0.48, -0.5, 0.36, 'green')
        canvas.circle(side * 0.48, -0.52, 0.17, WHITE)
    canvas.circle(0, 0.15, 0.75, 'green')
    canvas.box(-0.45, 0.32, 0.45, 0.5, DARK)


def _butterfly(canvas):
    for side in (-1, 1):
        canvas.circle(side * 0.5, -0.4, 0.46, 'teal')
        canvas.circle(side * 0.42, 0.42, 0.36, 'orange')
        canvas.circle(side * 0.5, -0.4, 0.18, WHITE)
    canvas.box(-0.11, -0.8, 0.11, 0.85, DARK)


def _boat(canvas):
    canvas.polygon([(-0.9, 0.3), (0.9, 0.3), (0.55, 0.85), (-0.55, 0.85)], 'brown')
    canvas.box(-0.06, -0.9, 0.06, 0.3, DARK)
    canvas.polygon([(-0.7, 0.15), (0.7, 0.15), (0, -0.8)], 'red')


def _star(canvas):
    points = [
        (np.sin(turn) * size, -np.cos(turn) * size)
        for turn, size in zip(np.arange(10) * np.pi / 5, [0.98, 0.42] * 5)
    ]
    canvas.polygon(points, 'blue')


def _grapes(canvas):
    for row, count in enumerate((4, 3, 2, 1)):
        for place in range(count):
            canvas.circle((place - (count - 1) / 2) * 0.46, row * 0.4 - 0.42, 0.26, 'purple')
    canvas.box(-0.08, -0.98, 0.08, -0.55, 'green')


def _flower(canvas):
    for turn in np.arange(6) * np.pi / 3:
        canvas.circle(np.sin(turn) * 0.56, -np.cos(turn) * 0.56, 0.36, 'pink')
    canvas.circle(0, 0, 0.34, 'yellow')


def _house(canvas):
    canvas.box(-0.62, -0.1, 0.62, 0.85, 'brown')
    canvas.polygon([(-0.92, -0.05), (0.92, -0.05), (0, -0.9)], 'red')
    canvas.box(-0.2, 0.25, 0.2, 0.85, WHITE)


def _robot(canvas):
    canvas.box(-0.7, -0.5, 0.7, 0.7, 'grey')
    canvas.box(-0.08, -0.9, 0.08, -0.5, DARK)
    for side in (-1, 1):
        canvas.circle(side * 0.34, -0.12, 0.2, 'cyan')
    canvas.box(-0.42, 0.28, 0.42, 0.5, DARK)


PICTURES = {
    'heart': _heart,
    'sun': _sun,
    'crown': _crown,
    'tree': _tree,
    'frog': _frog,
    'butterfly': _butterfly,
    'boat': _boat,
    'star': _star,
    'grapes': _grapes,
    'flower': _flower,
    'house': _house,
    'robot': _robot,
}


class _Canvas:
    """Draws shapes with hard edges; the colours of soft ones would not be in the palette.

    Args:
      image: PIL image to draw on.
      middle: pixel (x, y) at the centre of the square.
      size: pixels from the centre to a side.
    """

    def __init__(self, image, middle: tuple[int, int], size: int):
        from PIL import ImageDraw

        self.draw, self.middle, self.size = ImageDraw.Draw(image), np.array(middle), size

    def _at(self, points):
        return [tuple(map(float, self.middle + self.size * np.array(point))) for point in points]

    def polygon(self, points, color):
        self.draw.polygon(self._at(points), fill=self._color(color))

    def circle(self, x, y, radius, color):
        corners = self._at([(x - radius, y - radius), (x + radius, y + radius)])
        self.draw.ellipse([*corners[0], *corners[1]], fill=self._color(color))

    def box(self, x0, y0, x1, y1, color):
        corners = self._at([(x0, y0), (x1, y1)])
        self.draw.rectangle([*corners[0], *corners[1]], fill=self._color(color))

    @staticmethod
    def _color(color):
        return COLORS[color] if isinstance(color, str) else color


def _draw_picture(color: str, draw) -> np.ndarray:
    """Draws a picture in a dark frame on a plain wall -> uint8 [160 160 3]."""
    from PIL import Image

    base = TONES[color].base
    panel = Image.fromarray(
        _paint(np.ones((ROOM_HEIGHT - 2 * SKIRTING, PICTURE_WIDTH)), base, base)
    )
    canvas = _Canvas(panel, (PICTURE_WIDTH // 2, ROOM_HEIGHT // 2 - SKIRTING), 46)
    canvas.box(-1.62, -1.3, 1.62, 1.3, DARK)
    canvas.box(-1.44, -1.12, 1.44, 1.12, WHITE)
    draw(canvas)
    return _framed(np.asarray(panel), TONES[color].dark)
