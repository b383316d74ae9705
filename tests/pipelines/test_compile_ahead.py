"""Compiled programs beside the weights: the same frames without compiling, or a line that says why
not."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.parallel import compilation
from matrix_jax.parallel.programs import ProgramSet
from matrix_jax.pipelines import compile_ahead
from matrix_jax.pipelines.stream_runner import StreamRunner
from matrix_jax.weights import stored_programs
from tests.cli.command import run

RECIPE = 'the_matrix:TINY'


@pytest.fixture(scope='module')
def stored(tiny, tmp_path_factory):
    """A folder with the programs of a video with late controls."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.mktemp('stored')
        patch.setenv('XDG_CACHE_HOME', str(base / 'cache'))
        patch.setattr(compile_ahead, 'BINDINGS', ('late',))
        patch.setattr(compile_ahead, 'BatchedStream', None)
        programs = compile_ahead._programs
        patch.setattr(compile_ahead, '_programs', lambda *given: [next(iter(programs(*given)))])
        given = dataclasses.replace(recipes.load(RECIPE), weights=str(tiny))
        line = compile_ahead.save(given, 'cpu', base / 'out', players=1)
        assert line.startswith(f'{base / "out"}: 3 programs of {RECIPE} for cpu, ')
        yield base / 'out'


@pytest.fixture
def opened(stored, tmp_path, monkeypatch):
    """`opened(folder)` -> the runner of a folder; of the stored programs by default."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(stored.parent / 'cache'))

    def open_(folder=stored):
        found = dataclasses.replace(recipes.load(RECIPE), weights=str(folder))
        return StreamRunner(*worlds.open_run(found), 'late')

    return open_


def frames(runner, steps=3):
    """Frames of a few steps."""
    cfg = runner.world.cfg
    start = np.random.default_rng(0).integers(
        0, 255, (runner.world.start_frames, cfg.height, cfg.width, 3), np.uint8
    )
    controls = runner.world.round_up_controls(steps * cfg.stream.controls_per_step)
    known, given = runner.world.split_controls(['DL'] * controls)
    carry, _ = runner.start('snow', start, known, 3, given)
    carry, first = runner.compile(carry, given)
    assert first is None
    made = []
    for step in given:
        carry, shown = runner.step(carry, step)
        made.append(np.asarray(shown))
    return np.concatenate(made)


def test_stored_programs_make_the_same_frames_without_tracing(opened, tiny, monkeypatch):
    compiled = opened(tiny)
    assert not compiled.stored and not compiled.note
    wanted = frames(compiled)

    def refuse(*_, **__):
        raise AssertionError('traced')

    monkeypatch.setattr(compilation, 'jit', refuse)
    monkeypatch.setattr('matrix_jax.worlds.weights_folders.component_shapes', refuse)
    runner = opened()
    assert runner.stored and not runner.note
    np.testing.assert_array_equal(frames(runner), wanted)


def test_what_does_not_fit_is_compiled_and_said(opened, stored, monkeypatch):
    with jax.default_matmul_precision('default'):
        runner = opened()
    assert not runner.stored and runner.note == 'stored programs: made for another setting'
    monkeypatch.setattr(stored_programs, 'source_digest', lambda: 'changed')
    assert opened().note == 'stored programs: made for another source'
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(stored.parent / 'cache'))
    monkeypatch.setattr(stored_programs, '_version', lambda name: '99')
    assert opened().note == f"stored programs: made for jax {jax.__version__!r}, this is '99'"


def test_only_the_users_own_programs_are_loaded(opened, stored, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert f'no {tmp_path}/matrix_jax/signing_key' in opened().note
    stored_programs.signing_key(create=True)  # of another user
    assert opened().note == 'stored programs: not loaded (condition is not signed by this user)'
    (tmp_path / 'matrix_jax' / 'signing_key').chmod(0o644)
    assert 'other users can use it, expected mode 600' in opened().note
    monkeypatch.setenv('XDG_CACHE_HOME', str(stored.parent / 'cache'))
    changed = shutil.copytree(stored, tmp_path / 'changed')
    program = next(changed.glob('programs/*/step.program'))
    program.write_bytes(program.read_bytes()[:-1] + b'!')
    assert 'step is not signed by this user' in opened(changed).note
    index = program.with_name(stored_programs.INDEX)
    about = json.loads(index.read_text())
    index.write_text(json.dumps(about | {'key': about['key'] | {'jax': '0'}}))
    assert "made for jax '0'" in opened(changed).note  # a changed key is another key
    index.write_text('{')
    assert not opened(changed).note and not opened(changed).stored


def test_programs_without_a_mesh_are_compiled_side_by_side():
    programs = ProgramSet(None)
    shape = programs.add('double', lambda x: 2 * x, np.ones(3, np.float32))
    assert (shape.shape, shape.dtype) == ((3,), np.float32) and not programs.compiled
    programs.add('sum', lambda x: x.sum(), shape)
    made = programs.finish()
    assert float(made['sum'](made['double'](np.arange(3, dtype=np.float32)))) == 6
    assert programs.finish() is made and set(made) == {'double', 'sum'}


@pytest.mark.parametrize(
    'argv, said',
    [
        (['--compile-for', 'h100', 'carracing', 'x'], 'got h100, expected cpu, h200'),
        (['--compile-for', 'cpu', 'x'], '--compile-for: expected RECIPE and DST'),
        (['--compile-for', 'cpu', 'the_matrix:STAGE2', 'x', '--weights', 'y'], 'makes whole clips'),
        (['--compile-for', 'cpu', 'carracing', '.'], 'is there already'),
        (['--compile-for', 'cpu', 'carracing', 'x', '--random', 'y'], 'expected RECIPE and DST'),
        (['--players', '2', 'a', 'b'], 'expected --compile-for with it'),
    ],
)
def test_the_door_refuses(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run('convert', *argv) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
