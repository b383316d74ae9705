"""The recorder: settings at the door, the plan of shards, resuming, and a short real game."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from matrix_jax.data import collect
from matrix_jax.data.records import CONTROLS, RecordError, Shard

TOOL = Path(__file__).parents[2] / 'tools' / 'collect.py'
GAME = 'CarRacing-v3'


def tool(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True
    )


def settings(hours=0.002, themes='snow,night', seed=3, held_out=0.5):
    return collect.plan(GAME, hours, themes, seed, held_out)


def test_help_imports_neither_the_game_nor_jax():
    code = (
        'import runpy, sys; sys.argv = ["collect.py", "--help"]\n'
        f'try: runpy.run_path({str(TOOL)!r}, run_name="__main__")\n'
        'except SystemExit as end: assert not end.code\n'
        'assert not {"jax", "gymnasium", "pygame", "numpy"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'hours': 0}, '--hours: got 0'),
        ({'hours': float('nan')}, '--hours: got nan'),
        ({'hours': float('inf')}, '--hours: got inf'),
        ({'hours': -1}, '--hours: got -1'),
        ({'held_out': 1}, '--held-out: got 1'),
        ({'held_out': -0.1}, '--held-out: got -0.1'),
        ({'held_out': float('nan')}, '--held-out: got nan'),
        ({'seed': -1}, '--seed: got -1'),
        ({'seed': 2**32}, '--seed: got'),
        ({'themes': 'snow,mars'}, '--themes: got .*meadow'),
        ({'themes': ''}, '--themes: got'),
        ({'themes': 'snow,snow'}, '--themes: got'),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


@pytest.mark.parametrize('hours, held_out', [(0.001, 0.0), (1.0, 0.1), (2.5, 0.25)])
def test_plan_covers_the_hours(hours, held_out):
    shards = settings(hours=hours, held_out=held_out).shards()
    assert len({shard[:2] for shard in shards}) == len(shards)
    frames = {split: sum(n for s, _, n in shards if s == split) for split in ('train', 'heldout')}
    assert sum(frames.values()) == pytest.approx(hours * 57600, abs=1)
    assert frames['heldout'] == pytest.approx(hours * 57600 * held_out, abs=1)
    assert shards[0][0] == 'train'


def test_other_settings_and_foreign_folders_are_refused(tmp_path):
    collect.claim(settings(), tmp_path / 'a')
    before = (tmp_path / 'a' / collect.MANIFEST).read_bytes()
    with pytest.raises(ValueError, match=r'other settings: seed 3 \(asked 4\)'):
        collect.claim(settings(seed=4), tmp_path / 'a')
    assert (tmp_path / 'a' / collect.MANIFEST).read_bytes() == before
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'train-00000.array_record').touch()
    with pytest.raises(ValueError, match='without a manifest.json'):
        collect.claim(settings(), tmp_path / 'b')
    (tmp_path / 'a' / collect.MANIFEST).write_text('[')
    with pytest.raises(ValueError, match='not JSON'):
        collect.claim(settings(), tmp_path / 'a')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('Pong-v5',), "ENV: got 'Pong-v5'"),
        ((GAME, '--workers', 0), '--workers: got 0'),
        ((GAME, '--hours', 'inf'), '--hours: got inf'),
        ((GAME, '--hours', 'abc'), "error: --hours: got 'abc', expected float"),
        ((GAME, '--out'), 'error: --out: got nothing, expected one argument'),
        ((GAME, '--out', __file__), 'test_collect.py is not a folder'),
        ((GAME, '--seed', -1), '--seed: got -1, expected a whole number from 0 to 4294967295'),
    ],
)
def test_tool_says_one_line_and_writes_nothing(tmp_path, arguments, message):
    pytest.importorskip('gymnasium.envs.box2d.car_racing')
    done = tool('--out', tmp_path / 'out', *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert message in done.stderr
    assert not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
    pytest.importorskip('gymnasium.envs.box2d.car_racing')
    out = tmp_path_factory.mktemp('recorded') / 'out'
    collect.run(settings(), out, workers=1)
    return out


def test_recorded_clips_hold_what_the_captions_say(recorded):
    clips = {}
    for split in ('train', 'heldout'):
        shard = Shard(recorded / f'{split}-00000.array_record')
        clips[split] = [shard[i] for i in range(len(shard))]
        for clip in clips[split]:
            assert clip.frames.shape[1:] == (64, 96, 3) and clip.fps == 16
            blocks = clip.controls[1:].reshape(-1, 4)
            assert (blocks == blocks[:, :1]).all()
            assert clip.telemetry[0, 0] > 0  # starts on the road
            assert clip.theme in clip.caption or clip.theme == 'desert'
            ground = np.median(clip.frames.astype(float), axis=(0, 1, 2)).mean()
            assert ground > 150 if clip.theme == 'snow' else ground < 100
    assert {c.seed % 2 for c in clips['train']} == {0}
    assert {c.seed % 2 for c in clips['heldout']} == {1}
    assert json.loads((recorded / collect.MANIFEST).read_text())['themes'] == ['snow', 'night']


def test_restart_records_only_what_is_missing(recorded):
    paths = sorted(recorded.glob('*.array_record'))
    before = {path: path.read_bytes() for path in paths}
    times = {path: path.stat().st_mtime_ns for path in paths}
    paths[1].unlink()
    collect.run(settings(), recorded, workers=1)
    assert {path: path.read_bytes() for path in paths} == before
    assert paths[0].stat().st_mtime_ns == times[paths[0]]
    damaged = before[paths[0]][:500]
    paths[0].write_bytes(damaged)
    with pytest.raises(RecordError, match='truncated'):
        collect.run(settings(), recorded, workers=1)
    assert paths[0].read_bytes() == damaged
    paths[0].write_bytes(before[paths[0]])


def test_keys_do_what_they_say():
    pytest.importorskip('gymnasium.envs.box2d.car_racing')
    from matrix_jax.data.carracing import TOP_SPEED, CarRacingGame

    game = CarRacingGame()
    yaw, speed = {}, {}
    for key in CONTROLS:
        game.reset(seed=7, theme='meadow')
        for _ in range(6):
            game.hold('D', draw=False)
        for _ in range(4):
            frames, states = game.hold(key, draw=False)
        assert frames.size == 0 and game.ticks == 40
        yaw[key], speed[key] = states[:, 1].mean(), states[:, 2].mean()
    for pedal in 'DBN':
        assert yaw[pedal + 'L'] > 0.4 > abs(yaw[pedal]) and yaw[pedal + 'R'] < -0.4
    assert speed['B'] < speed['N'] - 5 < speed['D'] - 5 < TOP_SPEED
    frame = game.frame()
    assert frame.shape == (64, 96, 3) and frame.dtype == np.uint8
    red = frame[51, 48].astype(int)
    assert red[0] > red[1:].max() + 60  # the car is in its place


def test_sixteen_frames_are_fifty_physics_steps():
    pytest.importorskip('gymnasium.envs.box2d.car_racing')
    from matrix_jax.data.carracing import CarRacingGame

    game = CarRacingGame()
    game.reset(seed=7, theme='meadow')
    before = game.env.t
    steps = []
    for _ in range(16):
        start = game.env.t
        game.hold('N', frames=1, draw=False)
        steps.append(round((game.env.t - start) * 50))
    assert steps == [3, 3, 3, 3, 3, 3, 3, 4] * 2
    assert game.env.t - before == pytest.approx(1.0)


def test_following_driver_stays_on_the_road():
    pytest.importorskip('gymnasium.envs.box2d.car_racing')
    from matrix_jax.data.carracing import CarRacingGame, Driver

    game = CarRacingGame()
    game.reset(seed=3, theme='meadow', start=0.3, backwards=True)
    driver = Driver(game, np.random.default_rng(0))
    states = np.concatenate([game.hold(driver.key(follow=True), draw=False)[1] for _ in range(40)])
    assert states[:, 0].min() > 0
    assert states[-1, 2] > 10
