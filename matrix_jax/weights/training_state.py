"""Training state on disk: committed whole, checked when read, restored into its shardings."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from matrix_jax.weights import checksums, conversion, plain_leaves
from matrix_jax.weights.diffusers_layout import CheckpointError, SaveError, some


class Checkpoints:
    """Training state in a folder: the newest `keep` steps, each complete or absent.

    A step is a tree of arrays and a JSON object (iterator state, recipe), committed together by
    one rename, so a killed or failed save leaves the steps before it. Its files carry checksums,
    and a damaged step is refused by name. Leaves are arrays, typed PRNG keys or Python and numpy
    scalars. Saving goes on in the background; `wait` for it, or `close`. A save that fails there
    raises `SaveError` from the next `save`, `wait` or `close`.
    """

    def __init__(self, folder: str | Path, keep: int = 3, every: int = 1):
        """Args: `save` skips steps that are no multiple of `every`, unless forced.

        What killed saves left in the folder is cleared away: it has one writer at a time.
        """
        import orbax.checkpoint as ocp

        folder = Path(folder).expanduser().resolve()
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f'{folder}: is a file, expected a folder for training state')
        self.folder = folder
        self._ocp = ocp
        self._started = None  # the step whose save was started last
        self._failed = False
        # What orbax logs as an error it also raises, and here that becomes one line.
        logging.getLogger('absl').addFilter(_not_from_orbax)
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, save_interval_steps=every, cleanup_tmp_directories=True
            ),
            item_handlers={
                'state': _summed(ocp.StandardCheckpointHandler()),
                'extra': _summed(ocp.JsonCheckpointHandler()),
            },
        )

    def latest(self) -> int | None:
        """The newest complete step."""
        self.wait()
        return self._manager.latest_step()

    def save(
        self, step: int, state, extra: Mapping[str, Any] | None = None, force: bool = False
    ) -> bool:
        """Starts to save a step; False if it is not due, or is there already."""
        self.wait()
        if step in self._manager.all_steps():
            return False
        args = self._ocp.args
        items = args.Composite(
            state=args.StandardSave(plain_leaves.to_plain(state)),
            extra=args.JsonSave(dict(extra or {})),
        )
        self._started = step
        with self._saving():
            return self._manager.save(step, force=force, args=items)

    def restore(self, abstract_state=None, step: int | None = None):
        """(step, state, extra) of the newest step (or of `step`); None if there is none.

        Args:
          abstract_state: tree of arrays or ShapeDtypeStructs to restore into, with shardings
            (without one, the first device); None gives nested dicts of numpy arrays.
          step: a step to restore instead of the newest.

        Raises:
          CheckpointError: no such step, it is damaged, or its leaves differ from
            `abstract_state`.
        """
        self.wait()
        steps = sorted(self._manager.all_steps())
        if step is None and not steps:
            return None
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(
                f'{self.folder}: no step {step}; there are '
                + (', '.join(map(str, steps)) or 'none')
            )
        if faults := self._faults(step):
            raise CheckpointError(f'{faults[0]}; {self._way_on(step, steps)}')
        with self._reading(step, steps):
            metadata = self._manager.item_metadata(step)['state']
        if metadata is None:
            raise CheckpointError(f'{self.folder}: step {step} is no training state')
        saved = {
            name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in metadata.tree.items()
        }
        if abstract_state is None:
            targets = {name: np.empty(*leaf) for name, leaf in saved.items()}
        else:
            targets = plain_leaves.targets(abstract_state)
            _compare(f'{self.folder}: step {step}', saved, targets)
        args = self._ocp.args
        items = args.Composite(state=args.StandardRestore(targets), extra=args.JsonRestore())
        with self._reading(step, steps):
            found = self._manager.restore(step, args=items)
        flat = dict(found['state'])
        state = (
            conversion.unflatten(flat)
            if abstract_state is None
            else plain_leaves.from_plain(abstract_state, flat)
        )
        return step, state, found['extra']

    def wait(self):
        """Returns when every started save is on disk.

        Raises:
          SaveError: one could not be written.
        """
        with self._saving():
            self._manager.wait_until_finished()

    def close(self):
        """Waits, then gives up the folder."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception if self._failed else ()):  # told already
                self._manager.close()
            if self._failed:  # make room; the next start clears what is written even now
                for part in self.folder.glob('*.orbax-checkpoint-tmp*'):
                    shutil.rmtree(part, ignore_errors=True)

    @contextlib.contextmanager
    def _saving(self):
        """Names what could not be saved, and what there is to go on from."""
        try:
            yield
        except Exception as error:  # the writers below raise OSError, ValueError and their own
            self._failed = True
            whole = self._whole(
                sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
            )
            raise SaveError(
                f'{self.folder}: step {self._started} could not be saved ({_reason(error)}); '
                + (
                    'no step was saved before'
                    if whole is None
                    else f'step {whole} is whole, and the next start goes on from it'
                )
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int, steps):
        try:
            yield
        except Exception as error:  # each reader below raises its own kinds
            raise CheckpointError(
                f'{self.folder / str(step)}: not readable ({_reason(error)}); '
                f'{self._way_on(step, steps)}'
            ) from error

    def _faults(self, step: int) -> list[str] | None:
        """What is wrong with the files of a step, as far as its checksums tell; None if it has none
        (it was saved before there were any)."""
        items = [self.folder / str(step) / item for item in ('state', 'extra')]
        found = [checksums.faults(item) for item in items]
        if found == [None, None]:
            return None
        return [
            fault
            for item, faults in zip(items, found)
            for fault in ([f'{item / checksums.FILE}: missing'] if faults is None else faults)
        ]

    def _whole(self, steps) -> int | None:
        """The newest of `steps` whose files are as they were written, as far as that is known."""
        return next((step for step in reversed(steps) if not self._faults(step)), None)

    def _way_on(self, step: int, steps) -> str:
        whole = self._whole([one for one in steps if one < step])
        if whole is None:
            return f'no older step is whole: remove {self.folder} to start again'
        bad = ', '.join(str(self.folder / str(one)) for one in steps if one > whole)
        return f'step {whole} is whole: remove {bad} to go on from it'


def _summed(handler):
    """`handler`, writing the checksums of its files just before they are committed."""
    finish = handler.finalize

    def finalize(directory):
        finish(directory)
        checksums.write(Path(directory))

    handler.finalize = finalize  # its class is how orbax finds the arguments that it takes
    return handler


def _reason(error: Exception) -> str:
    """The kernel's reason where the storage quotes one, else how the error begins."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if quoted := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(quoted[1]))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(' [tensorstore_spec=')[0]


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return 'orbax' not in record.pathname


def _compare(where: str, saved: Mapping[str, Any], targets: Mapping[str, Any]):
    wrong = [
        f'{name}: got {saved[name][1]}{list(saved[name][0])}, '
        f'expected {targets[name].dtype}{list(targets[name].shape)}'
        for name in sorted(set(saved) & set(targets))
        if saved[name] != (tuple(targets[name].shape), np.dtype(targets[name].dtype))
    ]
    lost, extra = sorted(set(targets) - set(saved)), sorted(set(saved) - set(targets))
    faults = (
        [f'missing {some(lost)}'] * bool(lost)
        + [f'unknown {some(extra)}'] * bool(extra)
        + wrong[:5]
    )
    if faults:
        raise CheckpointError(f'{where} does not fit this recipe: {"; ".join(faults)}')
