"""The sampler on a toy network; tests/test_parity.py replays the reference loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.diffusion import sampling, schedules
from matrix_jax.diffusion.schedules import SchedulerConfig


def denoise(params, x, level, text, control):
    told = jnp.mean(text, axis=(1, 2)) + jnp.mean(control, axis=(1, 2))
    return jnp.tanh(
        params * x + told[:, None, None, None, None] + level[..., None, None, None] / 1000
    )


def sample(cfg, seed=0, null=1.0):
    noise = jax.random.normal(jax.random.key(seed), (2, 3, 2, 2, 4))
    text, control = jnp.ones([2, 5, 6]), jnp.ones([2, 3, 4])

    def draw(index):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed + 1), index), noise.shape)

    run = functools.partial(sampling.sample, cfg, SchedulerConfig(), denoise)
    return jax.jit(run, static_argnums=2)(0.5, noise, draw, text, null * text, control)


def test_guidance_towards_the_same_text_changes_nothing():
    guided = sample(sampling.Config(steps=4, guidance=6.0))
    np.testing.assert_allclose(guided, sample(sampling.Config(steps=4, guidance=1.0)), atol=1e-5)
    assert np.abs(sample(sampling.Config(steps=4, guidance=6.0), null=-1.0) - guided).max() > 0.1


def test_the_default_solver_is_that_of_the_scheduler():
    ddim = sample(sampling.Config(steps=4, solver='ddim'))
    assert np.array_equal(sample(sampling.Config(steps=4)), ddim)
    assert np.abs(sample(sampling.Config(steps=4, solver='dpm')) - ddim).max() > 1e-3


def test_scales_are_constant_or_within_one_and_one_plus_guidance():
    levels = schedules.timesteps(SchedulerConfig(), 50)
    scales = sampling.guidance_scales(sampling.Config(), levels)
    assert scales.min() >= 1 and scales.max() <= 7 and np.ptp(scales) > 5
    fixed = sampling.guidance_scales(sampling.Config(dynamic_guidance=False), levels)
    assert np.all(fixed == 6)


@pytest.mark.parametrize('fields', [{'steps': 0}, {'solver': 'lcm'}])
def test_bad_values_are_refused(fields):
    with pytest.raises(ValueError, match='got .* expected'):
        sampling.Config(**fields)


def test_guidance_needs_a_negative_text():
    with pytest.raises(ValueError, match='null_text: got None'):
        sampling.sample(sampling.Config(), SchedulerConfig(), denoise, 1.0, None, None, None)


def test_guidance_equals_its_formula():
    """Compared with one call per condition."""
    draws = np.random.default_rng(0)
    x, level = draws.normal(size=(2, 3, 2, 2, 4)), np.full([2, 3], 500)
    text, null_text = draws.normal(size=(2, 2, 5, 6))
    control, null_control = draws.normal(size=(2, 2, 3, 4))

    def v(text, control):
        return denoise(0.5, x, level, text, control)

    def guided(**scales):
        told = sampling.conditions(text, null_text, control, null_control, **scales)
        return sampling.guide(denoise, 0.5, x, level, *told)

    np.testing.assert_allclose(guided(), v(text, control), atol=1e-6)
    far = v(null_text, control) + 6 * (v(text, control) - v(null_text, control))
    np.testing.assert_allclose(guided(guidance=6), far, atol=1e-5)
    keys = v(text, null_control) + 3 * (v(text, control) - v(text, null_control))
    np.testing.assert_allclose(guided(control_guidance=3), keys, atol=1e-5)
    both = (
        v(null_text, null_control)
        + 6 * (v(text, null_control) - v(null_text, null_control))
        + 3 * (v(text, control) - v(text, null_control))
    )
    np.testing.assert_allclose(guided(guidance=6, control_guidance=3), both, atol=1e-5)
