"""Trained rewards in the three environments: rewards, ends, states that go on alike."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import envs, recipes
from matrix_jax.config import UsageError
from matrix_jax.rewards import model, tasks
from matrix_jax.weights.diffusers_layout import CheckpointError

gymnasium = pytest.importorskip('gymnasium')
CFG = model.Config(height=32, width=48, widths=(4,), hidden=4)


@pytest.fixture(scope='module')
def trained():
    """A reward for frames of the tiny world."""
    return model.RewardModel(CFG, model.init(CFG, 0))


@pytest.fixture(scope='module')
def off_road(trained):
    """One to which every frame is off the road."""
    params = jax.tree.map(np.asarray, trained.params)
    params['Dense_1'] = {'kernel': 0 * params['Dense_1']['kernel'], 'bias': np.float32([-9, 0])}
    return model.RewardModel(CFG, params)


def expected(reward, frames):
    """Rewards of steps, frames uint8 [T F H W 3], off the road or not."""
    values = np.asarray(reward.values(frames))
    return values[:, 0] * values[:, 1], values[:, 0] < tasks.OFF_ROAD


def test_one_agent_is_paid_for_what_its_frames_show(stream, tiny, trained, off_road, tmp_path):
    trained.save(tmp_path)
    env = envs.WorldEnv(opened=(stream, tiny), reward=tmp_path, whole=True)
    env.reset(seed=3)
    steps = [env.step(action) for action in (0, 1, 2)]
    wanted, _ = expected(trained, np.stack([observation for observation, *_ in steps]))
    np.testing.assert_allclose([reward for _, reward, *_ in steps], wanted, rtol=1e-5)

    env = envs.WorldEnv(opened=(stream, tiny), reward=off_road)
    for _ in range(2):
        env.reset(seed=3)
        assert [env.step(0)[2] for _ in range(tasks.OFF_STEPS)] == [False, True]
    env.reset(seed=3)
    env.step(0)
    state = pickle.loads(pickle.dumps(env.clone_state()))
    copied = copy.deepcopy(env)
    assert env.step(0)[2] and copied.step(0)[2]
    env.reset()
    env.restore_state(state)  # one step off the road
    assert env.step(0)[2]


def test_many_agents_end_one_by_one(stream, tiny, trained, off_road):
    many = envs.WorldVectorEnv(3, opened=(stream, tiny), reward=trained, whole=True)
    many.reset(seed=3)
    frames, rewards, *_ = many.step([0, 1, 2])
    np.testing.assert_allclose(rewards, expected(trained, frames)[0], rtol=1e-5)

    many = envs.WorldVectorEnv(3, opened=(stream, tiny), reward=off_road)
    many.reset(seed=3)
    assert not many.step([0, 0, 0])[2].any()
    state = many.clone_state()
    assert many.step([0, 0, 0])[2].all()
    _, rewards, ended, *_ = many.step([0, 0, 0])  # starts the next episodes
    assert not rewards.any() and not ended.any()
    assert not many.step([0, 0, 0])[2].any() and many.step([0, 0, 0])[2].all()
    many.restore_state(state)
    many.reset(seed=3, options={'reset_mask': np.array([False, True, False])})
    assert many.step([0, 0, 0])[2].tolist() == [True, False, True]


def test_a_function_of_states_is_paid_the_same(stream, tiny, trained):

    run = dataclasses.replace(recipes.load('the_matrix:TINY'), weights=str(tiny))
    env = envs.FunctionalEnv(run, reward=trained)

    @jax.jit
    def play(seeds):
        states = jax.vmap(env.reset)(jax.vmap(jax.random.key)(seeds))
        return states, jax.vmap(env.step)(states, jnp.array([0, 1]))

    before, after = play(jnp.array([4, 7]))
    wanted, off = expected(trained, after.frames)
    np.testing.assert_allclose(after.reward, wanted, rtol=1e-5)
    assert not before.reward.any() and not after.terminated.any()
    assert after.reward_state.tolist() == off.astype(int).tolist()


def test_what_is_no_reward_is_refused(stream, tiny, tmp_path):
    for given, error, message in (
        (3, UsageError, 'reward: got .3., expected a function, a trained reward or its folder'),
        (str(tmp_path), CheckpointError, 'no component reward'),
        (
            model.RewardModel(model.Config(), {}),
            UsageError,
            'reward: got one for 4 frames of 64x96, expected at most 8 frames of 32x48',
        ),
    ):
        with pytest.raises(error, match=message):
            envs.WorldEnv(opened=(stream, tiny), reward=given)
