"""Environments by the name of a recipe; players computed side by side, none of whom can touch
another's world."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import envs, recipes
from matrix_jax.config import UsageError
from matrix_jax.serve.runtime import batched_stream

pytest.importorskip('gymnasium')
NAME = 'the_matrix:TINY'


@pytest.fixture(scope='module')
def many(tiny):
    """Three players of a recipe, which has weights here, in one batch."""
    module = recipes._module('the_matrix')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'TINY', dataclasses.replace(module.TINY, weights=str(tiny)))
        return envs.WorldVectorEnv(3, NAME)


def drive(many, company, steps=4):
    """Frames and carry of the middle one of three players; `company(players)` comes in between."""
    many.reset(seed=3)
    players, frames = many.players, []
    for step in range(steps):
        if step == 1:
            company(players)
        # The others hold what `company` says from then on, or rest.
        actions = np.array([0, step % 3, 0]) + (step > 0) * np.array(company.keys)
        active = np.array([True, True, step == 0 or company.last])
        players.step(actions, active)
        frames.append(players.frames[1].copy())
    return np.stack(frames), players.stream.read(1)


class Quiet:
    """The others hold nothing else."""

    keys, last = (0, 0, 0), True

    def __call__(self, players):
        pass


class Wild(Quiet):
    """One of the others breaks, and one rests."""

    keys, last = (5, 0, 2), False

    def __call__(self, players):
        carry = players.stream.read(0)
        players.stream.write(
            0, jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.dtype.kind == 'f' else leaf, carry)
        )


def test_players_side_by_side_do_not_touch_each_other(many, stream, tiny):
    assert many.players.stream.together == many.players.stream.num_slots == 3
    frames, carry = drive(many, Quiet())
    again, same = drive(many, Wild())
    np.testing.assert_array_equal(frames, again)
    jax.tree.map(np.testing.assert_array_equal, carry, same)
    assert not np.isfinite(jax.tree.leaves(many.players.stream.read(0))[0]).all()
    # It is the world that players in turns have, to a rounding of its numbers.
    alone = envs.WorldEnv(opened=(stream, tiny), whole=True)
    alone.reset(seed=4)
    turns = np.stack([alone.step(step % 3)[0] for step in range(4)])
    assert np.abs(turns.astype(int) - frames).max() <= 2


def test_an_environment_by_the_name_of_a_recipe(stream, tiny, monkeypatch):
    with pytest.raises(UsageError, match=f'{NAME}: needs --weights'):
        envs.WorldEnv(NAME)
    with pytest.raises(UsageError, match="unknown world 'nowhere'"):
        envs.WorldEnv('nowhere')
    asked = []
    monkeypatch.setattr(
        batched_stream, 'open_stream', lambda *args: (asked.append(args), (stream, tiny))[1]
    )
    env = envs.WorldEnv(NAME, control_binding='late')
    assert asked[0][0].name == NAME and asked[0][1:] == (1, 'late', 1)
    env.reset(seed=0)
    assert env.step(1)[0].shape == env.observation_space.shape
