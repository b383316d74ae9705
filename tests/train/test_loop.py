"""The training loop on a toy world: logs, resumes exactly, stops when told, guards against NaN."""

import dataclasses
import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import config
from matrix_jax.train import loop
from matrix_jax.train.nan_guard import Diverged
from matrix_jax.train.optim import Optimizer
from matrix_jax.train.stage import Stage
from matrix_jax.weights import conversion
from matrix_jax.weights.diffusers_layout import read_component
from matrix_jax.worlds.base import BaseWorld
from matrix_jax.worlds.networks import Component


@dataclasses.dataclass(frozen=True)
class Line:
    def to_released(self):
        return {'_class_name': 'Line'}


@dataclasses.dataclass(frozen=True)
class Config:
    line: Line = Line()
    name: str = 'Toy'


def weights(cfg):
    return (
        conversion.Row('weight', 'kernel', 'o i -> i o'),
        conversion.Row('bias', 'bias', 'o -> o'),
    )


class Toy(BaseWorld):
    components = (Component('line', 'line', weights, shapes=None),)


class Loader:
    """Batches that follow from their index; at some of them it does something first."""

    def __init__(self, events):
        self.index, self.events = 0, events
        self.names = [f'clip {index}' for index in range(100)]

    def __next__(self):
        self.index += 1
        x = np.random.default_rng(self.index).normal(size=(4, 3)).astype(np.float32)
        scale = self.events.get(self.index, lambda: 1.0)()
        return {'x': x * scale, 'clip': np.full(4, self.index)}

    def state(self):
        return json.dumps(self.index).encode()

    def restore(self, state):
        self.index = json.loads(state)


@dataclasses.dataclass(frozen=True)
class Fit(Stage):
    events: tuple = ()
    components = ('line',)

    def trainable(self, path):
        return path.endswith('kernel')

    def loader(self, world, params, data, batch, seed, cache):
        return Loader(dict(self.events))

    def loss(self, world, params, batch, key):
        y = batch['x'] @ params['line']['kernel'] + params['line']['bias']
        return jnp.square(y - 1).mean(), {'mean': y.mean()}


def fit(out, steps=6, events=(), **train):
    stage = Fit(Optimizer(learning_rate=0.1, schedule='cosine', warmup=2), events=tuple(events))
    run = config.Run(
        world=Config(),
        stage=stage,
        out=str(out),
        train=config.Train(steps=steps, save_every=2, **{'log_every': 2, **train}),
    )
    params = {'line': {'kernel': np.ones((3, 2), np.float32), 'bias': np.ones(2, np.float32)}}
    return loop.fit(run, Toy(run.world), params)


def exported(out):
    return dict(read_component(out / 'weights', 'line')[1])


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
    return 1.0


def test_a_stopped_run_goes_on_to_the_same_parameters(tmp_path):
    whole = fit(tmp_path / 'whole')
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / 'cut', events=[(3, sigterm)])
    assert stop.value.code == loop.STOPPED == 75
    assert not (tmp_path / 'cut/weights').exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    cut = fit(tmp_path / 'cut')
    assert (cut['step'], cut['loss']) == (whole['step'], whole['loss']) and whole['step'] == 6
    for name, tensor in exported(tmp_path / 'whole').items():
        np.testing.assert_array_equal(exported(tmp_path / 'cut')[name], tensor)


def test_a_finished_run_says_the_same_again(tmp_path):
    first = fit(tmp_path)
    before = exported(tmp_path)
    again = fit(tmp_path)
    assert again['loss'] == first['loss']
    for name, tensor in before.items():
        np.testing.assert_array_equal(exported(tmp_path)[name], tensor)


def test_only_trainable_leaves_move(tmp_path):
    fit(tmp_path)
    found = exported(tmp_path)
    np.testing.assert_array_equal(np.asarray(found['bias'], np.float32), 1)
    assert (np.asarray(found['weight'], np.float32) != 1).all()


def test_a_batch_that_is_not_finite_changes_nothing(tmp_path):
    fit(tmp_path / 'one', steps=1)
    assert fit(tmp_path / 'two', steps=2, events=[(2, nan)])['refused'] == 1
    assert np.isfinite(np.asarray(exported(tmp_path / 'two')['weight'], np.float32)).all()


def nan():
    return float('nan')


@pytest.mark.parametrize('log_every', [2, 100])
def test_a_run_that_stays_not_finite_gives_up(tmp_path, capsys, log_every):
    with pytest.raises(Diverged) as error:
        fit(tmp_path, steps=9, log_every=log_every, events=[(2, nan), (5, nan), (6, nan), (7, nan)])
    assert str(error.value) == (
        '3 updates in a row were not finite; their clips: step 5 (loss nan, gradient nan): clip 5; '
        'step 6 (loss nan, gradient nan): clip 6; step 7 (loss nan, gradient nan): clip 7'
    )
    told = [line for line in capsys.readouterr().err.splitlines() if 'left out' in line]
    assert [line[-6:] for line in told] == ['clip 2', 'clip 5', 'clip 6']
    assert not (tmp_path / 'weights').exists()
    # Nothing of it was saved: the run goes on from before, and with other data to its end.
    assert fit(tmp_path, steps=9, log_every=log_every)['refused'] == 3
