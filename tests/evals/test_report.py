"""The whole report of a world that knows nothing, on a small recording of the real game."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from matrix_jax.config import UsageError
from matrix_jax.data.carracing import CarRacingGame, record
from matrix_jax.data.records import SUFFIX, write_shard
from matrix_jax.evals import carracing, control, report, tables
from matrix_jax.evals.scripted import SCRIPTS
from tests.evals.test_video import World

TOOL = Path(__file__).parents[2] / 'tools' / 'evaluate.py'
CFG = carracing.Config(
    seconds=2,
    drive_seconds=1,
    long_seconds=2,
    streams=2,
    clips=1,
    clip_frames=33,
    times=(1.0, 2.0),
    probe=control.Config(widths=(4, 8), hidden=8, steps=2, batch=4),
)


class Blank(World):
    """Shows nothing but black in the size of the game."""

    def stream(self, control_binding):
        plain = super().stream(control_binding)

        def step(params, carry, control):
            carry, frames = plain.step(params, carry, control)
            return carry, np.zeros((len(control), 4, 64, 96, 3), np.uint8) * frames[:, :1, :1, :1]

        return plain._replace(step=step)


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
    folder, game = tmp_path_factory.mktemp('recorded'), CarRacingGame()
    for split, seed in (('train', 2), ('heldout', 3)):
        write_shard(
            folder / f'{split}-0{SUFFIX}',
            [record(game, seed, 'night', 41, np.random.default_rng(seed))],
        )
    return folder


def test_a_blank_world_fails_where_the_game_passes(recorded, tmp_path):
    world = Blank(groups=4, group_frames=1, context=3, head_group=2)
    results = report.evaluate(world, None, str(recorded), tmp_path, CFG, log=lambda line: None)
    assert json.loads((tmp_path / 'results.json').read_text()) == json.loads(json.dumps(results))
    loop = results['closed_loop']
    assert loop['game']['seconds_on_road'] == loop['game, late keys']['seconds_on_road'] == 1
    assert loop['world']['seconds_on_road'] == 0 and loop['judge_agrees'] > 0.9
    drift = results['drift']['straight']
    made, real = drift['generated'], drift['real']
    assert made['road'] == [0, 0] and min(real['road']) > 0.05
    assert made['car'] == [0, 0] and real['car'] == [1, 1]
    assert made['sharpness'] == [0, 0] and min(made['color']) > 10 > max(real['color'])
    assert set(results['obedience']) == {'all', *SCRIPTS}
    assert set(results['played']) == {'all', 'delay_seconds', *SCRIPTS}
    assert results['fidelity']['rfd'] > results['fidelity']['rfd_real'] > 0
    assert results['long']['on_road'] == [0] and results['speed']['calls_per_shift'] == 5
    text = (tmp_path / 'report.md').read_text()
    assert '| straight | 2 | 0.00 |' in text and 'seconds on the road of 1' in text
    made = {path.name for path in tmp_path.iterdir()}
    assert {
        'scripts-0.png',
        'scripts-1-real.png',
        'drive.png',
        'drive.mp4',
        'long.png',
        'probe.msgpack',
    } <= made
    table = tables.compare([str(tmp_path)]).splitlines()
    assert table[2].startswith(f'| {tmp_path.name} | 0.') and '| 0.0 of 1 |' in table[2]
    assert table[3].startswith('| real game |') and '| 1.0 of 1 |' in table[3]


def test_results_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UsageError, match='results.json'):
        tables.compare([str(tmp_path)])
    (tmp_path / 'results.json').write_text('{"obedience": {}}')
    with pytest.raises(UsageError, match="has no 'all'"):
        tables.compare([str(tmp_path)])


def test_a_stream_of_larger_groups_is_refused(recorded, tmp_path):
    with pytest.raises(UsageError, match='group_frames: got 2, expected 1'):
        report.evaluate(World(groups=4, group_frames=2), None, str(recorded), tmp_path, CFG)


def test_clips_of_another_size_are_refused(recorded, tmp_path):
    world = Blank(groups=4, group_frames=1, context=3, head_group=2)
    world.cfg.height = 32
    with pytest.raises(UsageError, match='got clips of 64x96 at 16 fps, expected 32x96 at 16'):
        report.evaluate(world, None, str(recorded), tmp_path, CFG)


def test_the_tool_needs_data():
    done = subprocess.run(
        [sys.executable, TOOL, 'the_matrix:TINY'],
        capture_output=True,
        text=True,
        env=os.environ | {'PYTHONPATH': str(TOOL.parents[1])},
    )
    assert done.returncode == 2
    assert done.stderr == ('error: --data: needs a folder of recorded clips (matrix-jax collect)\n')
