"""Galleries: well-formed maps that follow from the seed, and the colours that ViZDoom shows."""

import io
import re
import struct

import numpy as np
import pytest

from matrix_jax.data import doom, gallery
from matrix_jax.data import gallery_textures as textures
from matrix_jax.data.gallery import GalleryLayout
from matrix_jax.data.gallery_designs import DESIGNS
from matrix_jax.data.visitor import Visitor

SEEDS = range(40)


def blocks(text, kind):
    """Fields of each block of a kind, in order."""
    return [
        dict(re.findall(r'(\w+) = ("[^"]*"|[^;]+);', body))
        for body in re.findall(rf'^{kind} {{ (.*) }}$', text, re.MULTILINE)
    ]


def lumps(data):
    magic, count, start = struct.unpack_from('<4sii', data)
    assert magic == b'PWAD' and len(data) == start + 16 * count
    entries = [struct.unpack_from('<ii8s', data, start + 16 * index) for index in range(count)]
    return {name.rstrip(b'\0').decode(): data[at : at + size] for at, size, name in entries}


@pytest.fixture(scope='module')
def files():
    return textures.png_files(doom.GAMMA)


@pytest.mark.parametrize('seed', range(8))
def test_map_text_is_well_formed(seed, files):
    text = GalleryLayout(seed).textmap()
    assert text == GalleryLayout(seed).textmap() != GalleryLayout(seed + 1).textmap()
    assert text.startswith('namespace = "ZDoom";\n')
    assert re.fullmatch(r'(?:\w+ \{ (?:\w+ = [^;{}]+; )+\}\n)+', text.split('\n', 1)[1])
    counts = {kind: len(blocks(text, kind)) for kind in ('vertex', 'sidedef', 'sector')}
    sides = []
    for line in blocks(text, 'linedef'):
        assert {int(line['v1']), int(line['v2'])} <= set(range(counts['vertex']))
        assert line['v1'] != line['v2']
        assert ('sideback' in line) == ('twosided' in line) != ('blocking' in line)
        sides += [int(line[side]) for side in ('sidefront', 'sideback') if side in line]
    assert sorted(sides) == list(range(counts['sidedef']))
    assert {int(side['sector']) for side in blocks(text, 'sidedef')} == set(range(counts['sector']))
    named = set(re.findall(r'texture\w+ = "(\w+)"', text))
    assert named <= {*files, 'F_SKY1'} and all(len(name) <= 8 for name in files)
    assert len(blocks(text, 'thing')) == 1


@pytest.mark.parametrize('seed', range(8))
def test_sectors_are_closed(seed):
    text = GalleryLayout(seed).textmap()
    sides = blocks(text, 'sidedef')
    ends = {}
    for line in blocks(text, 'linedef'):
        for side, way in (('sidefront', 1), ('sideback', -1)):
            if side in line:
                sector = ends.setdefault(sides[int(line[side])]['sector'], [])
                sector.append((line['v1'], line['v2'])[::way])
    for lines in ends.values():
        # Each corner is entered once and left once.
        assert sorted(first for first, _ in lines) == sorted(last for _, last in lines)
        assert len({first for first, _ in lines}) == len(lines)


def test_rooms_lie_apart_and_all_can_be_reached():
    counts = set()
    for seed in SEEDS:
        made = GalleryLayout(seed)
        counts.add(len(made.rooms))
        assert len({room.design for room in made.rooms}) == len(made.rooms)
        for index, room in enumerate(made.rooms):
            for other in made.rooms[:index]:
                apart = [room.box[axis] - other.box[axis + 2] for axis in (0, 1)] + [
                    other.box[axis] - room.box[axis + 2] for axis in (0, 1)
                ]
                assert max(apart) >= gallery.CELL_SIZE - gallery.ROOM_SIZES[-1]
        reached, left = {0}, list(made.passages)
        while found := [one for one in left if {one.first, one.second} & reached]:
            reached |= {end for one in found for end in (one.first, one.second)}
            left = [one for one in left if one not in found]
        assert reached == set(range(len(made.rooms)))
    assert counts == set(range(4, 9))


def test_no_two_walls_of_the_catalogue_are_alike():
    walls = [wall for design in DESIGNS for wall in design.walls]
    assert len(set(walls)) == len(walls) == 48
    for design in DESIGNS:
        assert len({colour for colour, _ in design.walls}) == 4
        assert len({pattern for _, pattern in design.walls}) == 4
        assert design.walls[0][0] == design.color
    assert len({design.picture for design in DESIGNS}) == len(DESIGNS) == 12


def test_held_out_layouts_are_not_trained_on():
    levels = [doom.place('gallery', seed) for seed in SEEDS]
    assert len({level.seed for level in levels}) == len(SEEDS)
    texts = {seed % 2: set() for seed in SEEDS}
    for level in levels:
        texts[level.seed % 2].add(gallery.layout(level.seed).textmap())
    assert len(texts[0]) == len(texts[1]) == len(SEEDS) // 2 and not texts[0] & texts[1]


def test_captions_name_the_rooms():
    made = GalleryLayout(2)
    for caption in made.captions:
        assert 'gallery' in caption and all(room.design.name in caption for room in made.rooms)


def test_pictures_hang_on_free_walls():
    for seed in SEEDS:
        made = GalleryLayout(seed)
        for number, room in enumerate(made.rooms):
            at, facing = made.picture(number)
            before = at + facing * 32
            assert made.room_at(*before) == number and made.room_at(*(at - facing)) != number
            door = made.doorway(number, room.first_side)
            if door is not None:
                start, end = made._picture_span(number)
                assert (
                    end <= door[0] - gallery.PILASTER_WIDTH
                    or start >= door[1] + gallery.PILASTER_WIDTH
                )
                assert start >= 0 and end <= gallery._length(room.box, room.first_side)


def test_inside_tells_rooms_passages_and_walls_apart():
    made = GalleryLayout(1)
    room, passage = made.rooms[0], made.passages[0]
    assert (
        made.contains(*passage.box.center, margin=16) and made.room_at(*passage.box.center) is None
    )
    corner = np.array(room.box[:2], float)
    assert made.contains(*(corner + 17), margin=16) and made.room_at(*(corner + 17)) == 0
    assert not made.contains(*(corner + 15), margin=16) and not made.contains(*(corner - 1))
    with_pillar = next(room for room in made.rooms if room.pillar)
    assert not made.contains(*with_pillar.pillar)


def test_wad_holds_map_palette_and_textures(files):
    data = gallery.wad(4, doom.GAMMA)
    assert data == gallery.wad(4, doom.GAMMA)
    found = lumps(data)
    assert list(found)[:3] == ['MAP01', 'TEXTMAP', 'ENDMAP']
    assert found['TEXTMAP'].decode() == GalleryLayout(4).textmap()
    assert len(found['PLAYPAL']) == 14 * 768 and len(found['COLORMAP']) == 34 * 256
    names = list(found)
    inside = names[names.index('TX_START') + 1 : names.index('TX_END')]
    assert {name: found[name] for name in inside} == files


def test_every_colour_of_a_texture_is_in_the_palette(files):
    from PIL import Image

    palette = set(
        map(tuple, np.frombuffer(textures.playpal(doom.GAMMA)[:768], np.uint8).reshape(-1, 3))
    )
    for name, data in files.items():
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert set(map(tuple, np.unique(pixels.reshape(-1, 3), axis=0))) <= palette, name


# --- the visitor, in a world of plain numbers -----------------------------------------------------


def walk(seed, count):
    """A visitor in a gallery where a key moves by 14 map units a frame unless a wall is there."""
    made, rng = GalleryLayout(seed), np.random.default_rng(seed)
    visitor, pose = Visitor(rng, made), np.zeros(6)
    pose[:2] = visitor._random_point(0)
    visitor.start()
    visitor.moved(np.tile(pose, (4, 1)))
    sight = doom.Sight(np.full(9, 400.0), np.linspace(0.75, -0.75, 9))
    poses, choices = [], []
    for _ in range(count):
        keys, mouse = visitor.choose(sight)
        block = []
        for _ in range(4):
            pose[3:5] += np.array([-mouse[1], mouse[0]]) * doom.MOUSE_DEGREES * 2 * np.pi / 180
            ahead = np.array([np.cos(pose[3]), np.sin(pose[3])])
            step = (int(keys[0]) - keys[1]) * ahead + (int(keys[2]) - keys[3]) * np.array(
                [-ahead[1], ahead[0]]
            )
            for axis in (0, 1):
                moved = pose[:2].copy()
                moved[axis] += 14 * step[axis]
                if made.contains(*moved, margin=gallery.WALKER_RADIUS):
                    pose[:2] = moved
            block.append(pose.copy())
        visitor.moved(np.array(block))
        poses += block
        choices.append(
            (
                ''.join(key for key, held in zip('WSAD', keys) if held),
                float(mouse[1]),
                float(mouse[0]),
            )
        )
    assert np.abs(pose[4]) < np.radians(40)
    return made, np.array(poses), choices, visitor


def test_a_visitor_sees_every_room():
    made, _, _, visitor = walk(3, 2400)
    assert set(visitor.visits) == set(range(len(made.rooms)))


def test_a_visitor_presses_all_keys_turns_tilts_and_rests():
    choices = [choice for seed in range(4) for choice in walk(seed, 480)[2]]
    share = {
        keys: np.mean([keys == held for held, *_ in choices])
        for keys in ('', 'W', 'S', 'A', 'D', 'WA', 'WD', 'SA', 'SD')
    }
    assert 0.15 < share['W'] < 0.5 and share[''] < 0.6
    assert all(share[key] > 0.02 for key in 'SAD') and all(share.values())
    yaw, pitch = np.array([mouse for _, *mouse in choices]).T
    assert 0.15 < np.mean(yaw < -0.01) and 0.15 < np.mean(yaw > 0.01)
    assert 0.02 < np.mean(pitch < -0.03) and 0.02 < np.mean(pitch > 0.03)
    assert 0.03 < np.mean([not keys and not yaw and not pitch for keys, yaw, pitch in choices])


def test_a_visitor_looks_at_a_landmark_again():
    made, rng = GalleryLayout(5), np.random.default_rng(0)
    visitor, pose = Visitor(rng, made), np.zeros(6)
    pose[:2] = visitor._viewpoint(0, made.picture(0)[0])
    visitor.moved(np.tile(pose, (4, 1)))
    offs = []
    visitor._pick, visitor._walk_to = lambda weights: 'still', lambda point: iter(())
    visitor._landmark = lambda number: made.picture(number)[0]
    for _, yaw in visitor._revisit():
        pose[3] -= yaw * doom.MOUSE_RATE / 4 * np.pi / 180
        visitor.moved(np.tile(pose, (4, 1)))
        offs.append(abs(visitor._angle_to(made.picture(0)[0])))
    first = int(np.argmax(np.array(offs) < 0.1))
    away = np.array(offs[first:]) > np.pi / 3 - 0.1
    assert offs[first] < 0.1 and max(offs[-2:]) < 0.1 and np.count_nonzero(away) >= 8


# --- in ViZDoom -----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def game():
    pytest.importorskip('vizdoom', reason="needs ViZDoom: pip install -e '.[data]'")
    made = doom.VizDoomGame()
    yield made
    made.close()


def stand(game, x, y, yaw):
    game.game.send_game_command(f'warp {x:.1f} {y:.1f}')
    game._act(doom.STILL, 4)
    for _ in range(3):
        off = doom.wrap(game.pose()[3] - yaw)
        game._act([0, 0, 0, 0, 0, float(np.degrees(off))], 1)
    assert np.hypot(*(game.pose()[:2] - (x, y))) < 1 and abs(doom.wrap(game.pose()[3] - yaw)) < 1e-3


def test_walls_show_their_colours_at_any_distance(game):
    level = doom.place('gallery', 5)
    assert game.reset(level, 5, np.random.default_rng(0))
    made = gallery.layout(5)
    for number, room in enumerate(made.rooms):
        at, facing = made.picture(number)
        for distance in (90, 240):
            stand(game, *(at + facing * distance), np.arctan2(*-facing[::-1]))
            frame = game.frame().astype(int)
            # The frame of the picture is dark; the wall around it has the colour of the room.
            for colour in (textures.COLORS[room.design.color], textures.DARK):
                near = np.abs(frame - colour).max(axis=-1) <= 4
                assert near.mean() > 0.01, (room.design.name, distance, colour)


def test_a_visitor_stays_within_the_walls(game):
    clip = doom.record(game, 8, 'gallery', 241, np.random.default_rng(1))
    made = gallery.layout(8)
    assert len(clip.frames) == 241 and clip.theme == 'gallery' and clip.seed == 8
    assert all(made.contains(x, y, margin=gallery.WALKER_RADIUS - 0.5) for x, y in clip.pose[:, :2])
    assert clip.caption in made.captions and clip.keyboard.any()
    assert np.ptp(clip.pose[:, 2]) < 16
