"""Camera files of videos: poses with z up, the field of view of a world, and what is refused."""

import numpy as np
import pytest

from matrix_jax import video
from matrix_jax.data import cameras, footage, ingest, records
from matrix_jax.nn import camera
from matrix_jax.train.memory_stage import camera_poses

SIZE = {'height': 32, 'width': 48}


def looking(yaw, pitch=0.0, place=(0, 0, 0)):
    """Camera to world [4 4] (x right, y down, z ahead), turned right by yaw, up by pitch."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    tilt = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    made = np.eye(4)
    made[:3, :3], made[:3, 3] = turn @ tilt, place
    return made


def walk(count, seed=0):
    """Cameras that turn right and walk on, in a world with axes of its own."""
    axes = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    axes *= np.sign(np.linalg.det(axes))
    own = np.eye(4)
    own[:3, :3], own[:3, 3] = axes, (1, 2, 3)
    turns = np.linspace(0, 2, count)
    places = np.stack([np.sin(turns), 0 * turns, turns], axis=1)
    return own @ np.stack([looking(*one) for one in zip(turns, 0 * turns, places, strict=True)])


def write(path, cams, focal=32.0, width=64, height=36):
    intrinsics = np.tile([focal, focal, width / 2, height / 2], (len(cams), 1))
    np.savez(path, extrinsics_c2w=cams, intrinsics=intrinsics)


def test_poses_look_ahead_left_and_up():
    one, left, up, on = cameras.poses(
        np.stack([looking(0), looking(-0.3), looking(0, 0.2), looking(0, 0, (1, 0, 2))])
    )
    # The second camera looks to the left, so its yaw is positive; up and ahead are those of all.
    np.testing.assert_allclose(one[:3], 0, atol=1e-6)
    assert left[3] == pytest.approx(0.3, abs=0.02) and up[4] - one[4] == pytest.approx(
        0.2, abs=0.02
    )
    assert on[0] == pytest.approx(200, abs=15) and on[1] == pytest.approx(-100, abs=1)


def test_a_network_sees_the_same_movement_as_the_camera_file():
    cams = walk(7)
    poses = cameras.poses(cams, units=100)
    found = np.asarray(camera.extrinsics(np.asarray(camera_poses(poses))))
    for number in range(1, len(cams)):
        want = np.linalg.inv(cams[0]) @ cams[number]
        np.testing.assert_allclose(camera.between(found[0], found[number]), want, atol=1e-4)


@pytest.mark.parametrize(
    'size, focal, box',
    [
        ((36, 64), 0.5, (0, 0, 36, 64)),
        ((36, 64), 1.0, (9, 16, 18, 32)),
        ((36, 64), 0.4, None),
        ((30, 64), 0.5, None),
    ],
)
def test_frames_are_cut_to_the_field_of_view_of_the_world(size, focal, box):
    intrinsics = np.array([32.0, 32.0, 32.0, size[0] / 2])
    assert cameras.crop_box(size, intrinsics, focal, 36 / 64) == box


@pytest.fixture
def folder(tmp_path):
    blocks = np.random.default_rng(0).integers(30, 230, (6, 40, 3)).astype(np.uint8)
    wide = video.resize(blocks[None], 36, 640)[0]
    frames = np.stack([wide[:, at : at + 64] for at in range(66)])
    for name in ('walk', 'plain', 'narrow', 'short'):
        video.write_video(tmp_path / f'{name}.mp4', frames, fps=32, min_width=1)
    write(tmp_path / 'walk.npz', walk(66))
    write(tmp_path / 'narrow.npz', walk(66), focal=90.0)
    write(tmp_path / 'short.npz', walk(40))
    return tmp_path


def test_clips_of_footage_have_the_poses_of_its_camera_file(folder, tmp_path):
    out = tmp_path / 'out'
    sources = footage.find(folder)
    reader = footage.FootageReader(**SIZE, held_out=0.0, focal=0.6)
    report = ingest.run(reader, folder, sources, out)
    assert report.dropped == {'narrow': 1} and list(report.skipped) == ['short.mp4']
    assert 'short.npz: got 40 cameras, expected one for each frame' in report.skipped['short.mp4']
    shard = records.Shard(records.shards(out, 'train')[0])
    plain, seen = shard[0], shard[1]
    assert not plain.knows('pose') and seen.knows('pose') and not seen.knows('keyboard')
    want = cameras.read(folder / 'walk.npz').poses[::2]
    np.testing.assert_allclose(seen.pose, want[: len(seen.pose)])
    assert seen.frames.shape == plain.frames.shape
    # At the larger focal length, the middle of the frame is enlarged.
    assert np.abs(np.subtract(seen.frames, plain.frames, dtype=float)).mean() > 1
    write(folder / 'walk.npz', walk(66, seed=1))
    with pytest.raises(ValueError, match='recorded with other settings: digest'):
        ingest.run(reader, folder, footage.find(folder), out)


@pytest.mark.parametrize(
    'arrays, words',
    [
        ({'extrinsics_c2w': np.eye(4)[None]}, 'has no .*intrinsics'),
        ({'extrinsics_c2w': np.eye(4), 'intrinsics': np.ones((4, 4))}, r'expected \[N 4 4\]'),
        ({'extrinsics_c2w': np.eye(4)[None], 'intrinsics': np.ones((2, 4))}, r'got \[1, 4, 4\]'),
        ({'extrinsics_c2w': 2 * np.eye(4)[None], 'intrinsics': np.ones((1, 4))}, 'expected rot'),
        ({'extrinsics_c2w': np.eye(4)[None], 'intrinsics': np.zeros((1, 4))}, 'focal lengths'),
        ({'extrinsics_c2w': np.eye(4)[None], 'intrinsics': [[np.nan] * 4]}, 'expected finite'),
    ],
)
def test_other_files_are_refused(arrays, words, tmp_path):
    np.savez(tmp_path / 'a.npz', **arrays)
    with pytest.raises(ingest.IngestError, match=words):
        cameras.read(tmp_path / 'a.npz')
    (tmp_path / 'b.npz').write_text('no cameras')
    with pytest.raises(ingest.IngestError, match='not a readable camera file'):
        cameras.read(tmp_path / 'b.npz')
