"""The control of every step, as runs of equal controls."""

from __future__ import annotations

import bisect
import itertools
import re

from matrix_jax.config import UsageError

MAX_STEPS = 4_000_000
MAX_RUNS = 2**18  # 18 hours of a new key every quarter of a second
RUN = re.compile(r'([A-Za-z0-9+:.-]{1,64})\*([1-9][0-9]{0,6})')


class ReplayError(UsageError):
    """A session log that cannot be replayed."""


class KeyRuns:
    """A list of controls that only grows and is cut at its end, stored as runs of equal items.

    One thread changes it. Any thread may copy it, because every change is a single assignment.

    Attributes:
      lost: the step from which the controls are unknown because there were more runs or steps than
        a file holds, or None. The stream itself goes on.
    """

    def __init__(self, controls=()):
        self._runs: list[tuple[str, int]] = []  # (control, the step after its last one)
        self.lost: int | None = None
        for control, same in itertools.groupby(controls):
            self.append(control, len(list(same)))

    def append(self, control: str, count: int = 1):
        """Adds the control of the next `count` steps."""
        end, runs = len(self) + count, self._runs
        same = bool(runs) and runs[-1][0] == control
        full = end > MAX_STEPS or (len(runs) >= MAX_RUNS and not same)
        if full and self.lost is None:
            self.lost = len(self)
        if same or self.lost is not None:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((control, end))

    def copy(self) -> KeyRuns:
        """An independent copy."""
        other = KeyRuns()
        other.lost, other._runs = self.lost, list(self._runs)
        return other

    @property
    def distinct(self) -> set[str]:
        """The controls that occur."""
        return {control for control, _ in self._runs}

    def __len__(self):
        return self._runs[-1][1] if self._runs else 0

    def __iter__(self):
        begin = 0
        for control, end in self._runs:
            yield from itertools.repeat(control, end - begin)
            begin = end

    def __getitem__(self, step: int) -> str:
        return self._runs[self._run(range(len(self))[step])][0]

    def __delitem__(self, steps: slice):
        """Only `del runs[step:]`."""
        cut = steps.start
        if self.lost is not None and cut <= self.lost:
            self.lost = None
        if cut < len(self):
            run = self._run(cut)
            begin = self._runs[run - 1][1] if run else 0
            self._runs[run:] = [(self._runs[run][0], cut)] if cut > begin else []

    def __eq__(self, other):
        return isinstance(other, KeyRuns) and self._runs == other._runs

    def __repr__(self):
        return f'KeyRuns({self.format()!r})'

    def _run(self, step: int) -> int:
        return bisect.bisect_right(self._runs, step, key=lambda run: run[1])

    def format(self) -> str:
        """Text such as 'D*12,DL*3'."""
        ends = [0, *(end for _, end in self._runs)]
        return ','.join(
            f'{control}*{end - begin}' for (control, end), begin in zip(self._runs, ends)
        )

    @classmethod
    def parse(cls, text: str) -> KeyRuns:
        """Reads the output of `format`.

        Raises:
          ReplayError: the text is malformed or too long.
        """
        if text.count(',') >= MAX_RUNS:
            raise ReplayError(
                f'replay.symbols: got {text.count(",") + 1} runs of keys, expected '
                f'at most {MAX_RUNS}'
            )
        found, end, last = cls(), 0, None
        for run in filter(None, text.split(',')):
            match = RUN.fullmatch(run)
            if not match:
                raise ReplayError(f'replay.symbols: got {run[:20]!r}, expected such as D*12')
            control, count = match.groups()
            end += int(count)
            if control == last:
                found._runs.pop()
            found._runs.append((control, end))
            last = control
        if end > MAX_STEPS:
            raise ReplayError(f'replay.symbols: got {end} steps, expected at most {MAX_STEPS}')
        return found
