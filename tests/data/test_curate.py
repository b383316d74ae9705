"""Keys and mouse from camera paths: of a simulated walker, on stairs, slopes and in matrices."""

from dataclasses import replace

import numpy as np
import pytest

from matrix_jax.data import curate
from matrix_jax.data.curate import Walker
from matrix_jax.data.records import KEYS, MOUSE_RATE, Clip, RecordError, unknown, wrap

FPS = 16
GAME = Walker(speed=250.0, drag=0.82)
CHOICES = ('', 'W', 'S', 'A', 'D', 'WA', 'WD', 'SA', 'SD')


def script(seed, holds=12):
    """Random keys [F 4] and mouse [F 2], each held for 4 to 12 frames."""
    rng, keys, mouse = np.random.default_rng(seed), [], []
    for hold in rng.integers(1, 4, holds) * 4:
        chosen = rng.choice(CHOICES)
        keys += [[key in chosen for key in KEYS]] * hold
        mouse += [[rng.choice([0, 0, 0.05]), rng.choice([-0.1, 0, 0, 0.07])]] * hold
    return np.array(keys[:1] + keys, np.int8), np.array(mouse[:1] + mouse, np.float32)


def walk(keys, mouse, walker=GAME, tilt=0.0):
    """Poses [F 6] of who presses them, from rest; `tilt` is the slope of the ground along x."""
    yaw, pitch, place, velocity, poses = 0.3, 0.0, np.zeros(2), np.zeros(2), []
    for pressed, (up, right) in zip(keys, mouse, strict=True):
        yaw -= right * np.radians(MOUSE_RATE) / FPS
        pitch += up * np.radians(MOUSE_RATE) / FPS
        push = (pressed @ curate.WAYS) @ [[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]]
        velocity = walker.drag * velocity + (1 - walker.drag) * walker.speed * push
        place = place + velocity / FPS
        poses.append([*place, tilt * place[0], wrap(yaw), pitch, 0])
    return np.array(poses, np.float32)


def clip(seed, **changes):
    keys, mouse = script(seed, **changes)
    count = len(keys)
    return Clip(
        frames=np.zeros((count, 2, 2, 3), np.uint8),
        caption='',
        theme='',
        seed=seed,
        fps=FPS,
        **unknown(count) | {'keyboard': keys, 'mouse': mouse, 'pose': walk(keys, mouse)},
    )


def unlabelled(made):
    nothing = unknown(len(made.frames))
    return replace(made, keyboard=nothing['keyboard'], mouse=nothing['mouse'])


@pytest.mark.parametrize('smooth', [1, 3])
def test_keys_and_mouse_come_back(smooth):
    for seed in range(6):
        made = clip(seed)
        found = curate.label(unlabelled(made), replace(GAME, smooth=smooth))
        np.testing.assert_allclose(found.mouse[1:], made.mouse[1:], atol=1e-4)
        np.testing.assert_array_equal(found.keyboard[1:], made.keyboard[1:])


def test_a_camera_that_stops_at_once_needs_no_drag():
    keys, mouse = script(3)
    sharp = Walker(speed=2.0)
    found = curate.keyboard(walk(keys, mouse, sharp), FPS, sharp)
    np.testing.assert_array_equal(found[1:], keys[1:])


@pytest.mark.parametrize('path', ['stairs', 'lift', 'fall', 'ladder while turning'])
def test_what_moves_the_camera_up_or_down_is_no_key(path):
    keys, mouse = script(7)
    poses = walk(keys, mouse)
    if path == 'stairs':
        poses[:, 2] += 24 * (np.arange(len(poses)) // 3)
    else:
        poses[:, :2], keys = poses[:1, :2], np.zeros_like(keys)
        poses[:, 2] += {'lift': 3.0, 'fall': -40.0}.get(path, 10.0) * np.arange(len(poses))
    np.testing.assert_array_equal(curate.keyboard(poses, FPS, GAME)[1:], keys[1:])


@pytest.mark.parametrize('tilt', [0.6, -0.6])
def test_who_climbs_a_path_presses_forward_wherever_the_camera_tilts(tilt):
    keys = np.tile(np.array([1, 0, 0, 0], np.int8), (40, 1))
    mouse = np.zeros((40, 2), np.float32)
    mouse[10:20, 0] = np.sign(tilt) * 0.1
    poses = walk(keys, mouse, tilt=tilt)
    poses[:, :2] *= np.cos(np.arctan(tilt))  # at the same pace along the slope
    np.testing.assert_array_equal(curate.keyboard(poses, FPS, GAME)[1:], keys[1:])
    np.testing.assert_allclose(curate.mouse(poses, FPS)[1:], mouse[1:], atol=1e-4)


def test_who_runs_into_a_wall_does_not_press_back():
    keys, mouse = np.tile(np.array([1, 0, 0, 0], np.int8), (30, 1)), np.zeros((30, 2), np.float32)
    poses = walk(keys, mouse)
    poses[20:] = poses[19]
    found = curate.keyboard(poses, FPS, GAME)
    assert (found[:20] == keys[:20]).all() and not found[:, 1:].any() and not found[25:].any()
    where = curate.blocked(poses, FPS, keys, GAME)
    assert where[20:].all() and not where[:20].any()


def test_noise_of_a_tracked_camera_presses_little():
    noise = np.random.default_rng(0).normal(scale=[0.3, 0.3, 0.3, 1e-3, 1e-3, 1e-3], size=(201, 6))
    keys, mouse = script(1)
    poses = walk(keys, mouse) + noise[: len(keys)]
    sharp = replace(GAME, smooth=5, still=0.01)
    found = curate.agreement(curate.keyboard(poses, FPS, sharp), keys)
    assert found['all']['accuracy'] > 0.85
    standing = noise
    assert curate.keyboard(standing, FPS, sharp).mean() < 0.02
    assert np.abs(curate.mouse(standing, FPS, still=0.01)).max() < 0.02


def test_a_game_is_calibrated_with_and_without_its_keys():
    clips = [clip(seed) for seed in range(8)]
    walls = clips[0].pose.copy()
    walls[20:] = walls[19]
    clips[0] = replace(clips[0], pose=walls)
    found = curate.calibrate(clips, smooth=1)
    assert found.speed == pytest.approx(250, rel=0.01) and found.smooth == 1
    assert found.drag == pytest.approx(0.82, abs=0.01)
    guess = curate.estimate([one.pose for one in clips], FPS)
    assert guess.speed == pytest.approx(250, rel=0.1)
    assert guess.drag == pytest.approx(0.82, abs=0.05)
    with pytest.raises(ValueError, match='got 0 frames of held keys'):
        curate.calibrate([replace(clips[1], keyboard=np.zeros_like(clips[1].keyboard))])
    assert curate.estimate([np.zeros((9, 6))], FPS) is None
    noise = np.random.default_rng(0).normal(size=(400, 6))
    assert curate.estimate([noise], FPS) is None
    mouse_alone = curate.label(unlabelled(clips[1]), None)
    assert mouse_alone.knows('mouse') and not mouse_alone.knows('keyboard')


def test_cameras_become_poses():
    keys, mouse = script(2)
    poses = walk(keys, mouse, tilt=0.2)
    poses[:, 5] = 0.1
    yaw, pitch, roll = poses[:, 3:].astype(np.float64).T
    ahead = np.stack([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)], -1)
    level = np.stack([np.sin(yaw), -np.cos(yaw), 0 * yaw], -1)
    raised = np.cross(level, ahead)
    right = np.cos(roll)[:, None] * level - np.sin(roll)[:, None] * raised
    matrices = np.tile(np.eye(4), (len(poses), 1, 1))
    matrices[:, :3, :3] = np.stack([right, -np.cross(right, ahead), ahead], -1)
    matrices[:, :3, 3] = poses[:, :3]
    found = curate.cameras(matrices, up=(0, 0, 1))
    # The first camera gives the heading 0; all else is as it was.
    np.testing.assert_allclose(wrap(found[:, 3] - found[0, 3] - yaw + yaw[0]), 0, atol=1e-5)
    np.testing.assert_allclose(found[:, [2, 4, 5]], poses[:, [2, 4, 5]], atol=1e-3)
    assert found[0, 3] == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(curate.keyboard(found, FPS, GAME)[1:], keys[1:])
    np.testing.assert_allclose(curate.mouse(found, FPS)[1:], mouse[1:], atol=1e-4)
    down = np.eye(4)[None]
    with pytest.raises(ValueError, match='looks straight up or down'):
        curate.cameras(down, up=(0, 0, 1))
    with pytest.raises(ValueError, match=r'got \[3, 3\], expected \[F 4 4\]'):
        curate.cameras(np.eye(3))


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'speed': 0}, 'walker.speed: got 0'),
        ({'speed': 1, 'drag': 1}, 'walker.drag: got 1'),
        ({'speed': 1, 'smooth': 2}, 'walker.smooth: got 2, expected an odd'),
        ({'speed': 1, 'least': -1}, 'walker.least: got -1'),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Walker(**fields)


def test_clips_without_poses_are_refused():
    bare = replace(clip(0), pose=unknown(len(clip(0).frames))['pose'])
    with pytest.raises(RecordError, match='clip.pose: is unknown'):
        curate.label(bare, GAME)
    with pytest.raises(ValueError, match='got 1 frame'):
        curate.mouse(np.zeros((1, 6)), FPS)
