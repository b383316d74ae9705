"""LeRobot data sets of versions 2.1 and 3.0: read as clips, written from clips, and refused."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from matrix_jax import video
from matrix_jax.controls.driving import SYMBOLS
from matrix_jax.data import actions_map, lerobot, lerobot_export, records
from tests.cli.command import run
from tests.data.test_footage import scene

MAP = """\
keyboard:
  W: action[ahead] > 0.5
  A: action[1] < -0.5
  D: action[1] > 0.5
mouse:
  pitch: action[look_up] * -1
  yaw: action[3]
  unit: degrees
driving: {forward: 'action[ahead] > 0.5', left: 'action[1] < -0.5', right: 'action[1] > 0.5'}
"""
NAMES = ['ahead', 'aside', 'look_up', 'look_right']
CAMERA = 'observation.images.front'
LENGTHS = (41, 13, 49)
TASKS = ('walk to the door', 'short', ' look\n around ')


@pytest.fixture
def parquet():
    return pytest.importorskip('pyarrow.parquet', reason='needs pyarrow')


def actions(episode):
    """Actions [N 4] of an episode."""
    random = np.random.default_rng(episode)
    found = np.concatenate(
        [random.integers(-1, 2, (LENGTHS[episode], 2)), random.normal(size=(LENGTHS[episode], 2))],
        axis=1,
    )
    return found.astype(np.float32)


def rows(episode, first):
    count = LENGTHS[episode]
    return {
        'action': list(actions(episode)),
        'frame_index': np.arange(count),
        'timestamp': (np.arange(count) / 16).astype(np.float32),
        'episode_index': np.full(count, episode),
        'index': first + np.arange(count),
        'task_index': np.full(count, 2 - episode),
    }


def info(version, **more):
    features = {
        CAMERA: {'dtype': 'video', 'shape': [36, 64, 3], 'names': ['height', 'width', 'channels']},
        'action': {'dtype': 'float32', 'shape': [4], 'names': {'motors': NAMES}},
        'task_index': {'dtype': 'int64', 'shape': [1], 'names': None},
    }
    return {'codebase_version': version, 'fps': 16, 'features': features, **more}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\ufeff' + json.dumps(content), encoding='utf-8')


def write_rows(parquet, path, *parts):
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: np.concatenate([list(part[name]) for part in parts]) for name in parts[0]}
    parquet.write_table(pyarrow.table({k: list(v) for k, v in columns.items()}), path)


def write_second(parquet, root):
    """Version 2.1: a video and a parquet file per episode, chunks of two."""
    write_json(
        root / 'meta' / 'info.json',
        info(
            'v2.1',
            chunks_size=2,
            data_path='data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet',
            video_path='videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4',
        ),
    )
    lines = [json.dumps({'task_index': 2 - one, 'task': task}) for one, task in enumerate(TASKS)]
    (root / 'meta' / 'tasks.jsonl').write_text('\n'.join(lines) + '\n')
    lines = [
        json.dumps({'episode_index': one, 'length': length, 'tasks': [TASKS[one]]})
        for one, length in enumerate(LENGTHS)
    ]
    (root / 'meta' / 'episodes.jsonl').write_text('\ufeff' + '\r\n'.join(lines), encoding='utf-8')
    for one, length in enumerate(LENGTHS):
        name = f'chunk-{one // 2:03d}'
        write_rows(parquet, root / 'data' / name / f'episode_{one:06d}.parquet', rows(one, 0))
        path = root / 'videos' / name / CAMERA / f'episode_{one:06d}.mp4'
        video.write_video(path, scene(one, length), fps=16, min_width=1)


def write_third(parquet, root):
    """Version 3.0: one video and one parquet file for all episodes."""
    import pyarrow

    write_json(
        root / 'meta' / 'info.json',
        info(
            'v3.0',
            data_path='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
            video_path='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4',
        ),
    )
    starts = np.cumsum([0, *LENGTHS])[:-1]
    key = f'videos/{CAMERA}'
    place = {
        f'{name}/{kind}_index': [0] * 3 for name in ('data', key) for kind in ('chunk', 'file')
    }
    episodes = {
        'episode_index': [0, 1, 2],
        'length': list(LENGTHS),
        'tasks': [[task] for task in TASKS],
        **place,
        f'{key}/from_timestamp': list(starts / 16),
    }
    path = root / 'meta' / 'episodes' / 'chunk-000' / 'file-000.parquet'
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table(episodes), path)
    tasks = pyarrow.table({'task_index': [2, 1, 0], '__index_level_0__': list(TASKS)})
    parquet.write_table(tasks, root / 'meta' / 'tasks.parquet')
    parts = [rows(one, start) for one, start in enumerate(starts)]
    write_rows(parquet, root / 'data' / 'chunk-000' / 'file-000.parquet', *parts)
    frames = np.concatenate([scene(one, length) for one, length in enumerate(LENGTHS)])
    path = root / 'videos' / CAMERA / 'chunk-000' / 'file-000.mp4'
    video.write_video(path, frames, fps=16, min_width=1)


def collect(root, out, *more, world='the_matrix:TINY', **options):
    given = [part for name, value in options.items() for part in (f'--{name}', value)]
    return run('collect', '--lerobot', root, '--out', out, '--world', world, *given, *more)


def clips(out, split='train'):
    return [
        clip
        for path in records.shards(out, split)
        for clip in (lambda shard: [shard[index] for index in range(len(shard))])(
            records.Shard(path)
        )
    ]


@pytest.mark.parametrize('write', [write_second, write_third])
def test_episodes_become_clips_with_actions_and_captions(parquet, write, tmp_path, capsys):
    write(parquet, tmp_path / 'set')
    (tmp_path / 'map.yaml').write_text(MAP)
    out = tmp_path / 'out'
    more = ('--actions-map', tmp_path / 'map.yaml', '--held-out', 0, '--shortest', 1.5)
    assert collect(tmp_path / 'set', out, *more) == 0
    assert 'clips: 2 kept, 1 dropped (short 1)' in capsys.readouterr().out
    for clip, episode in zip(clips(out), (0, 2), strict=True):
        # An action makes the next frame, so the first frame has none.
        count = (LENGTHS[episode] - 2) // 4 * 4 + 1
        assert clip.frames.shape == (count, 32, 48, 3) and clip.theme == 'lerobot'
        assert clip.caption == ' '.join(TASKS[episode].split())
        shown = video.fit(scene(episode, count + 1)[1:], 32, 48)
        assert np.abs(clip.frames - shown.astype(float)).mean() < 6
        ahead, aside, up, right = actions(episode)[:count].T
        wanted = np.stack([ahead > 0, 0 * ahead, aside < 0, aside > 0], axis=-1)
        np.testing.assert_array_equal(clip.keyboard, wanted)
        turned = np.stack([-up, right], axis=-1) * 16 / records.MOUSE_RATE
        np.testing.assert_allclose(clip.mouse, turned, rtol=1e-6)
        letters = ['ND'[int(a > 0)] + ' RL'[int(s)].strip() for a, s in zip(ahead, aside)]
        held = [SYMBOLS[one] for one in clip.controls[::4]]
        assert held == letters[::4]


def test_a_world_of_another_rate_sees_the_same_turn(parquet, tmp_path):
    write_second(parquet, tmp_path / 'set')
    (tmp_path / 'map.yaml').write_text(MAP)
    mapped = actions_map.read(tmp_path / 'map.yaml')
    turned = {}
    for fps in (8, 16, 25):
        reader = lerobot.LeRobotReader(32, 48, fps, mapped, shortest=9, held_out=0.0)
        source = lerobot.find(tmp_path / 'set', mapped, fps)[2]
        report = SimpleNamespace(dropped={}, seconds=0)
        clip = next(iter(reader.clips(tmp_path / 'set', source, report)))
        turned[fps] = np.cumsum(clip.mouse, axis=0) * records.MOUSE_RATE / fps
        assert clip.fps == fps
    # The first frame has no action. At 8 fps two rows lead to a frame; at 25 fps some lead to two.
    np.testing.assert_allclose(turned[8], turned[16][1::2][: len(turned[8])], atol=1e-4)
    shown = np.floor(np.arange(1, len(turned[25]) + 1) * 16 / 25 + 0.5).astype(int) - 1
    shown = shown[shown < len(turned[16])]
    np.testing.assert_allclose(turned[25][: len(shown)], turned[16][shown], atol=1e-4)


def test_tasks_that_change_make_several_clips(parquet, tmp_path):
    write_second(parquet, tmp_path / 'set')
    part = rows(2, 0)
    part['task_index'] = np.repeat([0, 2], [24, 25])
    path = tmp_path / 'set' / 'data' / 'chunk-001' / 'episode_000002.parquet'
    write_rows(parquet, path, part)
    code = collect(
        tmp_path / 'set',
        tmp_path / 'out',
        '--actions-map',
        'none',
        '--shortest',
        1,
        '--held-out',
        0,
    )
    assert code == 0
    found = [(clip.caption, len(clip.frames)) for clip in clips(tmp_path / 'out')]
    assert found == [('walk to the door', 41), ('look around', 21), ('walk to the door', 25)]
    assert not clips(tmp_path / 'out')[0].knows('keyboard')


def test_pictures_in_the_rows_are_read(parquet, tmp_path):
    import io

    import pyarrow
    from PIL import Image

    write_second(parquet, tmp_path / 'set')
    where = tmp_path / 'set' / 'meta' / 'info.json'
    content = json.loads(where.read_text(encoding='utf-8-sig'))
    content['features'][CAMERA]['dtype'] = 'image'
    write_json(where, content)
    for one in range(3):
        path = tmp_path / 'set' / 'data' / f'chunk-{one // 2:03d}' / f'episode_{one:06d}.parquet'
        cells = []
        for frame in scene(one, LENGTHS[one]):
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, 'PNG')
            cells.append({'bytes': buffer.getvalue(), 'path': None})
        parquet.write_table(
            parquet.read_table(path).append_column(CAMERA, pyarrow.array(cells)), path
        )
    code = collect(tmp_path / 'set', tmp_path / 'out', '--actions-map', 'none', '--held-out', 0)
    assert code == 0
    first = clips(tmp_path / 'out')[0]
    np.testing.assert_array_equal(first.frames, video.fit(scene(0, 41), 32, 48))


# --- export --------------------------------------------------------------------------------------


def recorded(seed, frames=33, walking=True):
    """A clip with keys, mouse and pose, or with driving controls."""
    random = np.random.default_rng(seed)
    known = records.unknown(frames)
    if walking:
        known['keyboard'] = random.integers(0, 2, (frames, 4)).astype(np.int8)
        known['mouse'] = random.normal(size=(frames, 2)).astype(np.float32)
        known['pose'] = random.normal(size=(frames, 6)).astype(np.float32)
    else:
        held = random.integers(0, 9, (frames + 3) // 4).astype(np.int8)
        known['controls'] = np.concatenate([held[:1], np.repeat(held[1:], 4)])
        known['telemetry'] = random.normal(size=(frames, 6)).astype(np.float32)
    shown = scene(seed, frames, height=32, width=48)[..., :1].repeat(3, -1)  # grey: no lost colour
    return records.Clip(shown, caption=f'walk {seed % 2}', theme='t', seed=seed, fps=16, **known)


def record(folder, walking=True):
    folder.mkdir()
    made = [recorded(seed, 33 + 4 * seed, walking) for seed in range(3)]
    records.write_shard(folder / 'train-00000.array_record', made[:2])
    records.write_shard(folder / 'heldout-00000.array_record', made[2:])
    return made


@pytest.mark.parametrize('walking', [True, False])
def test_an_export_is_read_back_with_the_same_actions(parquet, walking, tmp_path, capsys):
    made = record(tmp_path / 'data', walking)
    assert run('convert', '--lerobot', tmp_path / 'data', tmp_path / 'set') == 0
    assert 'LeRobot v3.0, 3 episodes, 111 frames, 2 tasks' in capsys.readouterr().out
    assert collect(tmp_path / 'set', tmp_path / 'back', '--held-out', 0) == 0
    for clip, wanted in zip(clips(tmp_path / 'back'), made, strict=True):
        for name in (*records.ACTIONS, 'controls'):
            np.testing.assert_array_equal(getattr(clip, name), getattr(wanted, name))
        assert (clip.caption, clip.fps) == (wanted.caption, 16)
        assert np.abs(clip.frames - wanted.frames.astype(float)).mean() < 4


def test_an_export_has_what_lerobot_expects(parquet, tmp_path):
    made = record(tmp_path / 'data')
    lerobot_export.export(str(tmp_path / 'data'), tmp_path / 'set')
    content = json.loads((tmp_path / 'set' / 'meta' / 'info.json').read_text())
    assert content['splits'] == {'train': '0:2', 'heldout': '2:3'}
    for number, clip in enumerate(made):
        path = tmp_path / 'set' / content['data_path'].format(chunk_index=0, file_index=number)
        table = parquet.read_table(path)
        assert set(table.column_names) == set(content['features']) - {'observation.images.view'}
        state = np.array(table['observation.state'].to_pylist(), np.float32)
        wanted = np.concatenate([clip.keyboard, clip.mouse], axis=1)
        np.testing.assert_array_equal(state, wanted)
        # The action of a row makes the next frame.
        after = np.array(table['action'].to_pylist(), np.float32)
        np.testing.assert_array_equal(after, np.concatenate([wanted[1:], wanted[-1:]]))
    tasks = parquet.read_table(tmp_path / 'set' / 'meta' / 'tasks.parquet')
    assert json.loads(tasks.schema.metadata[b'pandas'])['index_columns'] == ['task']
    stats = json.loads((tmp_path / 'set' / 'meta' / 'stats.json').read_text())
    pixels = np.concatenate([clip.frames for clip in made]).reshape(-1, 3) / 255
    np.testing.assert_allclose(
        np.ravel(stats['observation.images.view']['mean']), pixels.mean(0), atol=0.01
    )
    poses = np.concatenate([clip.pose for clip in made])
    np.testing.assert_allclose(stats['observation.pose']['std'], poses.std(0), rtol=1e-4)
    np.testing.assert_allclose(stats['observation.pose']['q50'], np.median(poses, 0), rtol=1e-4)


def test_clips_that_do_not_fit_together_are_not_exported(parquet, tmp_path, capsys):
    record(tmp_path / 'walks')
    record(tmp_path / 'drives', walking=False)
    both = f'{tmp_path / "walks"},{tmp_path / "drives"}'
    for data, target, said in (
        (both, 'set', 'has controls, the clips before keyboard, mouse; expected the same'),
        (tmp_path / 'none', 'set', 'no clips; record some'),
        (tmp_path / 'walks', 'walks', 'expected a folder that does not exist'),
    ):
        before = sorted(tmp_path.rglob('*'))
        assert run('convert', '--lerobot', data, tmp_path / target) == 2
        assert said in capsys.readouterr().err
        assert sorted(tmp_path.rglob('*')) == before


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize('text, said', [
    ('[', 'not YAML'),
    ('[' * 3000, 'not YAML'),
    ('- 1', 'the file: got list, expected some of camera, offset'),
    ('keys: {}', "the file: got 'keys', expected some of camera"),
    ('keyboard: {}', 'keyboard: got nothing, expected some of W, S, A, D'),
    ('keyboard: {X: "action[0] > 1"}', "keyboard: got 'X', expected some of W, S, A, D"),
    ('keyboard: {W: 3}', 'keyboard: W: got 3, expected a term such as action[0] > 0.5'),
    ('keyboard: {W: "action[0]"}', 'expected a term such as action[0] > 0.5'),
    ('keyboard: {W: "action[0] > nan"}', 'expected a term such as'),
    ('keyboard: {W: "action[0] > 1; import os"}', 'expected a term such as'),
    ('mouse: {yaw: "action[0] > 1"}', 'mouse: yaw: got'),
    ('mouse: {yaw: "action[0]", unit: turns}', "unit: got 'turns', expected one of degrees"),
    ('mouse: {unit: degrees}', 'mouse: got nothing, expected some of pitch, yaw'),
    ('offset: true', 'offset: got True, expected a whole number'),
    ('offset: -1', 'offset: got -1'),
    ('camera: 3', 'camera: got 3, expected a column'),
    ('camera: front', "camera: got 'front', expected one of observation.images.front"),
    ('pose: action', 'pose: action has 4 values, expected x y z yaw pitch roll'),
    ('pose: pose', 'column pose: the data set has none of this name, only action[4]'),
    ('keyboard: {W: "action > 1"}', 'action: got no part, expected action[0] to [3], or one of'),
    ('keyboard: {W: "action[4] > 1"}', 'action: got part 4'),
    ('a: &a [1,1]\nkeyboard: {W: [*a,*a]}', 'the file: got '),
])  # fmt: skip
def test_a_wrong_map_is_one_line_and_writes_nothing(parquet, tmp_path, capsys, text, said):
    pytest.importorskip('yaml')
    write_json(
        tmp_path / 'set' / 'meta' / 'info.json',
        info('v2.1', data_path='data/{episode_index}.parquet', video_path='v/{episode_index}.mp4'),
    )
    (tmp_path / 'set' / 'meta' / 'tasks.jsonl').write_text('')
    (tmp_path / 'set' / 'meta' / 'episodes.jsonl').write_text('{"episode_index": 0, "length": 9}')
    (tmp_path / 'map.yaml').write_text(text)
    check_refused(tmp_path, capsys, said, '--actions-map', tmp_path / 'map.yaml')


def check_refused(folder, capsys, said, *more):
    before = sorted(folder.rglob('*'))
    lerobot.open_dataset.cache_clear()
    assert collect(folder / 'set', folder / 'out', *more) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith('error: ') and said in line and len(line) < 1000
    assert sorted(folder.rglob('*')) == before


@pytest.mark.parametrize('change, said', [
    ({'codebase_version': 'v1.6'}, "codebase_version: got 'v1.6', expected v2.0, v2.1 or v3.0"),
    ({'fps': 'fast'}, "fps: got 'fast', expected a positive number"),
    ({'fps': 5}, 'got 5 frames per second, expected at least 8'),
    ({'fps': 'a' * 10**5}, 'aa, expected a positive number'),
    ({'features': []}, 'expected an object with features'),
    ({'features': {'a': {'dtype': 'video'}, 'b': {'dtype': 'video'}}}, 'got cameras a, b, '),
    ({'features': {}}, 'got cameras none, expected one'),
    ({'data_path': '../{episode_index}'}, "got '../{episode_index}', expected a path in"),
    ({'data_path': '/etc/passwd'}, "got '/etc/passwd', expected a path in the data set"),
    ({'data_path': '{chunk_index}'}, 'data_path: unknown field {chunk_index}'),
    ({'video_path': '{episode_index.__class__}'}, 'expected a path in the data set'),
    ({'chunks_size': 0}, 'chunks_size: got 0'),
])  # fmt: skip
def test_wrong_metadata_is_one_line_and_writes_nothing(parquet, tmp_path, capsys, change, said):
    write_second(parquet, tmp_path / 'set')
    where = tmp_path / 'set' / 'meta' / 'info.json'
    write_json(where, json.loads(where.read_text(encoding='utf-8-sig')) | change)
    check_refused(tmp_path, capsys, said, '--actions-map', 'none')


def test_damaged_files_are_skipped_by_name(parquet, tmp_path, capsys):
    write_second(parquet, tmp_path / 'set')
    check_refused(tmp_path, capsys, 'the data set has action (ahead, aside, look_up, look_right)')
    data = tmp_path / 'set' / 'data' / 'chunk-000' / 'episode_000000.parquet'
    data.write_bytes(data.read_bytes()[:200])
    (tmp_path / 'set' / 'videos' / 'chunk-001' / CAMERA / 'episode_000002.mp4').unlink()
    code = collect(
        tmp_path / 'set',
        tmp_path / 'out',
        '--actions-map',
        'none',
        '--shortest',
        0.5,
        '--held-out',
        0,
    )
    said = capsys.readouterr().out
    assert code == 0 and 'files: 1 read, 2 skipped' in said
    assert 'episode_000000.parquet: not readable as parquet' in said
    assert 'episode_000002.mp4: no such file' in said
    (tmp_path / 'set' / 'meta' / 'episodes.jsonl').write_text('{"episode_index": "0"}')
    check_refused(
        tmp_path, capsys, "episodes.jsonl line 1: episode_index: got '0'", '--actions-map', 'none'
    )


@pytest.mark.parametrize('name, values', [
    ('task_index', [np.inf] * 49),
    ('task_index', [None] * 49),
    ('action', [[1e300] * 4] * 49),
    ('action', [None] * 49),
    ('action', ['w'] * 49),
    ('frame_index', [0] * 50),
])  # fmt: skip
def test_hostile_rows_skip_their_episode_alone(parquet, tmp_path, name, values):
    import pyarrow

    write_second(parquet, tmp_path / 'set')
    (tmp_path / 'map.yaml').write_text(MAP)
    path = tmp_path / 'set' / 'data' / 'chunk-001' / 'episode_000002.parquet'
    columns = parquet.read_table(path).to_pydict()
    columns = {key: (column * 2)[: len(values)] for key, column in columns.items()}
    parquet.write_table(pyarrow.table(columns | {name: values}), path)
    more = ('--actions-map', tmp_path / 'map.yaml', '--held-out', 0)
    assert collect(tmp_path / 'set', tmp_path / 'out', *more) == 0
    kept = [clip.caption for clip in clips(tmp_path / 'out')]
    assert kept == ['walk to the door', *['look around'] * (name == 'task_index')]


def test_without_pyarrow_a_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name: None if name == 'pyarrow' else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, 'find_spec', missing)
    (tmp_path / 'set').mkdir()
    check_refused(tmp_path, capsys, "--lerobot needs pyarrow: pip install 'matrix_jax[lerobot]'")


def test_the_maps_of_the_guide_and_of_the_module_are_maps():
    yaml = pytest.importorskip('yaml')
    guide = (Path(__file__).parents[2] / 'docs' / 'records.md').read_text()
    module = actions_map.__doc__
    for text in (guide.split('```yaml\n')[1].split('```')[0],
                 module[module.index('    camera') : module.index('A term is')]):  # fmt: skip
        mapped = actions_map.parse(yaml.safe_load(text))
        assert (mapped.offset, mapped.unit, mapped.pose) == (1, 'degrees', 'observation.pose')
