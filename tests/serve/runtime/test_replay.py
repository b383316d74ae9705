"""Logs and world files: what they hold, and what is refused."""

import argparse
import dataclasses
import json

import jax
import numpy as np
import pytest

from matrix_jax import config, recipes, video
from matrix_jax.cli.parser import Parser
from matrix_jax.pipelines import generate
from matrix_jax.serve.runtime import key_runs, replay, session_log, snapshot, start_frames
from matrix_jax.serve.runtime.session_log import KeyRuns, Log, ReplayError
from matrix_jax.serve.runtime.snapshot import WorldFileError


@pytest.fixture
def log(stream):
    return Log(
        'the_matrix:TINY',
        stream.fingerprint(),
        num_slots=3,
        together=1,
        control_binding='early',
        seed=7,
        prompt='A car.',
        controls=['D', 'D', 'DL'],
        prompts=[[1, 'snow']],
    )


def test_a_log_survives_json(log):
    written = json.dumps(log.to_json())
    assert '"D*2,DL*1"' in written
    assert session_log.from_json(json.loads(written)) == log


@pytest.mark.parametrize(
    'change, message',
    [
        ({'matrix_jax_session': 9}, 'matrix_jax_session'),
        ({'more': 1}, 'got the fields'),
        ({'seed': -1}, 'replay.seed'),
        ({'seed': 1.0}, 'replay.seed'),
        ({'symbols': 'X Y*1'}, 'X Y'),
        ({'symbols': 'D*9999999'}, 'at most'),
        ({'symbols': 'D*0'}, 'expected such as'),
        ({'symbols': 'D*1,' * 2**18}, 'got 262145 runs of keys, expected at most 262144'),
        ({'mesh': 2}, 'replay.mesh'),
        ({'prompts': [[9, 'late']]}, 'replay.prompts'),
        ({'start': None}, 'one of start and picture'),
        ({'prompt': 3}, 'replay.prompt'),
    ],
)
def test_a_wrong_log_is_refused(log, change, message):
    with pytest.raises(ReplayError, match=message):
        session_log.from_json(log.to_json() | change)


def test_runs_of_keys_are_a_list():
    random, plain, runs = np.random.default_rng(0), [], KeyRuns()
    for _ in range(300):
        plain.append(str(random.choice(['D', 'B', 'W+right:0.05'])))
        runs.append(plain[-1])
        if random.random() < 0.1:
            cut = int(random.integers(len(plain) + 1))
            before = runs.copy()
            del plain[cut:], runs[cut:]
            assert list(before)[:cut] == plain
        assert list(runs) == plain and len(runs) == len(plain)
    assert [runs[step] for step in range(-3, 9)] == plain[-3:] + plain[:9]
    assert runs == KeyRuns(plain) == KeyRuns.parse(runs.format()) and runs.distinct == set(plain)
    assert not KeyRuns.parse('') and runs != KeyRuns(plain[:-1])


def test_a_drive_longer_than_a_file_goes_on_but_is_not_written(log, monkeypatch):
    monkeypatch.setattr(key_runs, 'MAX_RUNS', 3)
    for symbol in ('B', 'B', 'D'):
        log.controls.append(symbol)
    assert (len(log.controls), log.controls.lost, log.copy().controls.lost) == (6, 5, 5)
    with pytest.raises(ReplayError, match='more than 3 changes of keys'):
        log.dumps()
    del log.controls[5:]
    assert list(session_log.loads(log.dumps()).controls) == ['D', 'D', 'DL', 'B', 'B']
    monkeypatch.setattr(session_log, 'LOG_BYTES', 200)
    for long in (log.dumps, lambda: session_log.loads(' ' * 201)):
        with pytest.raises(ReplayError, match='replay: got a log of .* bytes, expected at most'):
            long()


def test_an_older_log_says_nothing_of_a_mesh(log, stream):
    older = log.to_json()
    assert older.pop('mesh') == ''
    assert session_log.from_json(older) == log and not replay.difference(stream, log)
    assert stream.mesh == 'cpu'
    assert not replay.difference(stream, dataclasses.replace(log, mesh='cpu'))
    other = replay.difference(
        stream, dataclasses.replace(log, mesh='cpu seq=2', control_binding='late')
    )
    assert other.startswith('played with entry late, now early; mesh cpu seq=2, now cpu: ')


def test_frames_do_not_depend_on_the_slot(stream, tiny, log):
    made = np.stack(list(replay.frames(stream.empty_copy(), tiny, log)))
    assert len(made) == 3 * stream.frames_per_step
    other = dataclasses.replace(log, prompts=[])
    without = np.stack(list(replay.frames(stream.empty_copy(), tiny, other)))
    np.testing.assert_array_equal(made[: stream.frames_per_step], without[: stream.frames_per_step])
    assert (made != without).any()
    # the same in the last slot, with company, saved in between
    shared = stream.empty_copy()
    condition, _ = shared.condition(log.prompt, start_frames.load(shared, tiny, '', None))
    for index in range(3):
        shared.write(index, shared.init(condition, 7 if index == 2 else index))
    for step, symbol in enumerate(log.controls):
        symbols = np.stack([shared.encode(one) for one in ('BR', 'BR', symbol)])
        frames, finite = shared.step(symbols, np.array([True, step != 1, True]))
        assert np.asarray(finite).all()
        np.testing.assert_array_equal(
            np.asarray(frames)[2],
            without[step * stream.frames_per_step :][: stream.frames_per_step],
        )
        data = snapshot.dump(shared.read(2), log)
        shared.write(2, snapshot.parse(data, shared.carry_shapes, log.fingerprint)[0])
        assert (np.asarray(frames)[1] == 0).all() == (step == 1)


def test_a_world_file_that_does_not_fit_is_refused(stream, log, monkeypatch):
    carry = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stream.carry_shapes)
    data = snapshot.dump(carry, log)
    found, known = snapshot.parse(data, stream.carry_shapes, log.fingerprint)
    assert known == log and jax.tree.structure(found) == jax.tree.structure(stream.carry_shapes)
    wrong = jax.tree.map(lambda leaf: np.zeros((*leaf.shape, 2), leaf.dtype), stream.carry_shapes)
    broken = jax.tree.map(lambda leaf: leaf + np.nan if leaf.dtype.kind == 'f' else leaf, carry)
    monkeypatch.setattr(snapshot, 'HEADER_BYTES', 4000)
    for bad, fingerprint, message in (
        ((5000).to_bytes(8, 'little') + bytes(5000), '', 'a log and names of 5000 bytes'),
        (data, 'other', 'does not fit'),
        (data[:-9], log.fingerprint, 'damaged'),
        (b'', log.fingerprint, 'damaged'),
        (b'\xff' * 100, log.fingerprint, 'damaged'),
        (snapshot.dump(wrong, log), log.fingerprint, 'does not fit this world in'),
        (snapshot.dump(broken, log), log.fingerprint, 'not finite'),
    ):
        with pytest.raises(WorldFileError, match=message):
            snapshot.parse(bad, stream.carry_shapes, fingerprint)


def test_a_session_of_another_world_is_not_replayed(opened, log):
    with pytest.raises(ReplayError, match='another world, or with other weights'):
        replay.compile_stream(*opened, dataclasses.replace(log, fingerprint='0'))
    with pytest.raises(ReplayError, match='nothing was played'):
        replay.compile_stream(*opened, dataclasses.replace(log, controls=[]))


def test_the_command_line_makes_the_video_of_a_log(stream, tiny, log, tmp_path, monkeypatch):
    written = tmp_path / 'session.json'
    written.write_text(json.dumps(log.to_json()))
    monkeypatch.setattr(replay, 'compile_stream', lambda *_: stream.empty_copy())
    options = dict(
        replay=str(written),
        prompt=None,
        control=None,
        image=None,
        video=None,
        pad=None,
        seed=42,
        no_overlay=False,
    )
    recipe = dataclasses.replace(
        recipes.load('the_matrix:TINY'), weights=str(tiny), out=str(tmp_path / 'again.mp4')
    )
    path, clip, count = generate.to_file(recipe, argparse.Namespace(**options))
    assert clip.controls == ['D'] * 4 + ['DL'] * 2 and clip.run_seconds > 0
    assert count == len(video.read_video(path)) == 3 * stream.frames_per_step
    with pytest.raises(config.UsageError, match='--replay: got --prompt as well'):
        generate.to_file(recipe, argparse.Namespace(**options | {'prompt': 'A car.'}))

    def named(*argv):
        parser = Parser('generate', 'Generate.')
        parser.add_argument('--replay')
        return parser.parse_run(
            [*argv, '--replay', str(written), '--weights', 'here'], choose=generate.recipe_of_log
        )[1]

    assert named().name == named('the_matrix:tiny').name == 'the_matrix:TINY'
    assert named().weights == 'here'
    with pytest.raises(config.UsageError, match='--replay: got the recipe carracing'):
        named('carracing')
    written.write_text('nonsense')
    with pytest.raises(ReplayError, match='session.json: not readable'):
        generate.to_file(recipe, argparse.Namespace(**options))
