"""Files appear whole or not at all; frames keep their order, rate and size."""

import os
import subprocess

import numpy as np
import pytest

from matrix_jax import video
from matrix_jax.video import VideoError


def ramp(count, height=64, width=96):
    """Frames told apart by their grey level: 8, 16, 24, ..."""
    return [np.full((height, width, 3), 8 * (i + 1), np.uint8) for i in range(count)]


def levels(frames):
    return [round(float(frame.mean()) / 8) - 1 for frame in frames]


@pytest.mark.parametrize('suffix', ['.mp4', '.gif'])
def test_write_enlarges_and_keeps_order(tmp_path, suffix):
    path = tmp_path / 'new' / 'folder' / f'clip{suffix}'
    assert video.write_video(path, iter(ramp(12)), fps=16) == 12
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    if suffix == '.mp4':
        frames = video.read_video(path)
        assert frames.shape == (12, 256, 384, 3) and frames.dtype == np.uint8
        assert levels(frames) == list(range(12))


def test_writing_starts_no_process(tmp_path, monkeypatch):
    """A fork of a process with threads can hang."""

    def refuse(*args, **kwargs):
        raise AssertionError('a process was started')

    for name in ('fork', 'posix_spawn'):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(subprocess, 'Popen', refuse)
    assert video.write_video(tmp_path / 'a.mp4', ramp(4), fps=12.5) == 4
    assert video.frame_rate(tmp_path / 'a.mp4') == 12.5


def test_odd_sides_become_even(tmp_path):
    video.write_video(tmp_path / 'a.mp4', ramp(3, 33, 45), min_width=1)
    assert video.read_video(tmp_path / 'a.mp4').shape == (3, 34, 46, 3)


def test_picture_survives_the_codec(tmp_path):
    y, x = np.mgrid[0:64, 0:96]
    frame = np.stack([x * 2, y * 3, 200 - x], -1).astype(np.uint8)
    video.write_video(tmp_path / 'a.mp4', [frame] * 4)
    read = video.read_video(tmp_path / 'a.mp4')[0]
    error = read.astype(float) - video.enlarge(frame)
    assert np.sqrt((error**2).mean()) < 4
    assert np.abs(error.mean((0, 1))).max() < 2  # no channel swapped, no colour cast


@pytest.mark.parametrize(
    'fps, count, expected',
    [
        (16, None, list(range(20))),
        (32, None, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        (32, 3, [0, 2, 4]),
        (24, None, [0, 2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18]),
        (8, 5, [0, 0, 1, 2, 2]),
        (16, 99, list(range(20))),
    ],
)
def test_read_picks_frames_at_16_per_second(tmp_path, fps, count, expected):
    video.write_video(tmp_path / 'a.mp4', ramp(20), fps=fps)
    assert levels(video.read_video(tmp_path / 'a.mp4', count=count)) == expected


def broken(count):
    yield from ramp(count)
    raise RuntimeError('out of memory')


def test_no_partial_file_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError, match='out of memory'):
        video.write_video(tmp_path / 'a.mp4', broken(5))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'name, frames, keys, words',
    [
        ('.', ramp(2), None, 'is a folder'),
        ('a.avi', ramp(2), None, "got suffix '.avi', expected .mp4 or .gif"),
        ('a', ramp(2), None, "got suffix 'none'"),
        ('new/a.mp4', [], None, 'no frames'),
        ('a.mp4', ramp(3), ['D', 'D'], 'keys: got 2, expected one per frame'),
        (
            'a.mp4',
            ramp(1) + ramp(1, 32),
            None,
            r'frame 1: got \[32, 96, 3\], expected \[64, 96, 3\]',
        ),
        ('a.mp4', [np.zeros((4, 4, 3))], None, r'frame 0: got float64\[4, 4, 3\]'),
    ],
)
def test_refused_before_anything_stays(tmp_path, name, frames, keys, words):
    with pytest.raises(VideoError, match=words):
        video.write_video(tmp_path / name, frames, keys=keys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('read', [video.read_video, video.read_image])
def test_unreadable_files_are_one_clear_line(tmp_path, read):
    (tmp_path / 'text.mp4').write_text('not a video at all')
    (tmp_path / 'empty.mp4').touch()
    for name, words in (
        ('text.mp4', 'not readable as a'),
        ('empty.mp4', 'not readable as a'),
        ('nowhere.mp4', 'no such file'),
        ('', 'is a folder'),
    ):
        with pytest.raises(VideoError, match=words) as error:
            read(tmp_path / name)
        assert '\n' not in str(error.value)


def test_image_round_trip(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    video.write_image(tmp_path / 'new' / 'a.png', picture)
    np.testing.assert_array_equal(video.read_image(tmp_path / 'new' / 'a.png'), picture)


@pytest.mark.parametrize('height, width', [(64, 96), (40, 40), (30, 90), (128, 96)])
def test_fit_covers_and_crops_the_centre(height, width):
    frame = np.zeros((1, 60, 120, 3), np.uint8)
    frame[:, :, 60:] = 200
    fitted = video.fit(frame, height, width)
    assert fitted.shape == (1, height, width, 3)
    assert (fitted[0, :, 0] == 0).all() and (fitted[0, :, -1] == 200).all()
    edge = int(np.argmax(fitted[0, 0, :, 0] > 100))
    assert abs(edge - width / 2) <= 1


def test_fit_at_the_same_size_changes_nothing():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    np.testing.assert_array_equal(video.fit(frames, 8, 12), frames)
    np.testing.assert_array_equal(video.resize(frames, 8, 12), frames)
    assert video.resize(frames, 20, 9).shape == (2, 20, 9, 3)


def test_each_control_draws_its_own_keys():
    frame = np.full((256, 384, 3), 90, np.uint8)
    drawn = {
        symbol: video.draw_keys(frame, symbol)
        for symbol in ('D', 'DL', 'DR', 'B', 'BL', 'BR', 'N', 'NL', 'NR')
    }
    assert len({picture.tobytes() for picture in drawn.values()}) == 9
    assert (frame == 90).all()
    lit = {
        symbol: int((picture[..., 0].astype(int) - picture[..., 2] > 150).sum())
        for symbol, picture in drawn.items()
    }
    assert lit['N'] == 0 < lit['D'] < lit['DL']
    for picture in drawn.values():
        assert (picture[:150] == 90).all() and (picture[:, 200:] == 90).all()


def test_a_keyboard_and_a_mouse_are_drawn():
    frame = np.full((96, 160, 3), 90, np.uint8)
    pad = (('W', 0, 1), ('A', 1, 0))
    drawn = [
        video.draw_keys(frame, video.KeyOverlay(pad, frozenset(lit), stick))
        for lit, stick in (
            ('W', None),
            ('A', None),
            ('', (0.0, 0.0)),
            ('', (0.1, 0.0)),
            ('', (0.0, -0.02)),
        )
    ]
    for index, one in enumerate(drawn):
        assert one.shape == frame.shape and np.array_equal(one[:70], frame[:70])
        assert not any(np.array_equal(one, other) for other in drawn[:index])


def test_keys_fit_on_a_tiny_frame():
    assert video.draw_keys(np.zeros((12, 16, 3), np.uint8), 'D').shape == (12, 16, 3)


def test_contact_sheet():
    sheet = video.contact_sheet(ramp(5, 10, 20), columns=3, gap=2)
    assert sheet.shape == (2 * 12 + 2, 3 * 22 + 2, 3)
    assert sheet[3, 3, 0] == 8 and sheet[15, 25, 0] == 40 and sheet[15, 47, 0] == 255
