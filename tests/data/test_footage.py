"""Footage: shots are found, poor clips named, files made once and byte for byte the same."""

import json

import numpy as np
import pytest

from matrix_jax import video
from matrix_jax.data import footage, ingest
from matrix_jax.data.records import NULL, RecordError, Shard
from tests.cli.command import run

SIZE = {'height': 32, 'width': 48}


def scene(seed, count, speed=1, height=36, width=64):
    """Frames [F H W 3] of a camera that pans over blurred random blocks."""
    blocks = np.random.default_rng(seed).integers(30, 230, (6, 40, 3)).astype(np.uint8)
    wide = video.resize(blocks[None], height, 40 * 16)[0]
    return np.stack([wide[:, speed * index : speed * index + width] for index in range(count)])


def write(path, frames, fps=16):
    path.parent.mkdir(exist_ok=True)
    video.write_video(path, frames, fps=fps, min_width=1)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two shots in one file, a captioned one below, and seven that give nothing."""
    folder = tmp_path_factory.mktemp('videos')
    write(folder / 'b.mp4', np.concatenate([scene(1, 40), scene(2, 50), scene(3, 12)]))
    write(folder / 'below' / 'a.MP4', scene(4, 66), fps=32)
    (folder / 'below' / 'a.txt').write_text(' A drive\nby day. \n')
    write(folder / 'dark.mp4', scene(5, 40) // 20)
    write(folder / 'flat.mp4', np.full((40, 36, 64, 3), 128, np.uint8))
    write(folder / 'still.mp4', np.repeat(scene(6, 1), 40, axis=0))
    write(folder / 'slow.mp4', scene(7, 40), fps=4)
    (folder / 'broken.mp4').write_text('no video')
    whole = (folder / 'b.mp4').read_bytes()
    middle = len(whole) // 2
    (folder / 'hole.mp4').write_bytes(whole[:middle] + bytes(2000) + whole[middle + 2000 :])
    (folder / 'empty.mkv').touch()
    (folder / 'notes.txt').write_text('no video either')
    return folder


def make(folder, out, workers=1, **settings):
    sources = footage.find(folder, 'Footage.')
    return ingest.run(footage.FootageReader(**SIZE, **settings), folder, sources, out, workers)


@pytest.fixture(scope='module')
def made(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('made') / 'out'
    return out, make(folder, out, held_out=0.0)


# --- measures ------------------------------------------------------------------------------------


def small(*parts):
    frames = np.concatenate(parts)
    return video.resize(frames, *footage.THUMBNAIL)


@pytest.mark.parametrize(
    'parts, found',
    [
        ([(1, 20, 1)], [(0, 20)]),
        ([(1, 20, 1), (2, 30, 1)], [(0, 20), (20, 50)]),
        ([(1, 20, 1), (2, 1, 1), (1, 20, 1)], [(0, 20), (20, 21), (21, 41)]),  # a flash
        ([(1, 60, 9)], [(0, 60)]),  # a fast pan
        ([(1, 30, 6), (2, 30, 6)], [(0, 30), (30, 60)]),
        ([(1, 1, 1)], [(0, 1)]),
    ],
)
def test_shots(parts, found):
    assert footage.shots(small(*(scene(*part) for part in parts))) == found


def test_the_fast_pan_is_above_the_bound_alone():
    assert footage.differences(small(scene(1, 60, 9))).max() > footage.CUT


@pytest.mark.parametrize(
    'frames, fault',
    [
        (scene(1, 20), ''),
        (scene(1, 20) // 20, 'dark'),
        (scene(1, 20) // 16 + 128, 'flat'),
        (np.repeat(scene(1, 1), 20, axis=0), 'static'),
    ],
)
def test_faults(frames, fault):
    assert footage.fault(small(frames)) == fault


def test_pieces_are_whole_latent_frames():
    spans = list(footage.pieces([(0, 600), (600, 640), (640, 641)]))
    assert spans == [(0, 257), (257, 514), (514, 599), (600, 637), (640, 641)]


def test_a_look_shows_what_the_clip_will_show(tmp_path):
    frames = scene(1, 2, height=64, width=64)
    frames[:, :8] = frames[:, -8:] = 0  # cropped away
    write(tmp_path / 'a.mp4', frames)
    shown = footage.thumbnails(tmp_path / 'a.mp4', 16, 32 / 48)
    fitted = video.fit(video.read_video(tmp_path / 'a.mp4'), 32, 48)
    assert shown.shape == (2, 16, 24, 3) and shown[:, (0, -1)].min() > 20
    boxes = fitted.reshape(2, 16, 2, 24, 2, 3).mean((2, 4))
    assert np.abs(boxes - shown).mean() < 4


# --- files ---------------------------------------------------------------------------------------


def test_what_is_kept_and_what_is_not(made):
    out, report = made
    assert report.dropped == {'short': 1, 'dark': 1, 'flat': 1, 'static': 1}
    assert (report.files, report.clips, report.frames) == (9, 3, 37 + 49 + 33)
    assert sorted(report.skipped) == ['broken.mp4', 'empty.mkv', 'hole.mp4', 'slow.mp4']
    assert report.skipped['hole.mp4'].startswith('hole.mp4: is damaged')
    assert 'got 4 frames per second, expected at least 8' in report.skipped['slow.mp4']
    assert 'broken.mp4: not readable as a video' in report.skipped['broken.mp4']
    shard = Shard(out / 'train-00000.array_record')
    clips = [shard[index] for index in range(len(shard))]
    assert [clip.caption for clip in clips] == ['Footage.', 'Footage.', 'A drive by day.']
    for clip, wanted in zip(clips, (scene(1, 37), scene(2, 49), scene(4, 66)[::2]), strict=True):
        assert clip.frames.shape == (len(wanted), 32, 48, 3) and clip.fps == 16
        assert (clip.controls == NULL).all() and np.isnan(clip.telemetry).all()
        assert np.abs(clip.frames - video.fit(wanted, 32, 48).astype(float)).mean() < 6
    assert clips[0].seed == clips[1].seed != clips[2].seed


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_same_files_make_the_same_bytes(folder, made, tmp_path):
    assert make(folder, tmp_path, held_out=0.0) == made[1]
    assert contents(tmp_path) == contents(made[0])


def test_a_restart_makes_only_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, 'SHARD_FILES', 2)
    first = make(folder, tmp_path, held_out=0.375)
    before = contents(tmp_path)
    assert [name for name in sorted(before) if name.endswith('record')] == [
        'heldout-00000.array_record',
        'train-00000.array_record',
    ]
    assert sum(name.endswith('.json') for name in before) == 1 + 5  # with the manifest
    (tmp_path / 'train-00000.json').unlink()  # killed between the shard and its report
    (tmp_path / 'heldout-00000.array_record').unlink()
    (tmp_path / 'heldout-00000.json').unlink()
    times = (tmp_path / 'train-00001.json').stat().st_mtime_ns
    assert make(folder, tmp_path, workers=2, held_out=0.375) == first
    assert contents(tmp_path) == before
    assert (tmp_path / 'train-00001.json').stat().st_mtime_ns == times
    shard = tmp_path / 'train-00000.array_record'
    shard.write_bytes(before[shard.name][:300])
    with pytest.raises(RecordError, match='train-00000.array_record.*truncated'):
        make(folder, tmp_path, held_out=0.375)


def test_a_video_is_in_one_split():
    sources = [
        ingest.VideoSource(f'{name}.mp4', start=start) for name in 'abcdefghij' for start in (0, 9)
    ]
    groups = list(ingest._groups(sources, [1] * 20, 0.3))
    paths = {
        split: {one.path for which, _, group in groups if which == split for one in group}
        for split in ('train', 'heldout')
    }
    assert len(paths['heldout']) == 3 and not paths['heldout'] & paths['train']
    assert sum(len(group) for _, _, group in groups) == 20


def test_other_videos_are_refused(folder, made, tmp_path):
    out = made[0]
    before = contents(out)
    with pytest.raises(ValueError, match=r'shortest 33 \(asked 9\)'):
        make(folder, out, shortest=9, held_out=0.0)
    write(tmp_path / 'new.mp4', scene(9, 5))
    with pytest.raises(ValueError, match=r'sources 9 \(asked 1\), digest .*; use another --out'):
        make(tmp_path, out, held_out=0.0)
    assert contents(out) == before


# --- the tool ------------------------------------------------------------------------------------


def test_the_tool_counts_and_names(folder, tmp_path, capsys):
    assert (
        run(
            'collect',
            '--videos',
            folder,
            '--out',
            tmp_path / 'out',
            '--world',
            'the_matrix:TINY',
            '--held-out',
            0,
            '--caption',
            'Footage.',
            '--shortest',
            2,
        )
        == 0
    )
    said = capsys.readouterr().out
    assert 'files: 5 read, 4 skipped' in said and 'skipped: empty.mkv: not' in said
    assert 'clips: 3 kept, 4 dropped (dark 1, flat 1, short 1, static 1)' in said
    manifest = json.loads((tmp_path / 'out' / 'manifest.json').read_text())
    assert (manifest['height'], manifest['width'], manifest['shortest']) == (32, 48, 33)


@pytest.mark.parametrize(
    'given, said',
    [
        (('--videos', 'VIDEOS/below/none'), 'no such folder'),
        (('--videos', 'EMPTY'), 'no video in it'),
        (('--videos', 'BROKEN'), 'no clip was kept; skipped: '),
        (('--videos', 'VIDEOS', '--hours', '1'), '--hours: is not an option with --videos'),
        (('--videos', 'VIDEOS', '--frames', '65'), '--frames: is not an option with --videos'),
        (('--videos', 'VIDEOS', '--shortest', '0'), '--shortest: got 0'),
        (('--videos', 'VIDEOS', '--shortest', '99'), '--shortest: got 1585 frames'),
        (('--videos', 'VIDEOS', '--shortest', '1e300'), '--shortest: got 1e+300, expected seconds'),
        (('--videos', ''), "--videos: got '', expected a path"),
        (('--videos', 'VIDEOS', '--out', 'BROKEN/a.mp4'), 'a.mp4 is not a folder'),
        (('--videos', 'VIDEOS', '--out', ''), "--out: got '', expected a path"),
        (('--videos', 'VIDEOS', '--held-out', '1'), '--held-out: got 1'),
        (('--videos', 'VIDEOS', '--workers', '0'), '--workers: got 0'),
        (('--videos', 'VIDEOS', '--world', 'mars'), "unknown world 'mars'"),
        (('CarRacing-v3', '--videos', 'VIDEOS'), 'got ENV and --videos, expected one of'),
        (('CarRacing-v3', '--caption', 'x'), '--caption: is not an option with ENV'),
        ((), 'got nothing to read'),
    ],
)
def test_wrong_options_are_one_line_and_write_nothing(folder, tmp_path, capsys, given, said):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'a.mp4').touch()
    places = {'VIDEOS': folder, 'EMPTY': tmp_path / 'empty', 'BROKEN': tmp_path / 'broken'}
    for name, place in places.items():
        given = [one.replace(name, str(place)) for one in given]
    before = sorted(tmp_path.rglob('*'))
    assert run('collect', '--out', tmp_path / 'new' / 'out', *given) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith('error: ') and said in line
    assert sorted(tmp_path.rglob('*')) == before
