"""Guard against updates that are not finite.

The step itself skips such an update on the device (`state.make_step`). The host counts and reports
them. It reads the metrics of a step only after the next one has started, so that the device never
waits; a run stops at most one step late.
"""

from __future__ import annotations

import sys

import jax

MAX_SKIPPED = 3  # consecutive skipped updates that end a run
SHOWN = 8  # number of clips that a message names


class Diverged(RuntimeError):
    """Several updates in a row were not finite."""


class NaNGuard:
    """Watches the steps of a run; `refused` counts the skipped updates.

    Args:
      names: names of the clips, or None.
      refused: initial count.
    """

    def __init__(self, names=None, refused: int = 0):
        self.names, self.refused = names, refused
        self._late, self._row = None, []

    def watch(self, step: int, clips, metrics):
        """Registers step number `step` and checks the step before it.

        Args:
          step: number of the step.
          clips: indices of the clips of the batch [B], or None.
          metrics: dict with loss, grad_norm and skipped, still on the device.

        Raises:
          Diverged: MAX_SKIPPED consecutive updates were skipped.
        """
        late, self._late = self._late, (step, clips, metrics)
        if late:
            self._look(*late)

    def settle(self):
        """Waits for the last step and checks it.

        Raises:
          Diverged: see `watch`.
        """
        late, self._late = self._late, None
        if late:
            self._look(*late)

    def _look(self, step, clips, metrics):
        from tqdm import tqdm

        found = jax.device_get([metrics[name] for name in ('loss', 'grad_norm', 'skipped')])
        loss, norm, skipped = (value.item() for value in found)
        if not skipped:
            self._row = []
            return
        self.refused += 1
        line = f'step {step} (loss {loss:g}, gradient {norm:g}): {self._named(clips)}'
        self._row.append(line)
        if skipped >= MAX_SKIPPED:
            raise Diverged(
                f'{skipped} updates in a row were not finite; their clips: ' + '; '.join(self._row)
            )
        tqdm.write(f'an update that is not finite was left out: {line}', file=sys.stderr)

    def _named(self, clips) -> str:
        if clips is None:
            return 'unknown'
        numbers = dict.fromkeys(int(one) for one in clips)
        shown = [self.names[one] if self.names else str(one) for one in list(numbers)[:SHOWN]]
        return ', '.join(shown) + (
            f' and {len(numbers) - SHOWN} more' if len(numbers) > SHOWN else ''
        )
