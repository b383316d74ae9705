"""Cameras: poses by hand, laws of rays and overlaps; tests/test_parity.py replays the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.nn import camera

# One program each: a trajectory of single operations would compile for minutes.
next_pose, poses, extrinsics = map(jax.jit, (camera.next_pose, camera.poses, camera.extrinsics))
relative_poses = jax.jit(camera.relative_poses, static_argnums=1)
interpolate, view_overlap = jax.jit(camera.interpolate), jax.jit(camera.view_overlap)
FORWARD, BACK, LEFT, RIGHT = np.eye(6, dtype=np.float32)[:4]
ZERO_INIT = np.zeros(2, np.float32)


def pose(x=0.0, y=0.0, pitch=0.0, yaw=0.0):
    return np.float32([x, y, 0, pitch, yaw])


def walk(frames=20, seed=0):
    """Cameras of a random walk [frames 4 4]."""
    draw = np.random.default_rng(seed)
    keyboard = draw.integers(0, 2, (frames, 6)).astype(np.float32)
    mouse = draw.uniform(-1, 1, (frames, 2)).astype(np.float32)
    return np.asarray(extrinsics(poses(pose(), keyboard, mouse)[0]))


@pytest.mark.parametrize(
    'keys, moved',
    [
        (FORWARD, (12.35, 0)),
        (BACK, (-12.35, 0)),
        (RIGHT, (0, 12.35)),
        (LEFT, (0, -12.35)),
        (FORWARD + RIGHT, (8.73, 8.73)),
        (FORWARD + BACK, (0, 0)),
        (FORWARD + BACK + LEFT, (0, -12.35)),
        (0.4 * FORWARD, (0, 0)),
    ],
)
def test_keys_move_along_the_axes(keys, moved):
    np.testing.assert_allclose(next_pose(pose(), keys, ZERO_INIT), pose(*moved), atol=1e-5)
    turned = next_pose(pose(yaw=90), keys, ZERO_INIT)
    np.testing.assert_allclose(turned, pose(-moved[1], moved[0], yaw=90), atol=1e-5)


@pytest.mark.parametrize(
    'mouse, yaw, want',
    [
        ((0.1, -0.2), 0, (1.5, -3)),
        ((0.0199, 0.02), 0, (0, 0.3)),
        ((0, 1), 170, (0, -175)),
        ((0, -1), -170, (0, 175)),
        ((0, 0.5), 172.5, (0, 180)),
    ],
)
def test_the_mouse_rotates_beyond_a_dead_zone_and_yaw_wraps(mouse, yaw, want):
    got = next_pose(pose(yaw=yaw), 0 * FORWARD, np.float32(mouse))
    np.testing.assert_allclose(got[3:], want, atol=1e-5)


def test_a_trajectory_may_be_continued():
    draw = np.random.default_rng(1)
    keyboard = draw.integers(0, 2, (2, 9, 6)).astype(np.float32)
    mouse = draw.uniform(-1, 1, (2, 9, 2)).astype(np.float32)
    whole, end = poses(pose(), keyboard, mouse)
    first, middle = poses(pose(), keyboard[:, :4], mouse[:, :4])
    second, last = poses(middle, keyboard[:, 4:], mouse[:, 4:])
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), whole)
    np.testing.assert_array_equal(last, end)
    np.testing.assert_array_equal(whole[:, 0], np.zeros((2, 5)))


def test_a_camera_looks_where_its_pose_moves():
    at = extrinsics(pose(100, 200, yaw=90))
    np.testing.assert_allclose(at[:3, 3], [1, 2, 0], atol=1e-6)
    np.testing.assert_allclose(at[:3, 2], [0, 1, 0], atol=1e-6)  # forward
    up = extrinsics(pose(pitch=90))
    np.testing.assert_allclose(up[:3, 2], [0, 0, -1], atol=1e-6)


def test_interpolation_goes_through_the_given_cameras_and_half_way_between():
    given = walk()
    at = interpolate(given, np.arange(20), np.float32([0, 7, 19]))
    np.testing.assert_allclose(at, given[[0, 7, 19]], atol=1e-5)
    ends = extrinsics(np.stack([pose(yaw=170), pose(100, yaw=-150)]))
    middle = interpolate(ends, np.float32([2, 4]), np.float32([3]))
    np.testing.assert_allclose(middle[0], extrinsics(pose(50, yaw=-170)), atol=1e-5)
    right = np.asarray(ends) * np.float32([1, 1, -1, 1])  # right-handed axes
    middle = interpolate(right, np.float32([2, 4]), np.float32([3]))
    np.testing.assert_allclose(middle[0, :3, :3] @ middle[0, :3, :3].T, np.eye(3), atol=1e-5)


@pytest.mark.parametrize('framewise', [True, False])
def test_relative_poses_do_not_depend_on_the_world(framewise):
    given, world = walk(), extrinsics(pose(300, -20, pitch=30, yaw=77))
    relative = relative_poses(given, framewise)
    moved = relative_poses(jnp.einsum('ij,njk->nik', world, given), framewise)
    np.testing.assert_allclose(moved, relative, atol=2e-5)
    np.testing.assert_allclose(relative[0], np.eye(4), atol=1e-6)
    assert np.linalg.norm(relative[:, :3, 3], axis=-1).max() == pytest.approx(1, abs=1e-5)
    still = relative_poses(np.repeat(given[5:6], 4, axis=0), framewise)
    np.testing.assert_array_equal(still[:, :3, 3], 0)


def test_rays_of_an_unmoved_camera_point_to_its_pixels():
    rays = camera.plucker(np.eye(4, dtype=np.float32)[None], 4, 8, patch=2)
    assert rays.shape == (1, 2, 4, 24)
    origin, direction = np.split(np.asarray(rays[0]).reshape(2, 4, 2, 3, 2, 2), 2, axis=2)
    assert not origin.any()
    direction = direction[:, :, 0] / direction[:, :, 0, 2:3]
    np.testing.assert_allclose(direction[0, 0, :2, 0, 1], [-0.625, -0.75], atol=1e-6)
    np.testing.assert_allclose(direction[1, 3, :2, 1, 0], [0.625, 0.75], atol=1e-6)


def test_overlap_is_whole_with_itself_none_behind_and_symmetric_in_turns():
    cameras = extrinsics(np.stack([pose(yaw=yaw) for yaw in (0, 45, -45, 180)]))
    overlap = view_overlap(cameras, cameras)
    assert overlap.shape == (4, 4)
    assert (np.diag(overlap) > 0.75).all()  # all but the nearest and the farthest points
    assert overlap[0, 3] == overlap[3, 0] == 0
    np.testing.assert_allclose(overlap[0, 1], overlap[0, 2], atol=0.06)
    assert 0.2 < overlap[0, 1] < 0.7
    batched = view_overlap(cameras[None, :2], cameras[None])
    np.testing.assert_array_equal(batched[0], overlap[:2])


def test_the_earliest_of_equal_views_is_chosen_and_unknown_ones_are_not():
    overlap = np.float32([[0.2, 0.9, 0.5, 0.9], [0.1, 0.0, 0.1, 0.3]])
    frames = np.int32([4, 9, 2, 3])
    chosen, score = camera.best_views(overlap, frames, np.ones(4, bool))
    assert chosen.tolist() == [3, 3] and score.tolist() == pytest.approx([0.9, 0.3])
    chosen, score = camera.best_views(overlap, frames, np.array([True, True, True, False]))
    assert chosen.tolist() == [1, 2] and score.tolist() == pytest.approx([0.9, 0.1])
    chosen, score = camera.best_views(overlap, frames, np.zeros(4, bool))
    assert score.tolist() == [-1, -1]
