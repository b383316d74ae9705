"""A world as two pure functions, for agents in JAX under `vmap`, `scan` and `jit`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from matrix_jax import config, recipes, worlds
from matrix_jax.envs.agent_rewards import open_reward
from matrix_jax.rewards.model import RewardModel
from matrix_jax.serve.runtime import start_frames
from matrix_jax.stream.base import prefilled
from matrix_jax.weights import diffusers_layout


@struct.dataclass
class FunctionalState:
    """One agent's world.

    Attributes:
      carry: carry of the stream, batch 1.
      frames: frames of the last step, uint8 [F H W 3]; those that the stream continues at first.
      shift: steps so far, int32 [].
      reward: reward of the last step, float32 []; 0 at first and without a trained reward.
      terminated: whether the trained reward ended the episode in the last step, bool []. Later
        steps go on all the same.
      reward_state: state of the trained reward; None without one.
    """

    carry: Any
    frames: jax.Array
    shift: jax.Array
    reward: jax.Array
    terminated: jax.Array
    reward_state: Any

    @property
    def observation(self) -> jax.Array:
        """The last frame, uint8 [H W 3]."""
        return self.frames[..., -1, :, :, :]


class FunctionalEnv:
    """`reset(key) -> state` and `step(state, action) -> state`, pure and of fixed shapes.

        env = FunctionalEnv('carracing')
        states = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 8))
        states = jax.jit(jax.vmap(env.step))(states, actions)     # actions int32 [8]
        states.observation                                        # uint8 [8 H W 3]

    The parameters are constants of both functions. An action outside of 0 to `num_actions` - 1 is
    taken as the nearest one, because a compiled function cannot raise.

    Args:
      recipe: 'world:RECIPE', or a `config.Run`.
      prompt, start: text, and name of a start clip; None as in the live player.
      control_binding: 'early' shows actions sooner; 'late' is as published.
      reward: a trained reward (`rewards.model`), or its folder or bundled name; None for rewards
        of 0.

    Attributes:
      num_actions: number of actions.
      lag: steps from an action to the first frames that show it.

    Raises:
      UsageError: an argument is out of range, or the world does not stream.
      CheckpointError: there is no such trained reward.
    """

    def __init__(
        self,
        recipe: str | config.Run = recipes.DEFAULT_WORLD,
        *,
        prompt: str | None = None,
        start: str | None = None,
        control_binding: str = 'early',
        reward: RewardModel | str | Path | None = None,
    ):
        run = recipe if isinstance(recipe, config.Run) else recipes.load(recipe)
        if run.world.clip:
            raise config.UsageError(f'{run.name}: makes whole clips, expected a model that streams')
        world, self._params = worlds.open_run(run)
        stream_cfg = world.cfg.stream.with_control_binding(control_binding)
        self.world, self.lag = world, stream_cfg.lag
        vocabulary, per_step = world.vocabulary, stream_cfg.controls_per_step
        self.num_actions = len(vocabulary.choices)
        held = ([choice] * per_step for choice in vocabulary.choices)
        self._controls = np.stack([vocabulary.encode(controls) for controls in held])
        idle = [vocabulary.idle] * world.first_step_controls
        self._stream = prefilled(world.stream(control_binding), vocabulary.encode(idle)[None])
        folder = Path(diffusers_layout.resolve(run.weights))
        prompt, start = start_frames.choose(world, folder, prompt, start)
        clip = start_frames.load_clip(world, folder, start)
        inputs, _ = world.inputs(prompt, clip)
        self._condition = jax.jit(world.condition)(self._params, *inputs)
        count, per = per_step * vocabulary.frames_per_control, vocabulary.frames_per_control
        shown = 1 + (world.cfg.stream.context - 1) * per
        self._start = clip[np.maximum(np.arange(shown - count, shown), 0)]
        self._reward = open_reward(reward)
        if self._reward is not None:
            self._reward.check(world.cfg.height, world.cfg.width, count)

    def reset(self, key: jax.Array) -> FunctionalState:
        """Starts a world; `key` is one random key."""
        carry = self._stream.init(self._params, self._condition, jax.random.split(key, 1))
        frames = jnp.asarray(self._start)
        return FunctionalState(
            carry,
            frames,
            shift=jnp.zeros((), jnp.int32),
            reward=jnp.zeros((), jnp.float32),
            terminated=jnp.zeros((), bool),
            reward_state=self._reward and self._reward.init(frames),
        )

    def step(self, state: FunctionalState, action: jax.Array) -> FunctionalState:
        """Makes one step; `action` is int32 []."""
        action = jnp.clip(action, 0, self.num_actions - 1)
        control = jnp.asarray(self._controls)[action][None]
        carry, frames = self._stream.step(self._params, state.carry, control)
        state = dataclasses.replace(state, carry=carry, frames=frames[0], shift=state.shift + 1)
        if self._reward is None:
            return state
        after, reward, terminated = self._reward.step(state.reward_state, state.frames)
        return dataclasses.replace(state, reward_state=after, reward=reward, terminated=terminated)
