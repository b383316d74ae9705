"""Updates that are refused because they are not finite: counted, told, and when to give up.

A step refuses such an update by itself (`state.make_step`), on the device. The host looks at a
step's metrics only when the next one is on its way: the wait for them costs the device nothing,
and a run still stops at most one step late.
"""

from __future__ import annotations

import sys

import jax

MAX_SKIPPED = 3  # refused updates in a row before a run gives up
SHOWN = 8  # clips of a batch that a message names


class Diverged(RuntimeError):
    """Several updates in a row were not finite."""


class NaNGuard:
    """Watches the steps of a run; `refused` counts the updates that changed nothing.

    Args:
      names: name of a clip by its number in the data, or None.
      refused: count to start from.
    """

    def __init__(self, names=None, refused: int = 0):
        self.names, self.refused = names, refused
        self._late, self._row = None, []

    def watch(self, step: int, clips, metrics):
        """Takes what step number `step` returned, and looks at the step before it.

        Args:
          clips: numbers of the clips of the batch [B], or None.
          metrics: dict with loss, grad_norm and skipped, still on the device.

        Raises:
          Diverged: the MAX_SKIPPED-th update in a row was refused.
        """
        late, self._late = self._late, (step, clips, metrics)
        if late:
            self._look(*late)

    def settle(self):
        """Looks at the last step too; waits for it."""
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
