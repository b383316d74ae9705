"""The rewards of an environment's agents, and whether they end an episode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.envs.players import Players
from matrix_jax.rewards import model

RewardFunction = Callable[[np.ndarray, int, np.ndarray], float]
Reward = RewardFunction | model.RewardModel | str | Path | None


class AgentRewards:
    """One state per agent.

    Args:
      given: a function `(observation before, action, observation after) -> float`; a trained
        reward, or the folder or bundled name of one; or None for rewards of 0.
      players: the agents.

    Raises:
      UsageError: `given` is none of these, or was trained on frames of another size.
      CheckpointError: there is no such trained reward.
    """

    def __init__(self, given: Reward, players: Players):
        self._players, count = players, players.count
        self._function: RewardFunction | None = None
        self._model = open_reward(given)
        self._states: Any = None
        if self._model is not None:
            frames, height, width = players.frames.shape[1:4]
            self._model.check(height, width, frames)
            state = jax.eval_shape(self._model.init, players.frames[0])
            self._states = jax.tree.map(
                lambda leaf: np.zeros((count, *leaf.shape), leaf.dtype), state
            )
        elif callable(given):
            self._function = given

    def begin(self, index: int):
        """Starts the episode of an agent, whose frames are those of its start."""
        if self._model is not None:
            state = _init(self._model.cfg, self._model.params, self._players.frames[index])
            self.restore(index, state)

    def step(
        self, before: np.ndarray, actions: np.ndarray, after: np.ndarray, active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rewards of a step, and whether they end the episode.

        Args:
          before, after: observations [B ...].
          actions: int [B].
          active: bool [B], the agents that made a step; others get 0.

        Returns:
          (float64 [B], bool [B]).
        """
        rewards, ended = np.zeros(len(actions)), np.zeros(len(actions), bool)
        if self._function is not None:
            for index in np.flatnonzero(active):
                rewards[index] = self._function(before[index], int(actions[index]), after[index])
        elif self._model is not None:
            states, paid, over = _step(
                self._model.cfg, self._model.params, self._states, self._players.frames
            )
            rewards[active], ended[active] = np.asarray(paid)[active], np.asarray(over)[active]
            for old, new in zip(jax.tree.leaves(self._states), jax.tree.leaves(states)):
                old[active] = np.asarray(new)[active]
        return rewards, ended

    def clone(self, index: int) -> Any:
        """The state of an agent."""
        return jax.tree.map(lambda leaf: leaf[index].copy(), self._states)

    def restore(self, index: int, state: Any):
        """Continues from a state of `clone`."""
        for leaf, value in zip(jax.tree.leaves(self._states), jax.tree.leaves(state)):
            leaf[index] = value


def open_reward(given: Reward) -> model.RewardModel | None:
    """Returns a trained reward; None if `given` is a function or None.

    Raises:
      UsageError: `given` is something else.
      CheckpointError: there is no such trained reward.
    """
    if isinstance(given, str | Path):
        return model.load(given)
    if isinstance(given, model.RewardModel):
        return given
    if given is not None and not callable(given):
        raise UsageError(
            f'reward: got {str(given)[:40]!a}, expected a function, a trained reward or its folder'
        )
    return None


@partial(jax.jit, static_argnums=0)
def _init(cfg: model.Config, params, frames):
    return model.RewardModel(cfg, params).init(frames)


@partial(jax.jit, static_argnums=0)
def _step(cfg: model.Config, params, states, frames):
    return jax.vmap(model.RewardModel(cfg, params).step)(states, frames)
