"""The blocks of a causal stream: their geometry, and the network calls that make one.

Matrix-Game 2.0 (arXiv 2508.13009); `stream/causal.py` has the stream itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from matrix_jax.diffusion import flow


@dataclasses.dataclass(frozen=True)
class Config:
    """Geometry and sampler; the defaults are Matrix-Game 2.0 universal.

    Attributes:
      frames: latent frames of a block.
      steps: denoising steps of a block, descending, before the schedule's shift moves them.
      context_level: noise level that the network is given with a clean block.
      window: latent frames before a block whose actions the network gets with the block.
      ratio: pixel frames of a latent frame.
      condition_on_last_frame: whether each block is conditioned on the latent frame before it. The
        published networks are conditioned on the start picture alone. For small networks, which
        otherwise have to find the last frame in their caches.
      action_guidance: scale of guidance by actions, against the idle action; 1 switches it off, as
        published. Guidance doubles the denoising calls.

    Raises:
      ValueError: a value is out of range.
    """

    ALIASES: ClassVar[dict[str, str]] = {'tell_last': 'condition_on_last_frame'}  # older names

    frames: int = 3
    steps: tuple[int, ...] = (1000, 666, 333)
    context_level: float = 0.0
    window: int = 3
    ratio: int = 4
    condition_on_last_frame: bool = False
    action_guidance: float = 1.0

    def __post_init__(self) -> None:
        for name in ('frames', 'window', 'ratio'):
            if getattr(self, name) < 1:
                raise ValueError(f'stream.{name}: got {getattr(self, name)}, expected at least 1')
        falling = all(a > b for a, b in zip(self.steps, self.steps[1:]))
        if not self.steps or not falling or self.steps[-1] <= 0:
            raise ValueError(f'stream.steps: got {self.steps}, expected descending steps above 0')
        if self.context_level < 0:
            raise ValueError(f'stream.context_level: got {self.context_level}, expected >= 0')
        if self.action_guidance < 1:
            raise ValueError(
                f'stream.action_guidance: got {self.action_guidance:g}, expected at least 1'
            )

    context: ClassVar[int] = 1  # the start picture
    lag: ClassVar[int] = 0  # a step shows the actions that it takes
    control_binding: ClassVar[str] = 'block'  # the block that takes the actions

    def with_control_binding(self, control_binding: str) -> Config:
        """Returns the same config: actions always bind to the block that takes them."""
        return self

    @property
    def step_frames(self) -> int:
        """Latent frames that a step makes."""
        return self.frames

    @property
    def controls_per_step(self) -> int:
        """Actions that a step takes."""
        return self.block_actions

    @property
    def first_actions(self) -> int:
        """Pixel frames of block 0."""
        return 1 + self.ratio * (self.frames - 1)

    @property
    def block_actions(self) -> int:
        """Pixel frames of any other block."""
        return self.ratio * self.frames

    @property
    def past_actions(self) -> int:
        """Pixel frames before a block whose actions the network gets with the block."""
        return self.ratio * self.window

    @property
    def passes(self) -> int:
        """Blocks that go through the network in a step, guidance included."""
        return len(self.steps) * (1 + (self.action_guidance > 1)) + 1

    @property
    def compiled_passes(self) -> int:
        """The same if every call were guided; the program branches at run time."""
        return (len(self.steps) + 1) * (1 + (self.action_guidance > 1))


@dataclasses.dataclass(frozen=True)
class StepTable:
    """Constants of the network calls on one block, float32 [calls], on the host.

    Attributes:
      level: noise level that the network is given.
      sigma: sigma of the block in the call.
      following: sigma that the clean estimate is noised to after the call.
    """

    level: np.ndarray[Any, Any]
    sigma: np.ndarray[Any, Any]
    following: np.ndarray[Any, Any]

    def __getitem__(self, calls: slice) -> StepTable:
        return StepTable(self.level[calls], self.sigma[calls], self.following[calls])


def step_table(cfg: Config, schedule: flow.Config) -> StepTable:
    """Returns the calls on one block: the denoising steps, then one on the clean block."""
    levels = flow.warp(schedule, cfg.steps)
    sigmas = levels / np.float32(1000)
    # The last call leaves the block as it is: at sigma 0 the clean estimate is the block.
    return StepTable(
        np.append(levels, np.float32(cfg.context_level)),
        np.append(sigmas, np.float32(0)),
        np.append(sigmas[1:], np.zeros(2, np.float32)),
    )
