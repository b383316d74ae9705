"""Flow matching; tests/test_parity.py compares its tables with the reference."""

import numpy as np
import pytest

from matrix_jax.diffusion import flow

TABLE = flow.table(flow.Config())


def test_the_table_descends_from_pure_noise():
    assert TABLE.sigmas[0] == 1 and np.all(np.diff(TABLE.sigmas) < 0) and TABLE.sigmas[-1] > 0
    np.testing.assert_allclose(TABLE.weights.mean(), 1, rtol=1e-6)
    assert TABLE.weights.argmax() == np.abs(TABLE.levels - 500).argmin()
    even = flow.table(flow.Config(shift=1.0))
    np.testing.assert_allclose(even.levels, np.arange(1000, 0, -1), rtol=1e-6)


def test_the_shift_moves_steps_towards_noise():
    warped = flow.warp(flow.Config(), (1000, 750, 500, 250))
    np.testing.assert_allclose(warped, [1000, 937.5, 833.3333, 625], rtol=1e-6)
    for steps in ((), (1001,), (-1,)):
        with pytest.raises(ValueError, match='steps: got'):
            flow.warp(flow.Config(), steps)


def test_a_level_has_the_sigma_of_the_nearest_entry():
    levels = np.array([[1000.0, 0.0, 700.0]])
    np.testing.assert_allclose(flow.sigma_at(TABLE, levels), levels / 1000, atol=6e-3)
    assert flow.sigma_at(TABLE, levels)[0, 1] == TABLE.sigmas[-1]
    assert flow.weight_at(TABLE, 1000.0) == 0
    assert flow.next_sigma(TABLE, TABLE.levels[3:5]).tolist() == TABLE.sigmas[4:6].tolist()
    assert flow.next_sigma(TABLE, np.array([900.0, 0.0])).tolist() == [0, 0]


def test_conversions_between_v_and_x0_are_inverse():
    x0, noise = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 4, 5)).astype(np.float32)
    sigmas = np.array([[1.0, 0.5, 0.1], [0.9, 0.3, 0.02]], np.float32)
    x, v = flow.add_noise(sigmas, x0, noise), flow.velocity(x0, noise)
    np.testing.assert_allclose(flow.x0_from_v(sigmas, x, v), x0, atol=1e-6)
    np.testing.assert_allclose(flow.v_from_x0(sigmas, x, x0), v, atol=1e-4)
    np.testing.assert_allclose(flow.euler(sigmas, 0 * sigmas, x, v), x0, atol=1e-6)
    np.testing.assert_allclose(
        flow.euler(sigmas, sigmas / 2, x, v), flow.add_noise(sigmas / 2, x0, noise), atol=1e-6
    )
    np.testing.assert_array_equal(flow.add_noise(0.0, x0, noise), x0)


def test_a_straight_path_is_sampled_exactly():
    x0, noise = np.random.default_rng(0).normal(size=(2, 1, 3, 2, 2, 4)).astype(np.float32)
    levels = []

    def denoise(params, x, level, given):
        levels.append(level.shape)
        return given - params

    for steps in (1, 7):
        made = flow.sample(flow.Config(), steps, denoise, x0, noise, noise)
        np.testing.assert_allclose(made, x0, atol=1e-5)
    assert set(levels) == {(1, 3)}
    with pytest.raises(ValueError, match='steps: got 0'):
        flow.sample(flow.Config(), 0, denoise, x0, noise, noise)


@pytest.mark.parametrize('fields', [{'shift': 0.0}, {'train_steps': 0}])
def test_bad_configs_are_refused(fields):
    with pytest.raises(ValueError, match='flow.'):
        flow.Config(**fields)


def test_even_weights_include_pure_noise():
    bell, even = (flow.table(flow.Config(weighting=kind)) for kind in ('bell', 'even'))
    assert bell.weights[0] == 0 and np.all(even.weights == 1)
    np.testing.assert_array_equal(even.sigmas, bell.sigmas)
    with pytest.raises(ValueError, match="flow.weighting: got 'flat', expected 'bell' or 'even'"):
        flow.Config(weighting='flat')
