"""ViZDoom: keys and mouse do what they say, and one seed is one recording."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip('vizdoom', reason="needs ViZDoom: pip install -e '.[data]'")

from matrix_jax.data import collect, curate, doom, records
from matrix_jax.data.records import KEYS, MOUSE_RATE, Shard

NONE = (0, 0, 0, 0)
TOP = 16.7  # map units a frame of a key that is held for long
HALL = doom.THEMES['maze'].held_out[0]


@pytest.fixture(scope='module')
def game():
    made = doom.VizDoomGame()
    yield made
    made.close()


@pytest.fixture
def hall(game):
    """A walker in the middle of a hall, looking along +x."""
    assert game.reset(HALL, 3, np.random.default_rng(0))
    game.game.send_game_command('warp 300 300')
    game._act(doom.STILL, 2)
    for _ in range(3):
        game._act([0, 0, 0, 0, 0, float(np.degrees(game.pose()[3]))], 1)
    assert np.hypot(*(game.pose()[:2] - 300)) < 1 and abs(game.pose()[3]) < 1e-3
    return game


def held(game, keys, mouse=(0, 0), frames=6):
    before = game.pose()
    _, poses = game.hold([key in keys for key in KEYS], mouse, frames, draw=False)
    return poses[-1] - before


def test_keys_move_and_stand_for_their_directions(hall):
    for keys, way in {
        'W': (1, 0),
        'S': (-1, 0),
        'A': (0, 1),
        'D': (0, -1),
        'WA': (1, 1),
        'SD': (-1, -1),
    }.items():
        hall.game.send_game_command('warp 300 300')
        hall._act(doom.STILL, 40)
        moved = held(hall, keys)[:2]
        assert (np.sign(moved) * (np.abs(moved) > 3)).tolist() == list(way), keys
        assert 30 < np.abs(moved).max() < 6 * TOP
    assert held(hall, '', frames=12)[3:].tolist() == [0, 0, 0]


@pytest.mark.parametrize('mouse', [(0, 0.1), (0, -0.1), (0.06, 0), (-0.06, 0), (0.03, 0.04)])
def test_mouse_turns_at_the_published_rate(hall, mouse):
    moved = held(hall, '', mouse, frames=4)
    pitch, yaw = np.radians(MOUSE_RATE) * np.array(mouse) * 4 / doom.FPS
    np.testing.assert_allclose(moved[[4, 3]], [pitch, -yaw], atol=2e-3)
    np.testing.assert_allclose(moved[:3], 0, atol=0.5)


def test_a_turn_moves_the_picture_and_stillness_does_not(hall):
    hall.hold(NONE, (0, 0), draw=False)
    still, _ = hall.hold(NONE, (0, 0))
    assert still.shape == (4, 96, 160, 3) and still.dtype == np.uint8
    assert np.abs(still[1:].astype(int) - still[:1]).mean() < 2
    turned, _ = hall.hold(NONE, (0, 0.1), frames=2)
    # 3.75 degrees a frame are 5.2 of 80 pixels of focal length in the middle of the picture.
    shifts = [
        np.abs(turned[1, :, 60:100].astype(int) - turned[0, :, 60 + s : 100 + s]).mean()
        for s in range(-8, 9)
    ]
    assert np.argmin(shifts) - 8 == 5


def test_walls_are_seen_where_they_are(hall):
    seen = []
    for x in (300, 340, 380):
        hall.game.send_game_command(f'warp {x} 300')
        hall._act(doom.STILL, 2)
        seen.append(hall.sight().front)
    np.testing.assert_allclose(np.diff(seen), -40, atol=12)
    assert doom._inside(np.array([1, 1]), np.array([[0, 0, 4, 0], [4, 0, 4, 4], [4, 4, 0, 0]])) == 1
    assert doom._distance(np.array([2, 3]), np.array([[0, 0, 4, 0]])) == 3


def test_steps_of_a_held_key_are_even(hall):
    hall.game.send_game_command('warp 120 120')
    hall._act(doom.STILL, 2)
    _, poses = hall.hold((1, 0, 0, 0), (0, 0), 18, draw=False)
    steps = np.hypot(*np.diff(poses[:, :2], axis=0).T)[11:16]
    # Two tics and three by turns, as 35 tics a second need, would be 20 % apart.
    assert steps.std() < 0.02 * steps.mean() and 15 < steps.mean() < TOP


def test_places_are_in_one_split():
    for theme in doom.THEMES.values():
        assert not set(theme.maps) & set(theme.held_out)
    assert doom.place('maze', 7) in doom.THEMES['maze'].held_out
    assert {doom.place('maze', 2 * n) for n in range(6)} == set(doom.THEMES['maze'].maps)


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
    """The same short recording by one worker and by two."""
    folder = tmp_path_factory.mktemp('doom')
    for workers in (1, 2):
        collect.run(collect.plan('vizdoom', 0.004, 'maze', 5, 0.5), folder / str(workers), workers)
    return folder


def test_the_recording_follows_from_the_seed_whatever_the_workers(recorded):
    names = sorted(path.name for path in (recorded / '1').iterdir())
    assert names == ['heldout-00000.array_record', 'manifest.json', 'train-00000.array_record']
    for name in names:
        assert (recorded / '1' / name).read_bytes() == (recorded / '2' / name).read_bytes()
    about = (recorded / '1' / 'manifest.json').read_text()
    assert '"tics": 2' in about and '"env": "vizdoom"' in about


def test_clips_hold_keys_mouse_and_pose(recorded):
    clip = Shard(recorded / '1' / 'train-00000.array_record')[0]
    assert clip.frames.shape == (len(clip.pose), 96, 160, 3) and not clip.labelled
    assert clip.fps == 16 and clip.seed % 2 == 0 and 0.1 < clip.frames.mean() / 255 < 0.7
    # Keys and mouse are held for a latent frame, and the yaw follows the mouse frame by frame.
    for value in (clip.keyboard, clip.mouse):
        blocks = value[1:].reshape(-1, 4, value.shape[1])
        assert (blocks == blocks[:, :1]).all()
    yaw = records.wrap(np.diff(clip.pose[:, 3]))
    np.testing.assert_allclose(yaw, -np.radians(MOUSE_RATE) / 16 * clip.mouse[1:, 1], atol=2e-3)
    assert (clip.pose[:, 5] == 0).all() and clip.keyboard.any()


def test_keys_and_mouse_are_found_in_poses_alone(recorded):
    for split in ('train', 'heldout'):
        clip = Shard(recorded / '1' / f'{split}-00000.array_record')[0]
        walker = curate.Walker(speed=267.0, drag=0.829)  # as `calibrate` finds in an hour
        nothing = records.unknown(len(clip.frames))
        bare = replace(clip, keyboard=nothing['keyboard'], mouse=nothing['mouse'])
        found = curate.label(bare, walker)
        free = ~curate.blocked(clip.pose, clip.fps, clip.keyboard, walker)
        assert free.mean() > 0.4
        assert curate.agreement(found.keyboard, clip.keyboard, free)['all']['accuracy'] > 0.93
        np.testing.assert_allclose(found.mouse[1:], clip.mouse[1:], atol=4e-3)
