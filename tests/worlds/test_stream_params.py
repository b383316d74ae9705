"""Streams as they are traced for GPUs, run on the CPU: the same latents up to rounding."""

import jax
import numpy as np
import pytest

from matrix_jax import recipes
from matrix_jax.benchmark import target as targets
from matrix_jax.dit import segments
from matrix_jax.parallel import compilation

STEPS = 2


def rollout(world, params):
    """Latents of the first steps, of fixed random inputs."""
    stream, carry = targets.network_stream(world), targets.random_condition(world)
    chance = np.random.default_rng(0)
    words = world.vocabulary
    made = []
    carry = jax.jit(stream.init)(params, carry, jax.random.key(1))
    step = jax.jit(stream.step)
    for _ in range(STEPS):
        names = chance.choice(words.choices, world.cfg.stream.controls_per_step)
        carry, latents = step(params, carry, words.encode(list(names))[None])
        made.append(np.asarray(latents))
    return np.stack(made)


@pytest.mark.parametrize('recipe', ['the_matrix:TINY', 'matrix_game_2:TINY', 'matrix_game_3:TINY'])
def test_separate_layers_make_the_same_latents(recipe):
    world = targets.build(recipes.load(recipe).world)
    params = jax.device_put(world.init(0, zero_init=False), jax.devices()[0])
    assert world.stream_params(params) is params
    want = rollout(world, params)
    with compilation.compile_for('gpu'):
        split = world.stream_params(params)
        got = rollout(world, split)
        assert world.stream_params(split)['transformer'].keys() == split['transformer'].keys()
    runs = [split['transformer'][name] for name in world.cfg.dit.segments]
    assert all(map(segments.is_separate, runs))
    assert sum(map(len, runs)) == world.cfg.dit.layers
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
