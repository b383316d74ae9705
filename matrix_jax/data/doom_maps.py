"""Maps of ViZDoom by theme: from its own scenarios, from Freedoom, and galleries."""

from __future__ import annotations

from typing import NamedTuple

from matrix_jax.data import gallery

GALLERY = 'gallery'


class DoomMap(NamedTuple):
    """A map and its captions.

    Attributes:
      wad: a scenario of ViZDoom, freedoom1, freedoom2 or GALLERY.
      name: name of the map in it.
      captions: texts of which a recording gets one.
      seed: seed of the layout of a gallery.
    """

    wad: str
    name: str
    captions: tuple[str, ...]
    seed: int = 0


class MapTheme(NamedTuple):
    """Maps to train on, and held-out ones."""

    maps: tuple[DoomMap, ...]
    held_out: tuple[DoomMap, ...]


MY_WAY_HOME = DoomMap(
    'my_way_home',
    'map01',
    (
        'Walking through brown brick corridors between small bright rooms, first person.',
        'A maze of brown bricks with coloured rooms, seen by someone who walks in it.',
    ),
)
HEALTH_GATHERING_SUPREME = DoomMap(
    'health_gathering_supreme',
    'map01',
    (
        'Walking through a maze of grey stone on a green floor, first person.',
        'Grey stone walls, a green floor and a dark sky, seen by a walker.',
    ),
)
DEATHMATCH = DoomMap(
    'deathmatch',
    'map01',
    (
        'Walking through a wide court of brown and pink bricks, first person.',
        'Brick walls on a sandy floor under a dark blue sky, seen by a walker.',
    ),
)
MULTI_DEATHMATCH = DoomMap(
    'multi_deathmatch',
    'map01',
    (
        'Walking through grey stone halls with lamps on the ceiling, first person.',
        'Grey brick halls with crates and black screens, seen by a walker.',
    ),
)
HEALTH_GATHERING_SUPREME_GARDEN = DoomMap(
    'health_gathering_supreme',
    'map01',
    (
        'Walking through a garden maze of grey stone walls on grass, first person.',
        'Grey stone walls on green grass under a dark blue sky, seen by a walker.',
    ),
)
HEALTH_GATHERING = DoomMap(
    'health_gathering',
    'map01',
    (
        'Walking over a lawn with low walls of mossy stone, first person.',
        'Mossy stone walls around a lawn under a dark blue sky, seen by a walker.',
    ),
)
TAKE_COVER = DoomMap(
    'take_cover',
    'map01',
    (
        'Walking through an empty hall of pale bricks under a grey ceiling, first person.',
        'Pale brick walls between a grey floor and a grey ceiling, seen by a walker.',
    ),
)
DEFEND_THE_LINE = DoomMap(
    'defend_the_line',
    'map01',
    (
        'Walking through a wide empty hall of pale bricks, first person.',
        'Brick walls of a wide grey hall, seen by someone who walks there.',
    ),
)
FREEDOOM2_MAP01 = DoomMap(
    'freedoom2',
    'MAP01',
    (
        'Walking through a base of brown stone and grey machines, first person.',
        'Brown halls with lamps and a dark garden outside, seen by a walker.',
    ),
)
FREEDOOM2_MAP04 = DoomMap(
    'freedoom2',
    'MAP04',
    (
        'Walking through a pale concrete base with green panels, first person.',
        'White and grey halls of a base, seen by someone who walks there.',
    ),
)
FREEDOOM2_MAP07 = DoomMap(
    'freedoom2',
    'MAP07',
    (
        'Walking through grey stone halls with green slime behind windows, first person.',
        'Grey halls and stairs of stone blocks, seen by a walker.',
    ),
)
FREEDOOM1_E1M2 = DoomMap(
    'freedoom1',
    'E1M2',
    (
        'Walking through a steel base with railings and signs, first person.',
        'Grey steel rooms with green doors and bright lamps, seen by a walker.',
    ),
)
FREEDOOM1_E1M5 = DoomMap(
    'freedoom1',
    'E1M5',
    (
        'Walking through halls of tan bricks beside blue water, first person.',
        'Tan brick halls of a base with water, seen by someone who walks there.',
    ),
)

THEMES = {
    'maze': MapTheme((MY_WAY_HOME, HEALTH_GATHERING_SUPREME, DEATHMATCH), (MULTI_DEATHMATCH,)),
    # Places of few textures, for networks that have seen little.
    'garden': MapTheme((HEALTH_GATHERING_SUPREME_GARDEN,), (HEALTH_GATHERING,)),
    'hall': MapTheme((TAKE_COVER,), (DEFEND_THE_LINE,)),
    'base': MapTheme(
        (FREEDOOM2_MAP01, FREEDOOM2_MAP04, FREEDOOM2_MAP07, FREEDOOM1_E1M2), (FREEDOOM1_E1M5,)
    ),
    GALLERY: MapTheme((), ()),  # `place` makes a map for each seed
}


def place(theme: str, seed: int) -> DoomMap:
    """The map of an episode; odd seeds are held out, and no map is in both splits."""
    if theme == GALLERY:
        return DoomMap(GALLERY, gallery.MAP, gallery.layout(seed).captions, seed)
    maps = THEMES[theme].held_out if seed % 2 else THEMES[theme].maps
    return maps[seed // 2 % len(maps)]
