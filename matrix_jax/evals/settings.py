"""Settings that all evaluations share."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How much is evaluated.

    Attributes:
      seconds: length of scripted streams.
      drive_seconds: length of driven streams, or of streams under recorded actions.
      long_seconds: length of one long stream of the latter kind; 0 = none.
      streams: streams per script.
      clips, clip_frames: number of held-out clips for the reconstruction, and frames of each.
      windows: largest number of windows of real clips that the probe is tested on.
      times: seconds shown on contact sheets.
      seed: seed of starts, scripts and noise.
      probe: config of the inverse-dynamics probe.
    """

    seconds: int = 30
    drive_seconds: int = 60
    long_seconds: int = 0
    streams: int = 6
    clips: int = 15
    clip_frames: int = 97
    windows: int = 3000
    times: tuple[float, ...] = (1.0, 4.0, 15.0, 30.0)
    seed: int = 0
    probe: Any = None

    def quick(self) -> EvaluationSettings:
        """Settings of a rough evaluation in a few minutes."""
        times = (self.times[0], 4.0, 8.0)
        return dataclasses.replace(
            self, seconds=8, drive_seconds=15, streams=2, clips=3, times=times
        )
