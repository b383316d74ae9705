"""Geometry of segments with memory, and their solver.

Matrix-Game 3.0; `stream/memory.py` has the stream itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from matrix_jax.diffusion import unipc
from matrix_jax.nn import camera
from matrix_jax.stream.memory_bank import KEPT

LEVELS = 1000  # noise levels are 0 .. 1000


@dataclasses.dataclass(frozen=True)
class Experts:
    """Two networks of the same sizes, one for high and one for low noise levels (Wan 2.2).

    Attributes:
      boundary: levels from 1000 * boundary on go to the first network, all others to the second.
        Wan 2.2 switches at 0.875 for text and at 0.9 for a start picture.
      low_guidance: guidance scale of the second network; None = that of the first.
      offload: whether the parameters of both networks stay in host memory. A network is copied to
        the devices before its first step and freed after its last one.

    Raises:
      ValueError: a value is out of range.
    """

    boundary: float = 0.9
    low_guidance: float | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.boundary < 1:
            raise ValueError(
                f'stream.experts.boundary: got {self.boundary:g}, expected between 0 and 1'
            )
        if self.low_guidance is not None and not self.low_guidance >= 1:
            raise ValueError(
                f'stream.experts.low_guidance: got {self.low_guidance:g}, expected at least 1'
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """Geometry and memory; the defaults are Matrix-Game 3.0.

    Attributes:
      first: latent frames of segment 0, the start picture included.
      overlap: latent frames of the segment before that a segment starts with.
      new: latent frames that a later segment adds.
      ratio: pixel frames R of a latent frame.
      capacity: latent frames S that the bank holds.
      reference_offsets: reference cameras, as pixel frames before the last one of a segment; a
        memory frame is retrieved for each. Empty = no memory.
      fixed_memory: pixel frame that the last memory frame always shows; None = a retrieved one.
      furthest: latent frames before a segment at which the network sees older memory frames, so
        that no distance in time is larger than those of its training; None = their true times.
      camera: how actions move the camera, and what it sees.
      solver: denoising steps of a segment.
      guidance: scale of classifier-free guidance; 1 switches it off.
      experts: two networks that share the steps; None = one network makes all of them.

    Raises:
      ValueError: a value is out of range.
    """

    first: int = 15
    overlap: int = 4
    new: int = 10
    ratio: int = 4
    capacity: int = 1024
    reference_offsets: tuple[int, ...] = (0, 8, 16, 24, 32)
    fixed_memory: int | None = 4
    furthest: int | None = None
    camera: camera.Config = camera.RELEASED
    solver: unipc.Config = unipc.Config()
    guidance: float = 1.0
    experts: Experts | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, 'reference_offsets', tuple(self.reference_offsets))
        for name in ('overlap', 'new', 'ratio'):
            if getattr(self, name) < 1:
                raise ValueError(f'stream.{name}: got {getattr(self, name)}, expected at least 1')
        if self.first <= self.overlap:
            raise ValueError(
                f'stream.first: got {self.first} latent frames, expected more than '
                f'the {self.overlap} of stream.overlap'
            )
        if self.capacity < self.first + KEPT or self.new > self.capacity - KEPT:
            raise ValueError(
                f'stream.capacity: got {self.capacity} latent frames, expected at '
                f'least {max(self.first, self.new) + KEPT}'
            )
        longest = self.ratio * (self.overlap + self.new)
        if not all(0 <= offset < longest for offset in self.reference_offsets):
            raise ValueError(
                f'stream.reference_offsets: got {self.reference_offsets}, expected '
                f'pixel frames from 0 to {longest - 1}'
            )
        if self.fixed_memory is not None and not 1 <= self.fixed_memory <= self.ratio * (KEPT - 1):
            raise ValueError(
                f'stream.fixed_memory: got {self.fixed_memory}, expected 1 to '
                f'{self.ratio * (KEPT - 1)}, a frame that is never replaced'
            )
        if self.furthest is not None and self.furthest < 1:
            raise ValueError(f'stream.furthest: got {self.furthest}, expected at least 1')
        if not self.guidance >= 1:
            raise ValueError(f'stream.guidance: got {self.guidance:g}, expected at least 1')
        levels = unipc.timesteps(self.solver)
        if self.experts and not levels[-1] < LEVELS * self.experts.boundary <= levels[0]:
            raise ValueError(
                f'stream.experts.boundary: got {self.experts.boundary:g}, expected a step of each '
                f'network; the {self.solver.steps} steps have levels {levels[0]} to {levels[-1]}'
            )

    context: ClassVar[int] = 1  # the start picture
    lag: ClassVar[int] = 0  # a step shows the actions that it takes
    control_binding: ClassVar[str] = 'segment'  # the segment that takes the actions

    def with_control_binding(self, control_binding: str) -> Config:
        """Returns the same config: actions always bind to the segment that takes them."""
        return self

    @property
    def runs(self) -> tuple[tuple[unipc.UniPCTable, float], ...]:
        """Steps and guidance scale of each network, in the order in which they run."""
        table = unipc.step_table(self.solver)
        if self.experts is None:
            return ((table, self.guidance),)
        high, low = unipc.split(table, LEVELS * self.experts.boundary)
        low_guidance = self.experts.low_guidance
        return (high, self.guidance), (low, low_guidance or self.guidance)

    @property
    def guided(self) -> bool:
        """Whether any step is guided."""
        return any(scale > 1 for _, scale in self.runs)

    @property
    def passes(self) -> int:
        """Segments that go through the network in a step, guidance included."""
        return sum(len(table.level) * (1 + (scale > 1)) for table, scale in self.runs)

    @property
    def compiled_passes(self) -> int:
        """The same: the program of a step has no conditional pass."""
        return self.passes

    @property
    def controls_per_step(self) -> int:
        """Actions that a step takes."""
        return self.segment_actions

    @property
    def frames(self) -> int:
        """Latent frames of a network call, memory frames included."""
        return len(self.reference_offsets) + self.overlap + self.new

    @property
    def step_frames(self) -> int:
        """Latent frames that a step makes."""
        return self.new

    @property
    def first_actions(self) -> int:
        """Pixel frames of segment 0."""
        return 1 + self.ratio * (self.first - 1)

    @property
    def segment_actions(self) -> int:
        """Pixel frames that any other segment adds."""
        return self.ratio * self.new

    @property
    def overlap_actions(self) -> int:
        """Pixel frames that a segment shares with the one before it."""
        return self.ratio * self.overlap


def first_latent(cfg: Config, segment: Any) -> Any:
    """Number of the first latent frame of a segment, overlap included."""
    return (segment > 0) * (cfg.first + cfg.new * (segment - 1) - cfg.overlap)


def latent_times(cfg: Config, segment: int) -> np.ndarray[Any, Any]:
    """Pixel frames whose cameras are those of the latent frames of a segment, int [T]."""
    count = cfg.first if segment == 0 else cfg.overlap + cfg.new
    frames: np.ndarray[Any, Any] = first_latent(cfg, segment) + np.arange(count)
    return cfg.ratio * frames
