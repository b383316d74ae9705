"""A clip comes back as it was written, and what is not a clip is refused in one line."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from matrix_jax.data.records import (
    ACTIONS,
    CONTROLS,
    MIRRORED,
    Clip,
    RecordError,
    Shard,
    folders,
    pack,
    shards,
    unknown,
    unpack,
    write_shard,
)


def make_clip(seed=0, frames=17):
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, len(CONTROLS), 1 + (frames - 1) // 4).astype(np.int8)
    return Clip(
        frames=rng.integers(0, 256, (frames, 8, 12, 3), np.uint8),
        controls=np.concatenate([keys[:1], np.repeat(keys[1:], 4)]),
        caption=f'caption {seed % 3}',
        theme=('meadow', 'snow')[seed % 2],
        seed=seed,
        fps=16,
        telemetry=rng.normal(size=(frames, 6)).astype(np.float32),
    )


def assert_same(a, b):
    for name in ('frames', 'controls', 'telemetry'):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.caption, a.theme, a.seed, a.fps) == (b.caption, b.theme, b.seed, b.fps)


def test_shard_returns_the_clips(tmp_path):
    clips = [make_clip(seed, 9 + 4 * seed) for seed in range(4)]
    assert write_shard(tmp_path / 'train-00000.array_record', clips) == 4
    assert [p.name for p in tmp_path.iterdir()] == ['train-00000.array_record']
    shard = Shard(shards(tmp_path, 'train')[0])
    assert len(shard) == 4
    for index in (3, 0, 2, 1):
        assert_same(shard[index], clips[index])


def test_bytes_follow_from_the_clip():
    assert len({pack(make_clip(5)) for _ in range(8)}) == 1


def test_an_interrupted_shard_has_no_final_name(tmp_path):
    def clips():
        yield make_clip()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / 'train-00000.array_record', clips())
    with pytest.raises(RecordError, match='no train-'):
        shards(tmp_path, 'train')


@pytest.mark.parametrize('keep', [0, 100, -65536])
def test_truncated_shard_is_refused(tmp_path, keep):
    path = tmp_path / 'train-00000.array_record'
    write_shard(path, [make_clip(seed) for seed in range(3)])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RecordError, match='train-00000.array_record.*truncated') as error:
        Shard(path)
    assert '\n' not in str(error.value)


def test_damaged_record_is_named(tmp_path):
    path = tmp_path / 'train-00000.array_record'
    write_shard(path, [make_clip(seed, frames=65) for seed in range(3)])
    data = bytearray(path.read_bytes())
    data[2000:2100] = bytes(100)
    path.write_bytes(data)
    shard = Shard(path)
    with pytest.raises(RecordError, match='record 0: unreadable'):
        shard[0]
    assert_same(shard[2], make_clip(2, frames=65))


def test_foreign_bytes_are_refused():
    with pytest.raises(RecordError, match='record 7: not a clip'):
        unpack(b'no safetensors', 'record 7')


def walk(seed=0, frames=17):
    """A first-person clip."""
    rng, known = np.random.default_rng(seed), unknown(frames)
    return replace(
        make_clip(seed, frames),
        controls=known['controls'],
        keyboard=rng.integers(0, 2, (frames, 4)).astype(np.int8),
        mouse=rng.normal(size=(frames, 2)).astype(np.float32),
        pose=rng.normal(size=(frames, 6)).astype(np.float32),
    )


def test_keys_mouse_and_pose_come_back():
    clip = unpack(pack(walk()))
    for name in ACTIONS:
        np.testing.assert_array_equal(getattr(clip, name), getattr(walk(), name))
        assert clip.knows(name) and not make_clip().knows(name)
    footage = replace(walk(), **{name: unknown(17)[name] for name in ('keyboard', 'mouse')})
    again = unpack(pack(footage))
    assert [again.knows(name) for name in ACTIONS] == [False, False, True]


def test_records_of_the_first_version_are_read_and_later_ones_refused():
    old = pack(make_clip())
    assert b'version' not in old and b'keyboard' not in old
    assert unpack(old).keyboard.tolist() == [[-1] * 4] * 17 and np.isnan(unpack(old).pose).all()
    later = pack(walk()).replace(b'version\\": 2', b'version\\": 3')
    with pytest.raises(RecordError, match='record 1: not a clip .version 3, .* reads up to 2'):
        unpack(later, 'record 1')


@pytest.mark.parametrize(
    'changes, where',
    [
        (
            {'keyboard': np.zeros((17, 3), np.int8)},
            r'clip.keyboard: got int8 \(17, 3\), expected int8',
        ),
        ({'keyboard': np.full((17, 4), 2, np.int8)}, 'clip.keyboard: expected 0 or 1'),
        ({'keyboard': np.arange(68).reshape(17, 4).clip(-1, 1).astype(np.int8) - 1}, 'or for none'),
        ({'mouse': np.zeros((17, 2))}, 'clip.mouse: got float64'),
        ({'mouse': np.full((17, 2), np.inf, np.float32)}, 'clip.mouse: expected values for all'),
        ({'pose': np.full((17, 6), [np.nan, 0, 0, 0, 0, 0], np.float32)}, 'clip.pose: expected'),
    ],
)
def test_malformed_actions_are_refused(changes, where):
    with pytest.raises(RecordError, match=where):
        replace(walk(), **changes)


@pytest.mark.parametrize(
    'changes, where',
    [
        ({'frames': np.zeros((16, 8, 12, 3), np.uint8)}, 'got 16 frames, expected 1 [+] 4k'),
        ({'frames': np.zeros((17, 8, 12, 3), np.float32)}, 'clip.frames: got float32'),
        ({'controls': np.full(17, 10, np.int8)}, 'clip.controls'),
        ({'controls': np.arange(17).clip(0, 9).astype(np.int8)}, 'or of 9 alone'),
        ({'controls': np.zeros(5, np.int8)}, 'clip.controls'),
        ({'telemetry': np.zeros((17, 3), np.float32)}, 'clip.telemetry'),
    ],
)
def test_malformed_clip_is_refused(changes, where):
    with pytest.raises(RecordError, match=where):
        replace(make_clip(), **changes)


def test_mirrored_controls_swap_left_and_right():
    swapped = [CONTROLS[i] for i in MIRRORED]
    assert swapped == ['D', 'DR', 'DL', 'B', 'BR', 'BL', 'N', 'NR', 'NL']


def test_a_clip_without_label_comes_back():
    clip = replace(make_clip(3), **unknown(17))
    assert make_clip(3).labelled and not clip.labelled
    assert_same(unpack(pack(clip)), clip)


@pytest.mark.parametrize(
    'data, found',
    [('a', ['a']), ('a, b', ['a', 'b']), (['a', 'b'], ['a', 'b']), ('data/x,y', ['data/x', 'y'])],
)
def test_folders_with_commas(data, found):
    assert folders(data) == found


@pytest.mark.parametrize('data', ['', ',', []])
def test_no_folder_is_refused(data):
    with pytest.raises(RecordError, match='data: got .*expected folders'):
        folders(data)


def test_a_digest_names_the_content(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        write_shard(tmp_path / name, [make_clip(seed)])
    a, b, c = (Shard(tmp_path / name) for name in 'abc')
    assert a.path.stat().st_size == c.path.stat().st_size  # shards are padded
    assert a.digest() == b.digest() != c.digest()


def test_the_reader_of_the_guide_needs_only_its_libraries(tmp_path):
    guide = (Path(__file__).parents[2] / 'docs' / 'records.md').read_text()
    reader = guide.split('```python\n')[1].split('```')[0]
    assert len(reader.strip().splitlines()) <= 11 and 'matrix_jax' not in reader
    path = tmp_path / 'train-00000.array_record'
    write_shard(path, [make_clip(0), make_clip(1, frames=5)])
    done = subprocess.run(
        [sys.executable, '-c', reader, path], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith('caption 0 16 {') and "'frames': (17, 8, 12, 3)" in first
    assert second.startswith('caption 1 16 {') and "'controls': (5,)" in second
