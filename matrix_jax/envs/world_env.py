"""A world as a gymnasium environment for one agent, or for many side by side.

An action is one of `vocabulary.choices` and lasts one step of the stream. The observation is the
last frame of the step, or all of them. An action shows `lag` steps later, as for a live player.
Equal seeds and actions give equal observations.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np

from matrix_jax import config, recipes
from matrix_jax.envs.players import Players

Reward = Callable[[np.ndarray, int, np.ndarray], float]


class WorldEnv(gymnasium.Env):
    """One agent.

    An episode ends only if the world is no longer finite, or by a wrapper such as
    `gymnasium.wrappers.TimeLimit`. `info` has `shift`, the steps so far, and `lag`.

    Args:
      recipe, prompt, start, control_binding, whole, opened: as of `Players`.
      reward: `(observation before, action, observation after) -> float`; 0 by default.
      render_mode: None or 'rgb_array', which gives the last frame.

    Raises:
      UsageError: an argument is out of range.
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
        _check_render_mode(render_mode)
        self.players = Players(recipe, 1, control_binding, 1, prompt, start, whole, opened)
        self.metadata, self.render_mode = self.players.metadata, render_mode
        self.reward = reward or _no_reward
        self.action_space, self.observation_space = _spaces(self.players)
        self._observation = None

    def reset(self, *, seed=None, options=None):
        """`options` may choose 'prompt' and 'start' -> (observation, info)."""
        super().reset(seed=seed)
        self.players.begin(0, self.np_random, options)
        self._observation, self._steps = self.players.observe()[0], 0
        return self._observation.copy(), self._info()

    def step(self, action):
        """-> (observation, reward, terminated, truncated, info)."""
        if self._observation is None:
            raise gymnasium.error.ResetNeeded('reset the environment before the first step')
        broken = self.players.step([action], np.ones(1, bool))
        before, self._observation = self._observation, self.players.observe()[0]
        self._steps += 1
        reward = float(self.reward(before, action, self._observation))
        return self._observation.copy(), reward, bool(broken[0]), False, self._info()

    def render(self):
        """The last frame, uint8 [H W 3]."""
        return self.players.frames[0, -1].copy() if self.render_mode else None

    def _info(self):
        return {'shift': self._steps, 'lag': self.players.lag}


class WorldVectorEnv(gymnasium.vector.VectorEnv):
    """Many agents in one program; a world that is no longer finite is reset by the next step.

    Args:
      num_envs: agents.
      together: agents computed side by side; all by default. With 1, each agent's numbers are
        equal bit by bit whatever the others do.
      recipe, prompt, start, control_binding, whole, render_mode, opened: as of `WorldEnv`.
      reward: as of `WorldEnv`; called for each agent.

    Raises:
      UsageError: an argument is out of range.
    """

    def __init__(
        self,
        num_envs: int,
        recipe=recipes.DEFAULT_WORLD,
        *,
        together: int | None = None,
        prompt: str | None = None,
        start: str | None = None,
        control_binding: str = 'early',
        whole: bool = False,
        reward: Reward | None = None,
        render_mode: str | None = None,
        opened: tuple | None = None,
    ):
        _check_render_mode(render_mode)
        self.players = Players(
            recipe, num_envs, control_binding, together or num_envs, prompt, start, whole, opened
        )
        self.num_envs, self.render_mode = num_envs, render_mode
        self.metadata = self.players.metadata | {
            'autoreset_mode': gymnasium.vector.AutoresetMode.NEXT_STEP
        }
        self.reward = reward or _no_reward
        self.single_action_space, self.single_observation_space = _spaces(self.players)
        batched = gymnasium.vector.utils.batch_space
        self.action_space = batched(self.single_action_space, num_envs)
        self.observation_space = batched(self.single_observation_space, num_envs)
        self._randoms, self._observations = [None] * num_envs, None

    def reset(self, *, seed=None, options=None):
        """Resets all agents -> (observations [B ...], info).

        Args:
          seed: of the first agent, and one more for each agent after it; or a list.
          options: may choose 'prompt' and 'start'.

        Raises:
          UsageError: the list of seeds has another length.
        """
        if seed is None:
            seeds = [None] * self.num_envs
        elif isinstance(seed, int):
            seeds = list(range(seed, seed + self.num_envs))
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise config.UsageError(f'seed: got {len(seeds)}, expected {self.num_envs}')
        for index, one in enumerate(seeds):
            if one is not None or self._randoms[index] is None:
                self._randoms[index] = gymnasium.utils.seeding.np_random(one)[0]
            self.players.begin(index, self._randoms[index], options)
        self._options, self._broken = options, np.zeros(self.num_envs, bool)
        self._steps = np.zeros(self.num_envs, int)
        self._observations = self.players.observe()
        return self._observations.copy(), self._info()

    def step(self, actions):
        """-> (observations [B ...], rewards [B], terminated [B], truncated [B], info)."""
        if self._observations is None:
            raise gymnasium.error.ResetNeeded('reset the environments before the first step')
        for index in np.flatnonzero(self._broken):
            self.players.begin(index, self._randoms[index], self._options)
        active = ~self._broken
        self._broken = self.players.step(actions, active)
        before, self._observations = self._observations, self.players.observe()
        self._steps = np.where(active, self._steps + 1, 0)
        rewards = [
            self.reward(*transition) if on else 0.0
            for on, *transition in zip(active, before, actions, self._observations)
        ]
        return (
            self._observations.copy(),
            np.array(rewards, np.float64),
            self._broken.copy(),
            np.zeros(self.num_envs, bool),
            self._info(),
        )

    def render(self):
        """The last frame of each agent."""
        return tuple(self.players.frames[:, -1].copy()) if self.render_mode else None

    def _info(self):
        known = np.ones(self.num_envs, bool)
        return {
            'shift': self._steps.copy(),
            '_shift': known,
            'lag': np.full(self.num_envs, self.players.lag),
            '_lag': known,
        }


def _spaces(players: Players):
    """(actions, observations) of one agent."""
    actions = gymnasium.spaces.Discrete(len(players.choices))
    return actions, gymnasium.spaces.Box(0, 255, players.observe().shape[1:], np.uint8)


def _no_reward(before, action, after) -> float:
    return 0.0


def _check_render_mode(render_mode: str | None):
    if render_mode not in (None, 'rgb_array'):
        raise config.UsageError(f'render_mode: got {render_mode!r}, expected rgb_array or None')
