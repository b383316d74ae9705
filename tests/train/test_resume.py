"""A training that was killed, stopped or out of disk goes on to the same bits."""

import importlib.util
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from matrix_jax.cli.parser import main_guard
from matrix_jax.weights import training_state
from matrix_jax.weights.conversion import flatten
from matrix_jax.weights.diffusers_layout import CheckpointError, SaveError

TOY = Path(__file__).with_name('test_loop.py')
STEPS = 12
# The training in a process of its own: at batch 8 it waits until a save is half-written, and then
# gets a signal.
CHILD = """
import importlib.util, os, pathlib, sys, time
spec = importlib.util.spec_from_file_location('toy', sys.argv[1])
toy = importlib.util.module_from_spec(spec)
sys.modules['toy'] = toy
spec.loader.exec_module(toy)
out, number, at = pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def hit():
    until = time.time() + 0.2
    while number == 9 and not list(out.glob('state/*tmp*')) and time.time() < until:
        pass
    os.kill(os.getpid(), number)
    return 1.0

toy.fit(out, steps=int(sys.argv[5]), events=[(at, hit)])
"""


@pytest.fixture(scope='module')
def toy():
    spec = importlib.util.spec_from_file_location('toy_training', TOY)
    module = importlib.util.module_from_spec(spec)
    sys.modules['toy_training'] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def whole(toy, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp('whole')
    toy.fit(folder, steps=STEPS)
    return folder


def read(folder):
    saver = training_state.Checkpoints(folder / 'state')
    found = saver.restore()
    saver.close()
    return found


def assert_same_end(folder, whole):
    step, state, _ = read(folder)
    wanted = flatten(read(whole)[1])
    assert step == STEPS and set(flatten(state)) == set(wanted)
    for name, leaf in flatten(state).items():
        assert leaf.tobytes() == wanted[name].tobytes(), name
    for path in (whole / 'weights').rglob('*.safetensors'):
        assert path.read_bytes() == (folder / path.relative_to(whole)).read_bytes()


@pytest.mark.parametrize(
    'number, at, code',
    [(signal.SIGKILL, 7, -9), (signal.SIGKILL, 2, -9), (signal.SIGTERM, 8, 75)],
    ids=['kill', 'kill-early', 'stop'],
)
def test_a_killed_process_goes_on_from_a_committed_step(
    toy, whole, tmp_path, capsys, number, at, code
):
    done = subprocess.run(
        [sys.executable, '-c', CHILD, TOY, tmp_path, str(int(number)), str(at), str(STEPS)],
        env=os.environ | {'PYTHONPATH': str(TOY.parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    committed = [int(path.name) for path in tmp_path.glob('state/*') if path.name.isdigit()]
    assert not (tmp_path / 'weights').exists()
    toy.fit(tmp_path, steps=STEPS)
    said = capsys.readouterr().err
    if committed:
        assert f'{tmp_path}: resumes from step {max(committed)}\n' in said
    else:
        assert at == 2 and 'resumes' not in said
    if number == signal.SIGTERM:
        assert max(committed) == at
    assert_same_end(tmp_path, whole)
    assert not list(tmp_path.glob('state/*tmp*'))


def test_a_run_that_resumes_on_other_cores_says_so(toy, tmp_path, capsys, monkeypatch):
    from matrix_jax.train import loop

    toy.fit(tmp_path, steps=4)
    toy.fit(tmp_path, steps=8)
    assert 'CPU cores' not in capsys.readouterr().err
    monkeypatch.setattr(loop, 'cpu_cores', lambda: 99)
    toy.fit(tmp_path, steps=STEPS)
    assert 'CPU cores and resumes on 99, so sums' in capsys.readouterr().err


def test_a_process_that_is_killed_again_and_again_ends_in_the_same_bits(toy, whole, tmp_path):
    for at in (2, 3, 7, 9):  # twice before or during the first save
        done = subprocess.run(
            [sys.executable, '-c', CHILD, TOY, tmp_path, str(signal.SIGKILL.value), str(at), '12'],
            env=os.environ | {'PYTHONPATH': str(TOY.parents[2])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    toy.fit(tmp_path, steps=STEPS)
    assert_same_end(tmp_path, whole)


def test_a_damaged_step_is_refused_until_it_is_removed(toy, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    newest = tmp_path / 'run/state' / str(STEPS)
    path = max(filter(Path.is_file, newest.rglob('*')), key=lambda one: one.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f'{path}: truncated, .*step 10 is whole: remove'):
        toy.fit(tmp_path / 'run', steps=STEPS)
    shutil.rmtree(newest)
    toy.fit(tmp_path / 'run', steps=STEPS)
    assert_same_end(tmp_path / 'run', whole)


def test_a_full_disk_ends_the_run_and_keeps_the_save_before(toy, whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        return 1.0

    try:
        with pytest.raises(SaveError) as error:
            toy.fit(tmp_path, steps=STEPS, events=[(8, fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = re.search(
        r'step [68] could not be saved \(File too large\); step ([46]) is whole, and '
        'the next start goes on from it',
        str(error.value),
    )
    assert read(tmp_path)[0] == int(found[1])
    toy.fit(tmp_path, steps=STEPS)
    assert_same_end(tmp_path, whole)


def test_the_tool_has_an_exit_code_for_a_failed_save(clips, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location('tools_train', TOY.parents[2] / 'tools/train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def fit(*_):
        raise SaveError('step 8 could not be saved')

    monkeypatch.setattr('matrix_jax.train.loop.fit', fit)
    monkeypatch.setattr('matrix_jax.worlds.start', lambda run: (None, None))
    with pytest.raises(SystemExit) as stop:
        main_guard(
            module.main,
            ['the_matrix:TINY_SWIN', '--data', str(clips), '--out', str(tmp_path / 'out')],
        )
    assert stop.value.code == 74
    assert capsys.readouterr().err == 'error: step 8 could not be saved\n'
