"""A rate limit."""

from __future__ import annotations

import dataclasses
import time


@dataclasses.dataclass
class TokenBucket:
    """A rate limit: lets `rate` requests a second pass, and `burst` at once."""

    rate: float
    burst: float

    def __post_init__(self):
        self.level, self.updated = self.burst, time.monotonic()

    def take(self, cost: float = 1) -> bool:
        """Whether a request, which counts as `cost` requests, may pass now."""
        now = time.monotonic()
        self.level = min(self.burst, self.level + (now - self.updated) * self.rate)
        self.updated = now
        if self.level < cost:
            return False
        self.level -= cost
        return True

    def charge(self, cost: float):
        """Charges `cost` more requests afterwards; later requests wait until they are paid."""
        self.level -= cost

    def wait(self, cost: float = 1) -> float:
        """Seconds until a request of this cost may pass, as of the last `take`."""
        return max(0.0, (cost - self.level) / self.rate)
