"""The world as gymnasium environments: its checker, seeds, rewards, and worlds that break."""

import copy
import pickle
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import envs, recipes
from matrix_jax.config import UsageError
from matrix_jax.envs.players import Players
from matrix_jax.serve.runtime import batched_stream

PROJECT = Path(__file__).parents[2] / 'pyproject.toml'
gymnasium = pytest.importorskip('gymnasium')


@pytest.fixture(scope='session')
def opened_stream(stream, tiny):
    return stream, tiny


def poison(players, index):
    """Makes a world not a number."""
    carry = jax.tree.map(
        lambda leaf: leaf * jnp.nan if leaf.dtype.kind == 'f' else leaf, players.stream.read(index)
    )
    players.stream.write(index, carry)


def drive(env, seed, actions):
    """(first observation, those of the actions)."""
    first, _ = env.reset(seed=seed)
    return first, np.stack([env.step(action)[0] for action in actions])


@pytest.mark.parametrize('whole, shape', [(False, (32, 48, 3)), (True, (8, 32, 48, 3))])
def test_gymnasium_accepts_it(opened_stream, whole, shape):
    from gymnasium.utils.env_checker import check_env

    env = envs.WorldEnv(opened=opened_stream, whole=whole, render_mode='rgb_array')
    assert env.observation_space.shape == shape and env.action_space.n == 9
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', '.*does not have a spec|.*not having a spec')
        check_env(env)
    assert env.render().shape == (32, 48, 3)


def test_equal_seeds_and_actions_give_equal_worlds(opened_stream):
    env, lag = envs.WorldEnv(opened=opened_stream), opened_stream[0].lag
    first, straight = drive(env, 3, [0] * (lag + 2))
    again, same = drive(env, 3, [0] * (lag + 2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(straight, same)
    _, left = drive(env, 3, [1] * (lag + 2))
    assert (
        np.abs(straight[lag:] - left[lag:].astype(int)).max()
        > np.abs(straight[:lag] - left[:lag].astype(int)).max()
    )  # not bound to the keys yet
    assert (drive(env, 4, [0])[1] != straight[:1]).any()
    assert (env.reset(options={'prompt': 'snow'})[0] == first).all()  # the same start clip
    with pytest.raises(UsageError, match='options: got promt; expected prompt and start'):
        env.reset(options={'promt': 'snow'})
    with pytest.raises(UsageError, match="start: got 'moon'"):
        env.reset(options={'start': 'moon'})


def test_rewards_come_from_the_user_and_a_broken_world_ends(opened_stream):
    env = envs.WorldEnv(
        opened=opened_stream, reward=lambda before, action, after: action + (before != after).any()
    )
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    assert env.step(4)[1:] == (5.0, False, False, {'shift': 1, 'lag': opened_stream[0].lag})
    poison(env.players, 0)
    assert env.step(0)[2]
    env.reset()
    assert not env.step(0)[2]


def test_players_side_by_side_are_each_as_alone(opened_stream):
    many = envs.WorldVectorEnv(
        3,
        opened=opened_stream,
        reward=lambda before, action, after: action,
        render_mode='rgb_array',
    )
    first, info = many.reset(seed=3)
    assert many.observation_space.contains(first) and info['shift'].tolist() == [0, 0, 0]
    assert many.action_space.shape == (3,)
    actions = np.array([[0, 1, 2], [3, 4, 5], [0, 0, 0]])
    seen = []
    for row in actions:
        observations, rewards, *_, info = many.step(row)
        assert rewards.tolist() == row.tolist()
        seen.append(observations)
    alone = envs.WorldEnv(opened=opened_stream)
    for index in range(3):
        start, frames = drive(alone, 3 + index, actions[:, index])
        np.testing.assert_array_equal(start, first[index])
        np.testing.assert_array_equal(frames, np.stack(seen)[:, index])
    assert len(many.render()) == 3 and info['shift'].tolist() == [3, 3, 3]
    # one breaks: it ends alone, and starts again by itself
    poison(many.players, 1)
    assert many.step(actions[0])[2].tolist() == [False, True, False]
    observations, rewards, ended, _, info = many.step(actions[0])
    assert not ended.any() and rewards[1] == 0 and info['shift'].tolist() == [5, 0, 5]
    np.testing.assert_array_equal(observations[1], first[1])
    assert not many.step(actions[0])[2].any()
    with pytest.raises(UsageError, match='seed: got 2, expected 3'):
        many.reset(seed=[1, 2])
    with pytest.raises(UsageError, match='got 3 slots, expected at least 4'):
        envs.WorldVectorEnv(4, opened=opened_stream)


def test_what_is_no_action_is_refused(opened_stream):
    many, one = (envs.WorldVectorEnv(3, opened=opened_stream), envs.WorldEnv(opened=opened_stream))
    many.reset(seed=0), one.reset(seed=0)
    invalid = gymnasium.error.InvalidAction
    for actions in ([1, 2], [0, 9, 0], [-1, 0, 0], [0.9, 1.0, 2.0], 1, [True] * 3, ['D'] * 3, None):
        with pytest.raises(invalid, match='action: got'):
            many.step(actions)
    for action in (-1, 9, 1.7, '1', None, [1]):
        with pytest.raises(invalid, match='action: got'):
            one.step(action)
    assert one.step(np.int64(8)) and len(many.step((0, 8, 1))) == 5
    for prompt in (3, ['a'], '\ud800', 'x' * 501):
        with pytest.raises(UsageError, match='prompt: got .*, expected text of at most 500'):
            one.reset(options={'prompt': prompt})


def test_time_limits_and_resets_of_some(opened_stream):
    many = envs.WorldVectorEnv(3, opened=opened_stream, max_episode_steps=2)
    first, _ = many.reset(seed=3)
    rest = np.zeros(3, int)
    assert not many.step(rest)[3].any()
    assert many.step(rest)[2:4][1].all()
    observations, _, ended, late, info = many.step(rest)  # starts the next episodes
    np.testing.assert_array_equal(observations, first)
    assert not (ended | late).any() and info['shift'].tolist() == [0, 0, 0]

    many = envs.WorldVectorEnv(
        3, opened=opened_stream, autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED
    )
    first, _ = many.reset(seed=3)
    moved = many.step(rest)[0]
    poison(many.players, 1)
    assert many.step(rest)[2].tolist() == [False, True, False]
    mask = np.array([False, True, False])
    observations, info = many.reset(options={'reset_mask': mask})
    np.testing.assert_array_equal(observations[1], first[1])
    assert info['shift'].tolist() == [2, 0, 2] and (observations[0] != first[0]).any()
    assert moved.shape == observations.shape and not many.step(rest)[2].any()
    with pytest.raises(UsageError, match=r'reset_mask: got bool\[2\], expected bool\[3\]'):
        many.reset(options={'reset_mask': mask[:2]})
    with pytest.raises(UsageError, match='autoreset_mode: got'):
        envs.WorldVectorEnv(
            3, opened=opened_stream, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
        )


def test_states_copies_and_pickles_go_on_alike(opened_stream, monkeypatch):
    env = envs.WorldEnv(opened=opened_stream)
    drive(env, 3, [0, 1])
    state, copied = env.clone_state(), copy.deepcopy(env)
    wanted = [env.step(action)[0] for action in (2, 2, 0)]
    after = env.reset()[0], env.step(0)[0]
    assert copied.players.stream._step is env.players.stream._step  # nothing compiles
    pickled = pickle.dumps(state)
    for other in (copied, env):
        for one in (state, pickle.loads(pickled)):
            other.restore_state(one)
            for action, frame in zip((2, 2, 0), wanted, strict=True):
                np.testing.assert_array_equal(other.step(action)[0], frame)
            again = other.reset()[0], other.step(0)[0]  # the random numbers go on as well
            np.testing.assert_array_equal(again, after)
    many = envs.WorldVectorEnv(2, opened=opened_stream)
    many.reset(seed=1)
    state, wanted = many.clone_state(), many.step([3, 4])[0]
    many.reset(seed=9)
    many.restore_state(state)
    np.testing.assert_array_equal(many.step([3, 4])[0], wanted)

    with pytest.raises(TypeError, match='no recipe to pickle'):
        pickle.dumps(env)
    monkeypatch.setattr(env.players.stream, '_origin', ('a run', 3, 'early', 1))
    monkeypatch.setattr(
        batched_stream, 'open_stream', lambda *origin: (opened_stream[0].empty_copy(), origin)
    )
    data, wanted = pickle.dumps(env), env.step(5)[0]
    np.testing.assert_array_equal(pickle.loads(data).step(5)[0], wanted)


def test_environments_have_ids(opened_stream):
    env = gymnasium.make('matrix_jax/World-v0', opened=opened_stream, max_episode_steps=1)
    env.reset(seed=0)
    assert env.step(0)[3]
    named = {'num_envs': 2, 'opened': opened_stream}  # a smaller world than that of the reward
    with pytest.raises(UsageError, match='reward: got one for 4 frames of 64x96'):
        gymnasium.make_vec('matrix_jax/CarRacing-v0', **named)
    many = gymnasium.make_vec('matrix_jax/CarRacing-v0', reward=None, **named)
    assert isinstance(many, envs.WorldVectorEnv) and many.reset(seed=0)[0].shape[0] == 2
    assert {'matrix_jax/Doom-v0', 'matrix_jax/Gallery-v0'} <= set(gymnasium.registry)
    point = tomllib.loads(PROJECT.read_text())['project']['entry-points']['gymnasium.envs']
    assert point == {'matrix_jax': 'matrix_jax.envs:register'}


def test_rewards_of_the_ids_fit_their_worlds():
    from matrix_jax.rewards import model

    for arguments in envs.IDS.values():
        if 'reward' in arguments:
            cfg = recipes.load(arguments['recipe']).world
            model.load(arguments['reward']).check(cfg.height, cfg.width, 4)


def test_a_forked_process_is_told_to_spawn(opened_stream, monkeypatch):
    monkeypatch.setattr(Players, '_process', 1)  # that of another process
    with pytest.raises(UsageError, match="forked .*context='spawn'"):
        envs.WorldEnv(opened=opened_stream)


def test_gymnasium_is_asked_for_in_one_line():
    code = (
        'import sys; sys.modules["gymnasium"] = None\n'
        'try: from matrix_jax.envs import WorldEnv\n'
        'except ValueError as error: print(error)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == ("environments need gymnasium: pip install 'matrix_jax[data]'"), (
        done.stderr
    )
    assert pickle.loads(pickle.dumps(envs.WorldEnv)) is envs.WorldEnv
    with pytest.raises(UsageError, match="render_mode: got 'human'"):
        envs.WorldEnv(render_mode='human')
