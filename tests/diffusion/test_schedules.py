import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import parity
from matrix_jax.diffusion import schedules
from matrix_jax.diffusion.schedules import SchedulerConfig

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'the_matrix'
SHAPE = (2, 3, 4, 4, 5)


def normal(seed):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def test_replays_the_reference_tables_and_steps():
    lines = parity.replay(parity.read(GOLDENS / 'e_schedulers.safetensors'))
    assert len(lines) > 70 and [line for line in lines if not line.ok] == []


def test_noising_follows_the_recorded_training_windows():
    record = parity.read(GOLDENS / 'i_train_stage3_loss.safetensors')
    levels = record.inputs['timesteps']
    groups = record.config['num_noise_groups']
    offsets = schedules.grouped(schedules.timesteps(SchedulerConfig(), groups), groups, 2)[0, 1:]
    shared = levels[:, 1:] - (offsets - offsets[0])
    assert np.all(shared == shared[:, :1]) and np.all(levels[:, 0] == 0)
    schedule = schedules.make(SchedulerConfig.from_released(record.config['sched']))
    video = {
        name: np.moveaxis(array, 2, -1)
        for name, array in {**record.inputs, **record.outputs}.items()
        if array.ndim == 5
    }
    noisy = schedules.add_noise(schedule, video['x0'], video['noise'], levels)
    np.testing.assert_allclose(noisy, video['noisy'], atol=2e-6)
    x0 = schedules.x0_from_v(schedule, video['noisy'], video['model_output'], levels)
    np.testing.assert_allclose(x0, video['x0_pred'], atol=2e-6)
    np.testing.assert_allclose(
        1 / (1 - schedule.alphas_cumprod[levels]).ravel(),
        record.outputs['table_weights'],
        rtol=1e-4,
    )


def test_velocity_and_clean_estimate_are_inverse():
    schedule = schedules.make(SchedulerConfig())
    levels = jnp.array([[0, 500, 999], [1, 998, 999]])
    x0, noise = normal(0), normal(1)
    noisy = schedules.add_noise(schedule, x0, noise, levels)
    v = schedules.velocity(schedule, x0, noise, levels)
    np.testing.assert_allclose(schedules.x0_from_v(schedule, noisy, v, levels), x0, atol=2e-6)
    assert np.array_equal(noisy[:, 2], noise[:, 2])  # level 999 is pure noise
    assert schedule.alphas_cumprod[999] == 0


def test_grouped_levels_have_condition_frames_in_front():
    rows = schedules.grouped(np.array([999, 749, 499, 249]), 2, 1, context=3, context_level=7)
    assert rows.tolist() == [[7, 7, 7, 499, 999], [7, 7, 7, 249, 749]]
    with pytest.raises(ValueError, match='got 5, expected a multiple of the 2 noise groups'):
        schedules.grouped(np.arange(5), 2, 1)


@pytest.mark.parametrize(
    'cfg',
    [
        SchedulerConfig(),
        SchedulerConfig(snr_shift=1.0, spacing='linspace', solver='dpm', zero_terminal_snr=False),
    ],
)
def test_released_configs_round_trip(cfg):
    assert SchedulerConfig.from_released(cfg.to_released()) == cfg


def test_unsupported_released_configs_are_refused_with_all_faults():
    with pytest.raises(ValueError) as error:
        SchedulerConfig.from_released(
            {
                '_class_name': 'EulerDiscreteScheduler',
                'sigma_max': 80,
                'prediction_type': 'epsilon',
                '_version': '0.31.0',
            }
        )
    for word in ('EulerDiscreteScheduler', 'epsilon', 'v_prediction', 'sigma_max'):
        assert word in str(error.value)


@pytest.mark.parametrize(
    'call',
    [
        lambda: SchedulerConfig(spacing='cosine'),
        lambda: SchedulerConfig(solver='euler'),
        lambda: schedules.timesteps(SchedulerConfig(), 0),
        lambda: schedules.timesteps(SchedulerConfig(), 1001),
        lambda: schedules.lcm_timesteps(50, 40),
    ],
)
def test_bad_values_are_refused(call):
    with pytest.raises(ValueError, match='got .* expected'):
        call()
