"""A world as a gymnasium environment for one agent; `vector_env` has the one for many.

An action is one of `vocabulary.choices` and lasts one step of the stream. The observation is the
last frame of the step, or all of them. An action shows `lag` steps later, as for a live player.
Equal seeds and actions give equal observations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import numpy as np

from matrix_jax import config, recipes
from matrix_jax.envs.agent_rewards import AgentRewards, Reward
from matrix_jax.envs.players import Players, PlayerState


class EnvState(NamedTuple):
    """An environment at one moment; a pickle of it can be restored in another process.

    Attributes:
      players: state of each agent.
      steps: steps of the episode so far, of each agent.
      random: state of each agent's random numbers, or None before the first reset.
      ended: whether each agent's episode is over.
      rewards: state of each agent's reward, or None without a trained one.
    """

    players: tuple[PlayerState, ...]
    steps: np.ndarray
    random: tuple[Any, ...]
    ended: np.ndarray
    rewards: tuple[Any, ...]


class WorldEnv(gymnasium.Env):
    """One agent.

    An episode is terminated if a trained reward says so (`rewards.tasks`), or if the world is no
    longer finite; it is truncated by a wrapper such as `gymnasium.wrappers.TimeLimit`. `info` has
    `shift`, the steps so far, and `lag`. Copies by `copy.deepcopy` share the compiled programs; a
    pickle holds the recipe and the state.

    Args:
      recipe, prompt, start, control_binding, whole, opened: as of `Players`.
      reward: a function `(observation before, action, observation after) -> float`; a trained
        reward (`rewards.model`), or its folder or bundled name; None for rewards of 0.
      render_mode: None or 'rgb_array', which gives the last frame.

    Raises:
      UsageError: an argument is out of range, or this process was forked from one that uses JAX.
      CheckpointError: there is no such trained reward.
    """

    def __init__(
        self,
        recipe=recipes.DEFAULT_WORLD,
        *,
        prompt: str | None = None,
        start: str | None = None,
        control_binding: str = 'early',
        whole: bool = False,
        reward: Reward | None = None,
        render_mode: str | None = None,
        opened: tuple | None = None,
    ):
        check_render_mode(render_mode)
        self.players = Players(recipe, 1, control_binding, 1, prompt, start, whole, opened)
        self.metadata, self.render_mode = self.players.metadata, render_mode
        self.rewards = AgentRewards(reward, self.players)
        self.action_space, self.observation_space = spaces(self.players)
        self._observation = None
        self._steps = 0

    def reset(self, *, seed=None, options=None):
        """`options` may choose 'prompt' and 'start' -> (observation, info)."""
        super().reset(seed=seed)
        self.players.begin(0, self.np_random, options)
        self.rewards.begin(0)
        self._observation, self._steps = self.players.observe()[0], 0
        return self._observation.copy(), self._info()

    def step(self, action):
        """-> (observation, reward, terminated, truncated, info).

        Raises:
          InvalidAction: the action is not in the action space.
        """
        if self._observation is None:
            raise gymnasium.error.ResetNeeded('reset the environment before the first step')
        actions, active = checked_actions([action], 1, len(self.players.choices)), np.ones(1, bool)
        broken = self.players.step(actions, active)
        before, after = self._observation, self.players.observe()
        rewards, over = self.rewards.step(before[None], actions, after, active)
        self._observation = after[0]
        self._steps += 1
        terminated = bool((broken | over)[0])
        return self._observation.copy(), float(rewards[0]), terminated, False, self._info()

    def clone_state(self) -> EnvState:
        """The state of the environment, random numbers included."""
        return EnvState(
            (self.players.clone(0),),
            np.array([self._steps]),
            (self.np_random.bit_generator.state,),
            np.zeros(1, bool),
            (self.rewards.clone(0),),
        )

    def restore_state(self, state: EnvState):
        """Continues from the state of an environment of the same world."""
        self.players.restore(0, state.players[0])
        self.rewards.restore(0, state.rewards[0])
        self._observation, self._steps = self.players.observe()[0], int(state.steps[0])
        self.np_random.bit_generator.state = state.random[0]

    def render(self):
        """The last frame, uint8 [H W 3]."""
        return self.players.frames[0, -1].copy() if self.render_mode else None

    def _info(self):
        return {'shift': self._steps, 'lag': self.players.lag}


def spaces(players: Players):
    """(actions, observations) of one agent."""
    actions = gymnasium.spaces.Discrete(len(players.choices))
    return actions, gymnasium.spaces.Box(0, 255, players.observe().shape[1:], np.uint8)


def checked_actions(actions, count: int, choices: int) -> np.ndarray:
    """Returns the actions of `count` agents as integers [B].

    Raises:
      InvalidAction: there are more or fewer, or one is not a whole number from 0 to `choices` - 1.
    """
    try:
        given = np.asarray(actions)
    except ValueError:  # lists of different lengths
        given = np.asarray(None)
    if given.shape != (count,) or given.dtype.kind not in 'iu':
        raise gymnasium.error.InvalidAction(
            f'action: got {str(actions)[:60]}, expected {count} of whole numbers'
        )
    if ((given < 0) | (given >= choices)).any():
        raise gymnasium.error.InvalidAction(
            f'action: got {str(actions)[:60]}, expected 0 to {choices - 1}'
        )
    return given


def check_render_mode(render_mode: str | None):
    """Raises UsageError unless the environments have the render mode."""
    if render_mode not in (None, 'rgb_array'):
        raise config.UsageError(f'render_mode: got {render_mode!r}, expected rgb_array or None')
