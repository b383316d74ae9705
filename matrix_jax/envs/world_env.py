"""The world as a game to train agents in: `gymnasium` environments of one player or of many.

An action is one of `vocabulary.choices` and lasts one shift; the observation is the last
frame of the shift, or all of them. Keys bind where the stream takes them (`control_binding`), so an action
shows `lag` shifts later, as for a person. Equal seeds and actions give equal observations.

`WorldEnv` and `WorldVectorEnv` are made when they are first asked for, because gymnasium is an
extra.
"""

from __future__ import annotations

import functools

import numpy as np

from matrix_jax import config, recipes
from matrix_jax.serve.runtime import session_log
from matrix_jax.serve.web import server

CHOICES = {'prompt', 'start'}


class Players:
    """Slots in turns: what both environments stand on, without gymnasium.

    Args:
      recipe: 'world:RECIPE', or a `config.Run`.
      count: players.
      control_binding, together: as of `run.Config`.
      prompt, start: text, and name of a start clip, unless `reset` chooses; None as in the player.
      whole: whether an observation is all frames of a shift.
      opened: `run.open_slots(...)` with at least `count` slots, in place of all of the above but
        prompt, start and whole: environments that share it compile once.

    Attributes:
      frames: uint8 [N F H W 3], the last shift of every player.
      lag: shifts from an action to the first frames that it binds.
    """

    def __init__(
        self,
        recipe,
        count: int,
        control_binding: str,
        together: int,
        prompt: str | None,
        start: str | None,
        whole: bool,
        opened=None,
    ):
        if opened is None:
            recipe = recipe if isinstance(recipe, config.Run) else recipes.load(recipe)
            with config.usage_errors():
                given = server.Config(players=count, control_binding=control_binding, together=together)
            self.slots, self.folder = server.open_slots(recipe, given)
        elif opened[0].count < count:
            raise config.UsageError(
                f'opened: got {opened[0].count} slots, expected at least {count}'
            )
        else:
            self.slots, self.folder = opened[0].blank(), opened[1]
        self.count, self.whole, self.lag = count, whole, self.slots.lag
        self.choices = self.slots.world.vocabulary.choices
        self._choice = {'prompt': prompt, 'start': start}
        self._condition = functools.lru_cache(16)(self._make_condition)
        cfg = self.slots.world.cfg
        self.frames = np.zeros((count, self.slots.frames, cfg.height, cfg.width, 3), np.uint8)
        self.metadata = {'render_modes': ['rgb_array'], 'render_fps': cfg.fps / self.slots.frames}

    def begin(self, index: int, random: np.random.Generator, options: dict | None):
        """A new stream for a player; the frames are those that it continues."""
        choice = self._choice | (options or {})
        if set(choice) != CHOICES:
            raise config.UsageError(
                f'options: got {", ".join(sorted(set(choice) - CHOICES))}; '
                f'expected {" and ".join(sorted(CHOICES))}'
            )
        condition, self.frames[index] = self._condition(**choice)
        self.slots.write(
            index, self.slots.begin(condition, int(random.integers(session_log.MAX_SEED)))
        )

    def shift(self, actions, active) -> np.ndarray:
        """One shift of the active players [N] -> bool [N], whose world is no longer finite."""
        symbols = np.repeat(self.slots.idle[None], self.slots.count, axis=0)
        for index, action in enumerate(actions):
            symbols[index] = self.slots.encode(self.choices[int(action)])
        mask = np.zeros(self.slots.count, bool)
        mask[: self.count] = active
        frames, finite = self.slots.step(symbols, mask)
        self.frames[active] = np.asarray(frames)[: self.count][active]
        return ~np.asarray(finite)[: self.count] & active

    def observe(self) -> np.ndarray:
        """uint8 [N H W 3], or [N F H W 3] if whole."""
        return np.array(self.frames if self.whole else self.frames[:, -1])

    def _make_condition(self, prompt: str | None, start: str | None):
        cfg, frames = self.slots.world.cfg, self.slots.frames
        prompt, start = session_log.choose(self.slots.world, self.folder, prompt, start)
        clip = session_log.start_frames(self.slots, self.folder, start, None)
        per = self.slots.world.vocabulary.frames
        shown = 1 + (cfg.stream.context - 1) * per  # the stream continues these
        last = clip[np.maximum(np.arange(shown - frames, shown), 0)]
        return self.slots.condition(prompt, clip)[0], last


@functools.cache
def _classes() -> dict:
    try:
        import gymnasium
    except ImportError:
        raise config.UsageError(
            "environments need gymnasium: pip install 'matrix_jax[data]'"
        ) from None

    class WorldEnv(gymnasium.Env):
        """One player.

        An episode ends only if the world breaks (not a number), or by a wrapper such as
        `gymnasium.wrappers.TimeLimit`. `info` has the `shift` and the `lag`.

        Args:
          recipe, control_binding, prompt, start, whole, opened: as of `Players`.
          reward: `(observation before, action, observation after) -> float`; 0 by default.
          render_mode: None or 'rgb_array', which gives the last frame.
        """

        def __init__(
            self,
            recipe=recipes.DEFAULT_WORLD,
            *,
            prompt=None,
            start=None,
            control_binding='early',
            whole=False,
            reward=None,
            render_mode=None,
            opened=None,
        ):
            _check_mode(render_mode)
            self.players = Players(recipe, 1, control_binding, 1, prompt, start, whole, opened)
            self.metadata, self.render_mode = self.players.metadata, render_mode
            self.reward = reward or (lambda before, action, after: 0.0)
            self.action_space = gymnasium.spaces.Discrete(len(self.players.choices))
            self.observation_space = gymnasium.spaces.Box(
                0, 255, self.players.observe().shape[1:], np.uint8
            )
            self._seen = None

        def reset(self, *, seed=None, options=None):
            """`options` may choose 'prompt' and 'start' -> (observation, info)."""
            super().reset(seed=seed)
            self.players.begin(0, self.np_random, options)
            self._seen, self._shift = self.players.observe()[0], 0
            return self._seen.copy(), self._info()

        def step(self, action):
            """-> (observation, reward, terminated, truncated, info)."""
            if self._seen is None:
                raise gymnasium.error.ResetNeeded('reset the environment before the first step')
            broken = self.players.shift([action], np.ones(1, bool))
            before, self._seen = self._seen, self.players.observe()[0]
            self._shift += 1
            reward = float(self.reward(before, action, self._seen))
            return self._seen.copy(), reward, bool(broken[0]), False, self._info()

        def render(self):
            """The last frame, uint8 [H W 3]."""
            return self.players.frames[0, -1].copy() if self.render_mode else None

        def _info(self):
            return {'shift': self._shift, 'lag': self.players.lag}

    class WorldVectorEnv(gymnasium.vector.VectorEnv):
        """Players on the batch axis of one program; a broken one is reset by the step after.

        Args:
          num_envs: players.
          together: players computed side by side; all by default. With 1 they take turns, and each
            is bit-equal to itself in any company.
          The others as of `WorldEnv`; `reward` is called for each player.
        """

        def __init__(
            self,
            num_envs,
            recipe=recipes.DEFAULT_WORLD,
            *,
            together=None,
            prompt=None,
            start=None,
            control_binding='early',
            whole=False,
            reward=None,
            render_mode=None,
            opened=None,
        ):
            _check_mode(render_mode)
            self.players = Players(
                recipe, num_envs, control_binding, together or num_envs, prompt, start, whole, opened
            )
            self.num_envs, self.render_mode = num_envs, render_mode
            self.metadata = self.players.metadata | {
                'autoreset_mode': gymnasium.vector.AutoresetMode.NEXT_STEP
            }
            self.reward = reward or (lambda before, action, after: 0.0)
            batched = gymnasium.vector.utils.batch_space
            self.single_action_space = gymnasium.spaces.Discrete(len(self.players.choices))
            self.action_space = batched(self.single_action_space, num_envs)
            self.single_observation_space = gymnasium.spaces.Box(
                0, 255, self.players.observe().shape[1:], np.uint8
            )
            self.observation_space = batched(self.single_observation_space, num_envs)
            self._randoms, self._seen = [None] * num_envs, None

        def reset(self, *, seed=None, options=None):
            """`seed` is one for all, which counts on, or a list -> (observations, info)."""
            seeds = (
                list(range(seed, seed + self.num_envs))
                if isinstance(seed, int)
                else [None] * self.num_envs
                if seed is None
                else list(seed)
            )
            if len(seeds) != self.num_envs:
                raise config.UsageError(f'seed: got {len(seeds)}, expected {self.num_envs}')
            for index, one in enumerate(seeds):
                if one is not None or self._randoms[index] is None:
                    self._randoms[index] = gymnasium.utils.seeding.np_random(one)[0]
                self.players.begin(index, self._randoms[index], options)
            self._options, self._over = options, np.zeros(self.num_envs, bool)
            self._shift = np.zeros(self.num_envs, int)
            self._seen = self.players.observe()
            return self._seen.copy(), self._info()

        def step(self, actions):
            """-> (observations, rewards [N], terminated [N], truncated [N], info)."""
            if self._seen is None:
                raise gymnasium.error.ResetNeeded('reset the environments before the first step')
            for index in np.flatnonzero(self._over):
                self.players.begin(index, self._randoms[index], self._options)
            going = ~self._over
            self._over = self.players.shift(actions, going)
            before, self._seen = self._seen, self.players.observe()
            self._shift = np.where(going, self._shift + 1, 0)
            rewards = [
                self.reward(*row) if on else 0.0
                for on, *row in zip(going, before, actions, self._seen)
            ]
            return (
                self._seen.copy(),
                np.array(rewards, np.float64),
                self._over.copy(),
                np.zeros(self.num_envs, bool),
                self._info(),
            )

        def render(self):
            """The last frame of each player."""
            return tuple(self.players.frames[:, -1].copy()) if self.render_mode else None

        def _info(self):
            known = np.ones(self.num_envs, bool)
            return {
                'shift': self._shift.copy(),
                '_shift': known,
                'lag': np.full(self.num_envs, self.players.lag),
                '_lag': known,
            }

    found = {one.__name__: one for one in (WorldEnv, WorldVectorEnv)}
    for name, one in found.items():
        one.__qualname__ = name  # so that they pickle by name
    return found


def _check_mode(render_mode: str | None):
    if render_mode not in (None, 'rgb_array'):
        raise config.UsageError(f'render_mode: got {render_mode!r}, expected rgb_array or None')


def __getattr__(name: str):
    if name not in ('WorldEnv', 'WorldVectorEnv'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return _classes()[name]
