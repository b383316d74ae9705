"""A world as pure functions is the world of `WorldEnv`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import config, recipes
from matrix_jax.serve.runtime import start_frames

pytest.importorskip('gymnasium')


def test_agents_under_vmap_and_scan_see_the_world_of_a_player(stream, tiny):
    from matrix_jax.envs import FunctionalEnv

    run = dataclasses.replace(recipes.load('the_matrix:TINY'), weights=str(tiny))
    env = FunctionalEnv(run)
    assert env.num_actions == 9 and env.lag == stream.lag
    actions = jnp.array([[0, 5], [3, 5], [3, 99]])  # of two agents; the last is none

    @jax.jit
    def play(seeds):
        states = jax.vmap(env.reset)(jax.vmap(jax.random.key)(seeds))

        def step(states, actions):
            states = jax.vmap(env.step)(states, actions)
            return states, states.frames

        return jax.lax.scan(step, states, actions)

    states, frames = play(jnp.array([4, 7]))
    assert states.shift.tolist() == [3, 3] and states.observation.shape == (2, 32, 48, 3)
    np.testing.assert_array_equal(states.observation, frames[-1][:, -1])

    slots = stream.empty_copy()
    prompt, start = start_frames.choose(slots.world, tiny, None, None)
    clip = start_frames.load_clip(slots.world, tiny, start)
    for index, seed in enumerate((4, 7)):
        slots.write(index, slots.init(slots.condition(prompt, clip)[0], seed))
    for step in range(3):
        controls = [env.world.vocabulary.choices[min(int(one), 8)] for one in actions[step]]
        given = np.stack([slots.encode(one) for one in [*controls, 'N']])
        made, _ = slots.step(given, np.array([True, True, False]))
        difference = np.asarray(made)[:2].astype(int) - np.asarray(frames[step])
        assert np.abs(difference).max() <= 1  # another program rounds otherwise


def test_models_of_whole_clips_are_refused():
    from matrix_jax.envs import FunctionalEnv

    with pytest.raises(config.UsageError, match='makes whole clips'):
        FunctionalEnv('the_matrix:STAGE2')
