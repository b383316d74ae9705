"""UniPC is exact where it must be, and of second order; test_parity.py replays the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.diffusion import unipc


def run(cfg, denoise, x, hold=lambda x: x):
    """(clean latents, latents before each step)."""
    table, x = unipc.step_table(cfg), hold(jnp.asarray(x))
    return jax.jit(lambda x: unipc.run(table, denoise, unipc.init(x), x, hold)[1:])(x)


def test_levels_of_the_published_runs():
    assert unipc.timesteps(unipc.Config(3)).tolist() == [999, 908, 713]
    assert unipc.timesteps(unipc.Config(4)).tolist() == [999, 937, 833, 624]
    # The largest sigma is a float32: with 0.999 itself, some of these would be one less.
    assert unipc.timesteps(unipc.Config(30, shift=1.0))[:4].tolist() == [999, 965, 932, 899]
    sigmas = unipc.sigmas(unipc.Config(50))
    assert len(sigmas) == 51 and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize('steps', [1, 2, 3, 7])
def test_a_straight_path_ends_where_it_leads(steps):
    clean, noise = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    cfg = unipc.Config(steps)
    sigma = np.float32(unipc.sigmas(cfg)[0])
    x, given = run(cfg, lambda x, level: noise - clean, (1 - sigma) * clean + sigma * noise)
    np.testing.assert_allclose(x, clean, atol=2e-6)
    assert given.shape == (steps, 5)


def test_the_error_falls_with_the_square_of_the_steps():
    """Clean data is one normal number of deviation 0.5: the path is known in closed form."""
    deviation = 0.5

    def denoise(x, level):
        # Levels are cut off; the exact sigma is that of the step, found again by its level.
        sigma = jnp.asarray(levels)[jnp.argmax(jnp.asarray(whole) == level)]
        variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
        score = (sigma - (1 - sigma) * deviation**2) / variance
        return x * score

    errors = []
    for steps in (16, 32, 64):
        cfg = unipc.Config(steps, shift=1.0)
        levels, whole = np.float32(unipc.sigmas(cfg)), unipc.timesteps(cfg)
        start = np.sqrt((1 - levels[0]) ** 2 * deviation**2 + levels[0] ** 2)
        x, _ = run(cfg, denoise, np.float32([start]))
        errors.append(abs(float(x[0]) - deviation))
    assert errors[0] < 0.01 and errors[0] / errors[1] > 2.5 and errors[1] / errors[2] > 2.5, errors


def test_what_is_held_stays():
    def hold(x):
        return x.at[0].set(7.0)

    x, given = run(
        unipc.Config(4), lambda x, level: jnp.sin(x) + level / 1000, np.ones(3, np.float32), hold
    )
    assert x[0] == 7 and (np.asarray(given)[:, 0] == 7).all() and len(set(np.asarray(x))) == 2


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'steps': 0}, 'solver.steps: got 0'),
        ({'steps': 1001}, 'solver.steps: got 1001'),
        ({'shift': 0.0}, 'solver.shift: got 0'),
        ({'shift': float('nan')}, 'solver.shift: got nan'),
    ],
)
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        unipc.Config(**fields)


@pytest.mark.parametrize('boundary, counts', [(900.0, (2, 2)), (833.0, (3, 1)), (0.0, (4, 0))])
def test_the_steps_of_two_networks_are_those_of_one_table(boundary, counts):
    table = unipc.step_table(unipc.Config(4))  # levels 999, 937, 833, 624
    parts = unipc.split(table, boundary)
    assert tuple(len(part.level) for part in parts) == counts
    for column, *halves in zip(table, *parts, strict=True):
        np.testing.assert_array_equal(column, np.concatenate(halves))


def test_frames_after_clean_ones_continue_with_the_history_of_the_network_before():
    """Two networks that share the steps; each sees the levels and latents that one would see."""
    clean, noise = np.random.default_rng(0).normal(size=(2, 1, 3, 1, 1, 2)).astype(np.float32)
    clean, seen = clean[:, :1], []

    def begin(factor, x):
        seen.append(x)
        return lambda x, levels: factor * jnp.sin(x) + levels[..., None, None, None] / 1000

    table = unipc.step_table(unipc.Config(4))
    high, low = unipc.split(table, 900)
    one, _ = unipc.sample_after(clean, noise, [(table, lambda x: begin(1.0, x))])
    same, given = unipc.sample_after(
        clean, noise, [(part, lambda x: begin(1.0, x)) for part in (high, low)]
    )
    np.testing.assert_allclose(one, same, atol=1e-6)
    np.testing.assert_array_equal(given[:, :, :1], np.broadcast_to(clean, given[:, :, :1].shape))
    np.testing.assert_array_equal(seen[-1], given[2])
    other, _ = unipc.sample_after(
        clean, noise, [(high, lambda x: begin(1.0, x)), (low, lambda x: begin(2.0, x))]
    )
    assert np.abs(other - same)[:, 1:].max() > 0.1
