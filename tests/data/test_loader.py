"""Batches are crops of the clips, follow from the seed, and resume exactly."""

from dataclasses import replace

import numpy as np
import pytest

from matrix_jax.data.loader import Clips, Loader, crop, mirror
from matrix_jax.data.records import (
    CONTROLS,
    NULL,
    TELEMETRY,
    Clip,
    RecordError,
    unknown,
    write_shard,
)

FRAMES = 9


def make_clip(number):
    """Frame f shows its number and a left-to-right ramp; the key of latent j is number + j."""
    count = 17 + 4 * (number % 3)
    frames = np.zeros((count, 4, 6, 3), np.uint8)
    frames[..., 0] = np.arange(count)[:, None, None]
    frames[..., 1] = np.arange(6)
    frames[..., 2] = number
    latent = (np.arange(count) + 3) // 4
    return Clip(
        frames=frames,
        controls=((number + latent) % len(CONTROLS)).astype(np.int8),
        caption=f'caption {number % 3}',
        theme=('meadow', 'snow')[number % 2],
        seed=number,
        fps=16,
        telemetry=np.ones((count, len(TELEMETRY)), np.float32),
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('clips')
    write_shard(folder / 'train-00000.array_record', map(make_clip, range(4)))
    write_shard(folder / 'train-00001.array_record', map(make_clip, range(4, 7)))
    write_shard(folder / 'heldout-00000.array_record', [make_clip(7)])
    return folder


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_crops_with_their_controls(folder):
    loader = Loader(folder, FRAMES, batch=4, mirror=0.5)
    mirrored = set()
    for _ in range(6):
        batch = next(loader)
        assert batch['frames'].shape == (4, FRAMES, 4, 6, 3)
        assert batch['frames'].dtype == np.uint8
        assert batch['controls'].shape == (4, 3) and batch['controls'].dtype == np.int32
        for frames, controls, caption, telemetry in zip(
            batch['frames'], batch['controls'], batch['caption'], batch['telemetry'], strict=True
        ):
            start, number = int(frames[0, 0, 0, 0]), int(frames[0, 0, 0, 2])
            flipped = bool(frames[0, 0, 0, 1])
            window = crop(make_clip(number), start, FRAMES)
            window = mirror(window) if flipped else window
            mirrored.add(flipped)
            np.testing.assert_array_equal(frames, window.frames)
            np.testing.assert_array_equal(controls, window.controls[::4])
            np.testing.assert_array_equal(telemetry, window.telemetry)
            assert loader.captions[caption] == f'caption {number % 3}'
        names = [loader.names[one] for one in batch['clip']]
        assert names == [
            f'{folder}/train-0000{number // 4}.array_record record {number % 4}'
            for number in batch['frames'][:, 0, 0, 0, 2]
        ]
    assert mirrored == {False, True}


def test_mirror_swaps_left_and_right():
    clip = make_clip(1)
    seen = mirror(clip)
    np.testing.assert_array_equal(seen.frames[:, :, 0], clip.frames[:, :, -1])
    names = [CONTROLS[i].translate(str.maketrans('LR', 'RL')) for i in clip.controls]
    assert [CONTROLS[i] for i in seen.controls] == names
    assert dict(zip(TELEMETRY, seen.telemetry[0], strict=True)) == {
        'on_road': 1,
        'yaw_rate': -1,
        'speed': 1,
        'x': -1,
        'y': 1,
        'heading': -1,
    }
    np.testing.assert_array_equal(mirror(seen).frames, clip.frames)


def test_a_clip_without_label_has_none_in_the_mirror():
    clip = replace(make_clip(1), **unknown(len(make_clip(1).frames)))
    assert not mirror(clip).labelled
    np.testing.assert_array_equal(mirror(mirror(clip)).frames, clip.frames)


def test_folders_are_read_together(folder, tmp_path):
    unlabelled = replace(make_clip(8), caption='', **unknown(len(make_clip(8).frames)))
    write_shard(tmp_path / 'train-00000.array_record', [unlabelled])
    clips = Clips(f'{folder},{tmp_path}')
    assert len(clips) == 8 and not clips[7].labelled and clips.captions[0] == ''
    assert [clips[index].labelled for index in range(7)] == [True] * 7


def walk(number):
    """A first-person clip: keys, mouse and pose of frame f are told by f."""
    clip = make_clip(number)
    count = np.arange(len(clip.frames))
    return replace(
        clip,
        **unknown(len(count))
        | {
            'keyboard': (count[:, None] // [1, 2, 4, 8] % 2).astype(np.int8),
            'mouse': (count[:, None] * [1, 10]).astype(np.float32),
            'pose': (count[:, None] + np.arange(6) * 100).astype(np.float32),
        },
    )


def test_first_person_clips_give_keys_mouse_and_pose(folder, tmp_path):
    assert not {'keyboard', 'mouse', 'pose'} & set(next(Loader(folder, FRAMES, batch=2)))
    write_shard(tmp_path / 'train-00000.array_record', map(walk, range(3)))
    loader, sides = Loader(tmp_path, FRAMES, batch=4, mirror=0.5), set()
    for _ in range(4):
        batch = next(loader)
        assert (batch['controls'] == NULL).all()
        for row in range(4):
            start = int(batch['frames'][row, 0, 0, 0, 0])
            turned = bool(batch['frames'][row, 0, 0, 0, 1])
            window = slice(start, start + FRAMES)
            keys, mouse, pose = (batch[name][row] for name in ('keyboard', 'mouse', 'pose'))
            sides.add(turned)
            w, s, a, d = (np.arange(40)[window] // 2**bit % 2 for bit in range(4))
            np.testing.assert_array_equal(keys.T, (w, s, d, a) if turned else (w, s, a, d))
            side = -1 if turned else 1
            np.testing.assert_array_equal(mouse[:, 1], side * 10 * mouse[:, 0])
            np.testing.assert_array_equal(pose[:, 0], np.arange(40)[window])
            np.testing.assert_array_equal(pose[:, [1, 3]], side * (pose[:, :1] + [100, 300]))
            np.testing.assert_array_equal(pose[:, [2, 4]], pose[:, :1] + [200, 400])
    assert sides == {False, True}
    both = Loader([tmp_path, folder], FRAMES, batch=10, mirror=0.0)
    batch = next(both)
    cars = batch['controls'][:, 0] != NULL
    assert (batch['keyboard'][cars] == -1).all() and np.isnan(batch['pose'][cars]).all()
    assert (batch['keyboard'][~cars] >= 0).all() and cars.any() and not cars.all()


def test_no_mirror_keeps_every_crop(folder):
    loader = Loader(folder, FRAMES, batch=8, mirror=0.0)
    assert not next(loader)['frames'][:, 0, 0, 0, 1].any()


def test_every_clip_comes_once_an_epoch_in_another_order(folder):
    loader = Loader(folder, FRAMES, batch=7)
    epochs = [next(loader)['frames'][:, 0, 0, 0, 2].tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_same_seed_same_batches_and_another_seed_others(folder):
    a, b, c = (Loader(folder, FRAMES, batch=4, seed=seed) for seed in (3, 3, 4))
    first = next(a)
    assert_equal(first, next(b))
    assert not np.array_equal(first['frames'], next(c)['frames'])


@pytest.mark.parametrize('cache', [True, False])
def test_a_restored_loader_goes_on_exactly(folder, cache):
    loader = Loader(folder, FRAMES, batch=4, seed=1, cache=cache)
    for _ in range(5):
        next(loader)
    state = loader.state()
    rest = [next(loader) for _ in range(4)]
    again = Loader(folder, FRAMES, batch=4, seed=1)
    again.restore(state)
    for batch in rest:
        assert_equal(batch, next(again))


def test_processes_share_the_rows_of_a_batch(folder):
    whole = next(Loader(folder, FRAMES, batch=8))
    parts = [next(Loader(folder, FRAMES, batch=8, process=(i, 2))) for i in range(2)]
    for name, rows in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)
    with pytest.raises(ValueError, match='train.batch: got 8, expected a multiple of 3'):
        Loader(folder, FRAMES, batch=8, process=(0, 3))


def test_a_state_of_other_data_is_refused(folder):
    state = Loader(folder, FRAMES, batch=2, seed=1).state()
    with pytest.raises(ValueError, match='the state has clips 7, expected 1'):
        Loader(folder, FRAMES, batch=2, seed=1, split='heldout').restore(state)
    with pytest.raises(ValueError, match='the state has seed 1, expected 2'):
        Loader(folder, FRAMES, batch=2, seed=2).restore(state)


def test_splits_and_themes(folder):
    assert [clip.seed for clip in Clips(folder, 'heldout')] == [7]
    assert {clip.theme for clip in Clips(folder, themes=('snow',))} == {'snow'}
    assert len(Clips([folder, folder])) == 14


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'frames': 8, 'batch': 1}, r'loader.frames: got 8, expected 1 \+ 4k'),
        ({'frames': 9, 'batch': 0}, 'loader.batch: got 0'),
        ({'frames': 401, 'batch': 1}, 'no train clip of 401 frames'),
        ({'frames': 9, 'batch': 1, 'themes': ('mars',)}, 'theme mars'),
    ],
)
def test_wrong_arguments_are_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(folder, **arguments)


def test_missing_data_names_the_recorder(tmp_path):
    with pytest.raises(RecordError, match=r'matrix-jax collect'):
        Loader(tmp_path, FRAMES, batch=1)


@pytest.mark.parametrize('start', [2, -4, 12])
def test_crops_start_at_latent_frames(start):
    with pytest.raises(ValueError, match='crop.start'):
        crop(make_clip(0), start, FRAMES)
