import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from matrix_jax.train import state as states

PARAMS = {'net': {'kernel': np.ones((2, 2), np.float32), 'bias': np.zeros(2, np.float32)}}


def loss(params, batch, key):
    y = batch @ params['net']['kernel'] + params['net']['bias']
    return jnp.square(y).sum(), {'noise': jax.random.normal(key)}


@pytest.fixture(scope='module')
def parts():
    tx = optax.sgd(0.1)
    state = states.init(PARAMS, lambda path: path == 'net/kernel', tx, seed=3)
    return state, jax.jit(states.make_step(loss, tx, ema_decay=0.9))


def test_a_step_updates_the_student_and_its_average(parts):
    state, step = parts
    batch = jnp.array([[1.0, 0.0]])
    after, metrics = step(state, batch)
    np.testing.assert_allclose(after.student['net/kernel'], [[0.8, 0.8], [1, 1]], rtol=1e-6)
    # (1 + step) / (10 + step) at first: a tenth of the old, nine of the new.
    np.testing.assert_allclose(after.ema['net/kernel'], [[0.82, 0.82], [1, 1]], rtol=1e-6)
    assert float(metrics['loss']) == 2 and int(after.step) == 1
    assert states.merged(after)['net'].keys() == PARAMS['net'].keys()
    other = step(after, batch)[1]['noise']
    assert float(other) != float(metrics['noise'])  # each step has its own key
    assert float(step(after, batch)[1]['noise']) == float(other)


def test_a_step_that_is_not_finite_counts_and_changes_nothing(parts):
    state, step = parts
    after, _ = step(state, jnp.array([[jnp.nan, 0.0]]))
    again, metrics = step(after, jnp.array([[jnp.inf, 0.0]]))
    assert int(again.skipped) == int(metrics['skipped']) == 2 and int(again.step) == 2
    for role in ('student', 'ema'):
        np.testing.assert_array_equal(getattr(again, role)['net/kernel'], 1)
    assert int(step(again, jnp.array([[1.0, 0.0]]))[0].skipped) == 0


def test_something_must_train():
    with pytest.raises(ValueError, match='no parameter trains'):
        states.init(PARAMS, lambda path: False, optax.sgd(1.0), seed=0)
