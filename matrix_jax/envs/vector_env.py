"""A world as a gymnasium environment for many agents side by side, in one compiled program."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from matrix_jax import config, recipes
from matrix_jax.envs.agent_rewards import AgentRewards, Reward
from matrix_jax.envs.players import Players
from matrix_jax.envs.world_env import EnvState, check_render_mode, checked_actions, spaces


class WorldVectorEnv(gymnasium.vector.VectorEnv):
    """Many agents in one program.

    An agent's episode is terminated as that of a `WorldEnv`, and truncated after
    `max_episode_steps`. With `AutoresetMode.NEXT_STEP` the next step resets it; its action does not
    count and its reward is 0. With `AutoresetMode.DISABLED` the agents stay where they are until
    `reset(options={'reset_mask': mask})`.

    Args:
      num_envs: agents.
      together: agents computed side by side; all by default. With 1, each agent's numbers are
        equal bit by bit whatever the others do.
      max_episode_steps: time limit of an episode; None for none.
      autoreset_mode: `AutoresetMode.NEXT_STEP` or `AutoresetMode.DISABLED`.
      recipe, prompt, start, control_binding, whole, reward, render_mode, opened: as of `WorldEnv`;
        a function is called for each agent.

    Raises:
      UsageError: an argument is out of range.
      CheckpointError: there is no such trained reward.
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
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
        opened: tuple | None = None,
    ):
        check_render_mode(render_mode)
        if max_episode_steps is not None and max_episode_steps < 1:
            raise config.UsageError(
                f'max_episode_steps: got {max_episode_steps}, expected at least 1'
            )
        if autoreset_mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
            raise config.UsageError(
                f'autoreset_mode: got {autoreset_mode}, expected NEXT_STEP or DISABLED'
            )
        self.players = Players(
            recipe, num_envs, control_binding, together or num_envs, prompt, start, whole, opened
        )
        self.num_envs, self.render_mode = num_envs, render_mode
        self.max_episode_steps, self._autoreset = max_episode_steps, autoreset_mode
        self.metadata = self.players.metadata | {'autoreset_mode': autoreset_mode}
        self.rewards = AgentRewards(reward, self.players)
        self.single_action_space, self.single_observation_space = spaces(self.players)
        batched = gymnasium.vector.utils.batch_space
        self.action_space = batched(self.single_action_space, num_envs)
        self.observation_space = batched(self.single_observation_space, num_envs)
        self._randoms: list = [None] * num_envs
        self._observations = None
        self._options = None
        self._ended, self._steps = np.zeros(num_envs, bool), np.zeros(num_envs, int)

    def reset(self, *, seed=None, options=None):
        """Resets the agents -> (observations [B ...], info).

        Args:
          seed: of the first agent, and one more for each agent after it; or a list.
          options: may choose 'prompt' and 'start', and 'reset_mask', bool [B], the agents to reset;
            all by default.

        Raises:
          UsageError: the list of seeds or the mask has another length.
        """
        if seed is None:
            seeds = [None] * self.num_envs
        elif isinstance(seed, int):
            seeds = list(range(seed, seed + self.num_envs))
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise config.UsageError(f'seed: got {len(seeds)}, expected {self.num_envs}')
        options = dict(options or {})
        mask = self._mask(options.pop('reset_mask', None))
        for index in np.flatnonzero(mask):
            one = seeds[index]
            if one is not None or self._randoms[index] is None:
                self._randoms[index] = gymnasium.utils.seeding.np_random(one)[0]
            self._begin(index, options)
        self._options = options
        self._ended[mask], self._steps[mask] = False, 0
        self._observations = self.players.observe()
        return self._observations.copy(), self._info()

    def step(self, actions):
        """-> (observations [B ...], rewards [B], terminated [B], truncated [B], info).

        Raises:
          InvalidAction: an action is not in the action space, or there are more or fewer than B.
        """
        if self._observations is None:
            raise gymnasium.error.ResetNeeded('reset the environments before the first step')
        actions = checked_actions(actions, self.num_envs, len(self.players.choices))
        active = ~self._ended
        if self._autoreset is AutoresetMode.NEXT_STEP:
            for index in np.flatnonzero(self._ended):
                self._begin(index, self._options)
                self._steps[index] = 0
            self._ended = np.zeros(self.num_envs, bool)
        broken = self.players.step(actions, active)
        before, self._observations = self._observations, self.players.observe()
        rewards, over = self.rewards.step(before, actions, self._observations, active)
        terminated = broken | over
        self._steps = self._steps + active
        late = np.zeros(self.num_envs, bool)
        if self.max_episode_steps is not None:
            late = active & (self._steps >= self.max_episode_steps)
        self._ended = self._ended | terminated | late
        return (self._observations.copy(), rewards, terminated, late & ~terminated, self._info())

    def clone_state(self) -> EnvState:
        """The state of all agents, random numbers included."""
        return EnvState(
            tuple(self.players.clone(index) for index in range(self.num_envs)),
            self._steps.copy(),
            tuple(random and random.bit_generator.state for random in self._randoms),
            self._ended.copy(),
            tuple(self.rewards.clone(index) for index in range(self.num_envs)),
        )

    def restore_state(self, state: EnvState):
        """Continues from the state of environments of the same world."""
        for index, (player, random) in enumerate(zip(state.players, state.random, strict=True)):
            self.players.restore(index, player)
            self.rewards.restore(index, state.rewards[index])
            if random is not None:
                self._randoms[index] = gymnasium.utils.seeding.np_random(0)[0]
                self._randoms[index].bit_generator.state = random
        self._steps, self._ended = state.steps.copy(), state.ended.copy()
        self._observations = self.players.observe()

    def render(self):
        """The last frame of each agent."""
        return tuple(self.players.frames[:, -1].copy()) if self.render_mode else None

    def _begin(self, index: int, options: dict | None):
        """Starts an episode of an agent."""
        self.players.begin(index, self._randoms[index], options)
        self.rewards.begin(index)

    def _mask(self, given) -> np.ndarray:
        """Which agents to reset, bool [B]."""
        mask = np.ones(self.num_envs, bool) if given is None else np.asarray(given)
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise config.UsageError(
                f'reset_mask: got {mask.dtype}{list(mask.shape)}, expected bool[{self.num_envs}]'
            )
        if self._observations is None and not mask.all():
            raise config.UsageError('reset_mask: the first reset is of all agents')
        return mask

    def _info(self):
        known = np.ones(self.num_envs, bool)
        return {
            'shift': self._steps.copy(),
            '_shift': known,
            'lag': np.full(self.num_envs, self.players.lag),
            '_lag': known,
        }
