"""The players of an environment: streams that are stepped on demand."""

from __future__ import annotations

import functools
import os
from typing import Any, ClassVar, NamedTuple

import numpy as np

from matrix_jax import config, recipes
from matrix_jax.serve.runtime import batched_stream, session_log, start_frames

OPTIONS = {'prompt', 'start'}


class PlayerState(NamedTuple):
    """A player at one moment, on the host; `Players.restore` continues from it.

    Attributes:
      carry: carry of the player's stream.
      frames: its newest frames, uint8 [F H W 3].
    """

    carry: Any
    frames: np.ndarray


class Players:
    """The first slots of a `BatchedStream`, and their newest frames.

    A copy by `copy.deepcopy` shares the compiled programs. A pickle holds the recipe and the
    carries; who loads it opens the weights and compiles.

    Args:
      recipe: 'world:RECIPE', or a `config.Run`.
      count: players.
      control_binding, together: as of `BatchedStream`.
      prompt, start: text, and name of a start clip, unless `reset` chooses them; None as in the
        live player.
      whole: whether an observation is all frames of a step, or only the last one.
      opened: result of `batched_stream.open_stream` with at least `count` slots, instead of recipe,
        control_binding and together; environments that share it compile once.

    Attributes:
      frames: uint8 [B F H W 3], the last step of every player.
      lag: steps from an action to the first frames that show it.

    Raises:
      UsageError: an argument is out of range, or this process is a fork of one with environments.
    """

    _process: ClassVar[int | None] = None  # the process that made the first players

    def __init__(
        self,
        recipe,
        count: int,
        control_binding: str,
        together: int,
        prompt: str | None,
        start: str | None,
        whole: bool,
        opened: tuple | None = None,
    ):
        _check_options(prompt=prompt, start=start)
        if Players._process not in (None, os.getpid()):
            raise config.UsageError(
                'environments: this process was forked from one that uses JAX, and would hang; '
                "expected a spawned one: AsyncVectorEnv(..., context='spawn')"
            )
        Players._process = os.getpid()
        if opened is None:
            run = recipe if isinstance(recipe, config.Run) else recipes.load(recipe)
            with config.usage_errors():
                self.stream, self.folder = batched_stream.open_stream(
                    run, count, control_binding, together
                )
        elif opened[0].num_slots < count:
            raise config.UsageError(
                f'opened: got {opened[0].num_slots} slots, expected at least {count}'
            )
        else:
            self.stream, self.folder = opened[0].empty_copy(), opened[1]
        self.count, self.whole, self.lag = count, whole, self.stream.lag
        self.choices = self.stream.world.vocabulary.choices
        self._defaults = {'prompt': prompt, 'start': start}
        self._condition = functools.lru_cache(16)(self._make_condition)
        cfg, frames = self.stream.world.cfg, self.stream.frames_per_step
        self.frames = np.zeros((count, frames, cfg.height, cfg.width, 3), np.uint8)
        self.metadata = {'render_modes': ['rgb_array'], 'render_fps': cfg.fps / frames}

    def __getstate__(self) -> dict:
        kept = {name: value for name, value in vars(self).items() if name != '_condition'}
        return kept | {'carries': [self.stream.read(index) for index in range(self.count)]}

    def __setstate__(self, state: dict):
        carries = state.pop('carries')
        vars(self).update(state)
        self._condition = functools.lru_cache(16)(self._make_condition)
        for index, carry in enumerate(carries):
            self.stream.write(index, carry)

    def begin(self, index: int, random: np.random.Generator, options: dict | None):
        """Starts a new stream for a player; its frames are those that the stream continues.

        Raises:
          UsageError: an option or a start clip is unknown.
        """
        options = self._defaults | (options or {})
        if set(options) != OPTIONS:
            raise config.UsageError(
                f'options: got {", ".join(sorted(map(str, set(options) - OPTIONS)))}; '
                f'expected {" and ".join(sorted(OPTIONS))}'
            )
        _check_options(**options)
        condition, self.frames[index] = self._condition(**options)
        seed = int(random.integers(session_log.MAX_SEED))
        self.stream.write(index, self.stream.init(condition, seed))

    def step(self, actions, active: np.ndarray) -> np.ndarray:
        """Steps the active players, bool [B] -> bool [B], whose world is no longer finite."""
        controls = np.repeat(self.stream.idle[None], self.stream.num_slots, axis=0)
        for index, action in enumerate(actions):
            controls[index] = self.stream.encode(self.choices[int(action)])
        mask = np.zeros(self.stream.num_slots, bool)
        mask[: self.count] = active
        frames, finite = self.stream.step(controls, mask)
        self.frames[active] = np.asarray(frames)[: self.count][active]
        return ~np.asarray(finite)[: self.count] & active

    def observe(self) -> np.ndarray:
        """uint8 [B H W 3], or [B F H W 3] if whole."""
        return np.array(self.frames if self.whole else self.frames[:, -1])

    def clone(self, index: int) -> PlayerState:
        """The state of a player, on the host."""
        return PlayerState(self.stream.read(index), self.frames[index].copy())

    def restore(self, index: int, state: PlayerState):
        """Continues a player from a state of the same world."""
        self.stream.write(index, state.carry)
        self.frames[index] = state.frames

    def _make_condition(self, prompt: str | None, start: str | None):
        """(condition of a stream, the frames uint8 [F H W 3] that it continues)."""
        world, count = self.stream.world, self.stream.frames_per_step
        prompt, start = start_frames.choose(world, self.folder, prompt, start)
        clip = start_frames.load(self.stream, self.folder, start, None)
        shown = 1 + (world.cfg.stream.context - 1) * world.vocabulary.frames_per_control
        last = clip[np.maximum(np.arange(shown - count, shown), 0)]
        return self.stream.condition(prompt, clip)[0], last


def _check_options(prompt: Any, start: Any):
    """Raises UsageError unless both are text or None."""
    for name, value in {'prompt': prompt, 'start': start}.items():
        if value is not None and not session_log.is_text(value):
            raise config.UsageError(
                f'{name}: got {str(value)[:40]!a}, expected text of at most '
                f'{session_log.MAX_PROMPT} characters'
            )
