"""When the frames of a step are due, and when the step has to start for that."""

from __future__ import annotations

import dataclasses

SMOOTHING = 0.8  # weight of what was measured before


@dataclasses.dataclass
class Pace:
    """The clock of an engine; all times are in seconds.

    A step starts as late as its frames can still be on time. What is left of the frames before it
    may be shown faster, so that a new key is seen sooner (`hurry`).

    Attributes:
      period: how long the frames of a step last.
      ahead: steps that are submitted before the frames of an earlier one are ready.
      margin: between the end of a step and its first frame, at least.
      spreads: a step may take its usual time and so many times the usual deviation from it.
      most_hurry: how many times faster than usual frames may be shown after a key; 1 = not.
      due: when the next frames are to be shown.
      seconds: time of a step until its frames are ready, smoothed.
      steps: steps made.
    """

    period: float
    ahead: int = 0
    margin: float = 0.005
    spreads: float = 3.0
    most_hurry: float = 2.0
    due: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    _spread: float = 0.0  # deviation of a step's time, smoothed
    _interval: float = 0.0  # from one step's frames to the next ones, smoothed
    _collected: float = 0.0  # when the last frames were ready

    @property
    def spacing(self) -> float:
        """From one step's frames to the next: the period, or more if the world is slow."""
        return max(self.period, self._interval)

    @property
    def lead(self) -> float:
        """From the start of a step to its first frame."""
        usual = self.seconds + self.spreads * self._spread + self.margin
        return min(usual, 1.15 * self.seconds + 4 * self.margin, (1 + self.ahead) * self.spacing)

    def wait(self, now: float, in_flight: int = 0) -> float:
        """Returns the time until the next step has to start.

        Args:
          now: the time.
          in_flight: steps that were submitted and have no frames yet.
        """
        return self.due - self.lead + in_flight * self.spacing - now

    def collect(self, began: float, now: float) -> float:
        """Notes that the frames of a step are ready; returns when they are due.

        Args:
          began: when the step was submitted.
          now: the time.
        """
        seconds = now - began
        # Overlapping steps follow each other faster than one step takes.
        interval, self._collected = now - max(began, self._collected), now
        old = SMOOTHING if self.steps else 0.0
        self._spread = old * self._spread + (1 - old) * abs(seconds - self.seconds) * (old > 0)
        self.seconds = old * self.seconds + (1 - old) * seconds
        self._interval = old * self._interval + (1 - old) * interval
        self.steps += 1
        shown = max(self.due, now)
        self.due = shown + self.spacing
        return shown

    def hurry(self, now: float) -> float:
        """Brings the next frames forward; returns the part that is left of the time until then."""
        left = self.due - now
        if left <= self.lead:
            return 1.0
        self.due = now + max(self.lead, left / self.most_hurry)
        return (self.due - now) / left
