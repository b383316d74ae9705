"""Recordings of Minecraft as VPT and GameFactory publish them, and what is refused."""

import json

import numpy as np
import pytest

from matrix_jax import video
from matrix_jax.data import ingest, minecraft, records
from tests.cli.command import run
from tests.data.test_footage import scene

SIZE = {'height': 32, 'width': 48}
KEYS = 'WSAD'


def line(frame, keys='', dx=0.0, dy=0.0, **more):
    """A line of a VPT recording, with a camera that walks south and turns."""
    return {
        'mouse': {'x': 640.0, 'y': 360.0, 'dx': dx, 'dy': dy, 'buttons': [], 'newButtons': []},
        'keyboard': {'keys': [f'key.keyboard.{key.lower()}' for key in keys] + ['key.keyboard.e']},
        'isGuiOpen': False,
        **{'xpos': 10.0, 'ypos': 64.0, 'zpos': 0.25 * frame, 'yaw': 2.0 * frame, 'pitch': -8.0},
        **more,
    }


def write_vpt(folder, name, lines, frames=None, start=''):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.jsonl').write_text(start + '\n'.join(map(json.dumps, lines)) + '\n')
    count = len(lines) if frames is None else frames
    video.write_video(folder / f'{name}.mp4', scene(1, count), fps=16, min_width=1)


def read(root, layout, out, **settings):
    """(clips, report) of a folder."""
    reader = minecraft.MinecraftReader(
        **SIZE, kind=layout, held_out=0.0, **{'shortest': 9} | settings
    )
    report = ingest.run(reader, root, minecraft.find(root, layout, 'A walk.'), out)
    shard = records.Shard(records.shards(out, 'train')[0])
    return [shard[index] for index in range(len(shard))], report


def test_the_line_of_a_frame_acts_on_the_next_one(tmp_path):
    keys = ['W', 'WA', '', 'S', 'D'] * 8
    moves = np.random.default_rng(0).normal(size=(40, 2)) * 10
    lines = [line(i, k, dx, dy) for i, (k, (dy, dx)) in enumerate(zip(keys, moves, strict=True))]
    write_vpt(tmp_path / 'in' / '10.0', 'a', lines, start='\ufeff')
    (clip,), report = read(tmp_path / 'in', 'vpt', tmp_path / 'out')
    assert len(clip.frames) == 37 and clip.theme == 'vpt' and clip.caption == 'A walk.'
    shown = video.fit(scene(1, 38)[1:], 32, 48)
    assert np.abs(clip.frames - shown.astype(float)).mean() < 6
    wanted = [[key in held for key in KEYS] for held in keys[:37]]
    np.testing.assert_array_equal(clip.keyboard, wanted)
    turned = moves[:37] * [-0.15, 0.15] * 16 / records.MOUSE_RATE
    np.testing.assert_allclose(clip.mouse, turned, rtol=1e-5)
    # A pose is that of its own frame: south is ahead, a turn to the right lowers the yaw.
    frames = np.arange(1, 38)
    np.testing.assert_allclose(clip.pose[:, 0], 25 * frames, rtol=1e-5)
    np.testing.assert_allclose(clip.pose[:, 1:3], [[1000, 6400]] * 37)
    np.testing.assert_allclose(clip.pose[:, 3], -np.radians(2.0 * frames), rtol=1e-5)
    np.testing.assert_allclose(clip.pose[:, 4], np.radians(8), rtol=1e-5)


def test_menus_and_gaps_of_the_recorder_are_left_out(tmp_path):
    lines = [line(frame, 'W') for frame in range(60)]
    for frame in (20, 21):
        lines[frame]['isGuiOpen'] = True
    lines[40] = {**lines[40], 'mouse': None}
    for one in lines:
        del one['xpos']  # as in the BASALT recordings
    write_vpt(tmp_path / 'in', 'a', lines)
    clips, report = read(tmp_path / 'in', 'vpt', tmp_path / 'out')
    # Frames 1 to 20, 23 to 40 and 42 to 59 follow a line that can be used.
    assert [len(clip.frames) for clip in clips] == [17, 17, 17]
    assert all(clip.keyboard[:, 0].all() and not clip.knows('pose') for clip in clips)


def test_recordings_with_faults_are_skipped_by_name(tmp_path):
    good = [line(frame) for frame in range(30)]
    write_vpt(tmp_path / 'in', 'good', good)
    write_vpt(tmp_path / 'in', 'long', good, frames=36)
    write_vpt(tmp_path / 'in', 'keys', [*good[:-1], {**good[0], 'keyboard': {'keys': 'w'}}])
    write_vpt(tmp_path / 'in', 'mouse', [*good[:-1], line(0, dx=float('inf'))])
    write_vpt(tmp_path / 'in', 'none', [*good[:-1], 3])
    write_vpt(tmp_path / 'in', 'cut', good)
    text = (tmp_path / 'in' / 'cut.jsonl').read_text()
    (tmp_path / 'in' / 'cut.jsonl').write_text(text[:-40])
    clips, report = read(tmp_path / 'in', 'vpt', tmp_path / 'out')
    assert len(clips) == 1
    said = {name: why.split(': ', 1)[1] for name, why in report.skipped.items()}
    assert said['long.mp4'] == 'got 30 lines, expected one for each of the 36 frames'
    assert said['keys.mp4'] == 'keyboard: expected an object with a list "keys"'
    assert said['mouse.mp4'] == 'mouse: expected an object with numbers "dx" and "dy"'
    assert said['none.mp4'] == 'expected an object with keyboard and mouse'
    assert said['cut.mp4'].startswith('not JSON') and 'line 30' in report.skipped['cut.mp4']


# --- GameFactory ---------------------------------------------------------------------------------


def write_gamefactory(folder, name, entries, captions=(), frames=None):
    for part in ('video', 'metadata'):
        (folder / part).mkdir(parents=True, exist_ok=True)
    content = {'biome': 'plains', 'actions': {str(key): one for key, one in entries.items()}}
    (folder / 'metadata' / f'{name}.json').write_text(json.dumps(content), encoding='utf-8')
    count = len(entries) if frames is None else frames
    video.write_video(folder / 'video' / f'{name}.mp4', scene(2, count), fps=16, min_width=1)
    if captions:
        head = 'Original video name, Start frame index, End frame index, Prompt\r\n'
        rows = ''.join(f'{row[0]},{row[1]},{row[2]},"{row[3]}"\r\n' for row in captions)
        (folder / 'annotation.csv').write_text('\ufeff' + head + rows, encoding='utf-8')


def entry(ws=0, ad=0, pitch=0.0, yaw=0.0, frame=0):
    deltas = {'pitch_delta': pitch, 'yaw_delta': yaw}
    place = {'pos': [3.0, 70.0, 0.2 * frame], 'pitch': 0.0, 'yaw': 90.0}
    return {'ws': ws, 'ad': ad, 'scs': 3, **deltas, **place}


def test_actions_have_the_number_of_their_frame(tmp_path):
    random = np.random.default_rng(0)
    ws, ad = random.integers(0, 3, (2, 60))
    turn = random.normal(size=(60, 2)) * 0.1
    entries = {i: entry(int(ws[i]), int(ad[i]), *turn[i], frame=i) for i in range(60)}
    captions = [
        ('seed_1_part_1.mp4', 0, 24, 'A desert, at noon.'),
        ('seed_1_part.mp4', 25, 59, 'A forest.'),
        ('seed_2_part_2.mp4', 0, 59, 'Rain.'),
    ]
    write_gamefactory(tmp_path / 'in' / 'data_2003', 'seed_1_part_1', entries, captions)
    (first, second), _ = read(tmp_path / 'in', 'gamefactory', tmp_path / 'out')
    assert [first.caption, second.caption] == ['A desert, at noon.', 'A forest.']
    for clip, start, end in ((first, 1, 22), (second, 25, 58)):
        assert len(clip.frames) == end - start
        keys = np.stack([ws == 1, ws == 2, ad == 1, ad == 2], axis=-1)[start:end]
        np.testing.assert_array_equal(clip.keyboard, keys)
        turned = turn[start:end] * [-15, 15] * 16 / records.MOUSE_RATE
        np.testing.assert_allclose(clip.mouse, turned, rtol=1e-5)
        np.testing.assert_allclose(clip.pose[:, 3], -np.pi / 2, rtol=1e-6)
        np.testing.assert_allclose(clip.pose[:, 0], 20.0 * np.arange(start, end), rtol=1e-5)
    shown = video.fit(scene(2, 58)[25:], 32, 48)
    assert np.abs(second.frames - shown.astype(float)).mean() < 6


@pytest.mark.parametrize(
    'change, said',
    [
        ({7: entry(ws=3)}, 'action 7: ws: got 3, expected 0, 1 or 2'),
        ({7: {**entry(), 'ad': True}}, 'action 7: ad: got True, expected 0, 1 or 2'),
        ({7: 4}, 'action 7: expected an object with ws and ad'),
        ({7: {**entry(), 'yaw_delta': 'x'}}, 'expected numbers pitch_delta and yaw_delta'),
        ({number: entry() for number in range(100, 120)}, 'got 50 actions, expected one for each'),
    ],
)
def test_a_wrong_action_is_named(tmp_path, change, said):
    entries = {frame: entry() for frame in range(30)} | change
    write_gamefactory(tmp_path, 'a', entries, frames=30)
    path = minecraft.actions_file(tmp_path / 'video' / 'a.mp4', 'gamefactory')
    with pytest.raises(ingest.IngestError, match=said):
        minecraft.read_gamefactory(path, np.arange(30) / 16)


@pytest.mark.parametrize(
    'text, said',
    [('a,b\n1,2\n', 'expected columns Original video name'), ('\0', 'annotation.csv'),
     ('Original video name,Start frame index,End frame index,Prompt\na.mp4,x,3,hm\n',
      'row 2: expected whole numbers of frames')],
)  # fmt: skip
def test_a_wrong_table_of_captions_is_named(tmp_path, text, said):
    write_gamefactory(tmp_path, 'a', {frame: entry() for frame in range(30)})
    (tmp_path / 'annotation.csv').write_text(text)
    with pytest.raises(ingest.IngestError, match=said):
        minecraft.read_gamefactory(tmp_path / 'metadata' / 'a.json', np.arange(30) / 16)


# --- the tool ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'given, said',
    [
        (('--vpt', 'NONE'), 'no such folder'),
        (('--vpt', 'EMPTY'), 'no video with NAME.jsonl beside it'),
        (('--gamefactory', 'EMPTY'), 'no video with metadata/NAME.json'),
        (('--gamefactory', 'VPT'), 'no video with metadata/NAME.json'),
        (('--vpt', 'VPT', '--vpt', ''), "--vpt: got '', expected a path"),
        (('--vpt', 'VPT', '--shortest', '0'), '--shortest: got 0'),
        (('--vpt', 'VPT', '--actions-map', 'x'), '--actions-map: is not an option with --vpt'),
        (('--vpt', 'VPT', '--lerobot', 'VPT'), 'got --lerobot and --vpt, expected one of'),
        (('--vpt', 'VPT', '--hours', '1'), '--hours: is not an option with --vpt'),
        (('--lerobot', 'VPT', '--caption', 'x'), '--caption: is not an option with --lerobot'),
    ],
)
def test_wrong_options_are_one_line_and_write_nothing(tmp_path, capsys, given, said):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'vpt').mkdir()
    (tmp_path / 'vpt' / 'a.mp4').touch()
    (tmp_path / 'vpt' / 'a.jsonl').touch()
    places = {'NONE': 'none', 'EMPTY': 'empty', 'VPT': 'vpt'}
    given = [tmp_path / places[one] if one in places else one for one in given]
    before = sorted(tmp_path.rglob('*'))
    assert run('collect', '--out', tmp_path / 'new' / 'out', *given) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith('error: ') and said in line
    assert sorted(tmp_path.rglob('*')) == before
