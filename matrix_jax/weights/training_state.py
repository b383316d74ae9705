"""Training state on disk: each step is saved whole, checked when loaded, restored into shardings.

On disk a state is a flat dict of arrays, so that only names and shapes matter, not the classes of
the tree. Every file has a checksum, because storage formats check their indices but not the values:
they would load a weight with a flipped bit.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from matrix_jax.weights import conversion
from matrix_jax.weights.checksums import SUMS, checksum_faults, write_checksums
from matrix_jax.weights.diffusers_layout import CheckpointError, SaveError, some


class Checkpoints:
    """Training state in a folder: the newest `keep` steps, each complete or absent.

    A step is a tree of arrays and a JSON object (iterator state, recipe), committed together by one
    rename, so a killed or failed save leaves the steps before it. Leaves are arrays, typed PRNG
    keys or Python and numpy scalars. A save runs in the background; `wait` for it, or `close`. If
    it fails, the next `save`, `wait` or `close` raises `SaveError`.

    Args:
      folder: created if missing. It has one writer at a time; remains of killed saves are removed.
      keep: how many steps stay.
      every: `save` skips steps that are no multiple of it, unless forced.

    Raises:
      CheckpointError: `folder` is a file.
    """

    def __init__(self, folder: str | Path, keep: int = 3, every: int = 1):
        folder = Path(folder).expanduser().resolve()
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f'{folder}: is a file, expected a folder for training state')
        self.folder = folder
        self._ocp, self._state, self._extra = _orbax()
        self._started: int | None = None  # the step whose save was started last
        self._failed = False
        # Orbax logs its errors and raises them as well; here each becomes one line.
        logging.getLogger('absl').addFilter(_not_from_orbax)
        self._manager = self._ocp.CheckpointManager(
            folder,
            options=self._ocp.CheckpointManagerOptions(
                max_to_keep=keep, save_interval_steps=every, cleanup_tmp_directories=True
            ),
            item_handlers={'state': self._state.handler(), 'extra': self._extra.handler()},
        )

    def latest(self) -> int | None:
        """Returns the newest complete step."""
        self.wait()
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any] | None = None, force: bool = False
    ) -> bool:
        """Starts to save a step; returns False if it is not due, or already saved.

        Raises:
          SaveError: this save or the one before failed.
        """
        try:
            self.wait()
        except SaveError as error:
            if not self._timed_out(error):
                raise
            self._start_again()  # this save replaces the one that failed
        if step in self._manager.all_steps():
            return False
        items = self._ocp.args.Composite(
            state=self._state.save(to_plain(state)), extra=self._extra.save(dict(extra or {}))
        )
        self._started = step
        with self._saving():
            return self._manager.save(step, force=force, args=items)

    def save_now(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Saves a step and returns when it is on disk.

        A save that fails because a thread of orbax waited too long, as on a machine that was
        suspended, is tried once more.

        Raises:
          SaveError: the save failed.
        """
        self.save(step, state, extra, force=True)
        try:
            self.wait()
        except SaveError as error:
            if not self._timed_out(error):
                raise
            self._start_again()
            self.save(step, state, extra, force=True)
            self.wait()

    def _start_again(self) -> None:
        """Forgets a save that failed."""
        self._failed = False
        self._manager.reload()

    @staticmethod
    def _timed_out(error: SaveError) -> bool:
        """Whether a save failed without a fault of the storage."""
        cause = error.__cause__
        return isinstance(cause, TimeoutError) and cause.errno is None

    def restore(
        self, abstract_state: Any = None, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns (step, state, extra), or None if there is no step.

        Args:
          abstract_state: tree of arrays or ShapeDtypeStructs to restore into, with shardings (the
            first device if there are none); None gives nested dicts of numpy arrays.
          step: a step to restore instead of the newest.

        Raises:
          CheckpointError: there is no such step, it is damaged, or its leaves differ from
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
            raise CheckpointError(f'{faults[0]}; {self._advice(step, steps)}')
        with self._reading(step, steps):
            metadata = self._manager.item_metadata(step)['state']
        if metadata is None:
            raise CheckpointError(f'{self.folder}: step {step} is not a training state')
        saved = {
            name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in metadata.tree.items()
        }
        if abstract_state is None:
            targets = {name: np.empty(*leaf) for name, leaf in saved.items()}
        else:
            targets = plain_targets(abstract_state)
            _compare(f'{self.folder}: step {step}', saved, targets)
        items = self._ocp.args.Composite(
            state=self._state.restore(targets), extra=self._extra.restore()
        )
        with self._reading(step, steps):
            found = self._manager.restore(step, args=items)
        flat = dict(found['state'])
        if abstract_state is None:
            return step, conversion.unflatten(flat), found['extra']
        return step, from_plain(abstract_state, flat), found['extra']

    def wait(self) -> None:
        """Returns when every started save is on disk.

        Raises:
          SaveError: one failed.
        """
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the folder.

        Raises:
          SaveError: a save failed.
        """
        try:
            self.wait()
        finally:
            reported = (Exception,) if self._failed else ()
            with contextlib.suppress(*reported):
                self._manager.close()
            if self._failed:  # free the disk; the next start removes what is written after this
                for part in self.folder.glob('*.orbax-checkpoint-tmp*'):
                    shutil.rmtree(part, ignore_errors=True)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turns any error into a `SaveError` that names the newest step on disk."""
        try:
            yield
        except Exception as error:  # orbax raises OSError, ValueError and its own kinds
            self._failed = True
            whole = self._newest_whole(
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
    def _reading(self, step: int, steps: Sequence[int]) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and its storage raise many kinds
            raise CheckpointError(
                f'{self.folder / str(step)}: not readable ({_reason(error)}); '
                f'{self._advice(step, steps)}'
            ) from error

    def _faults(self, step: int) -> list[str] | None:
        """Damaged files of a step; None if it has no checksums, as the first version saved it."""
        items = [self.folder / str(step) / item for item in ('state', 'extra')]
        found = [checksum_faults(item) for item in items]
        if found == [None, None]:
            return None
        return [
            fault
            for item, faults in zip(items, found)
            for fault in ([f'{item / SUMS}: missing'] if faults is None else faults)
        ]

    def _newest_whole(self, steps: Sequence[int]) -> int | None:
        """The newest of `steps` without a damaged file."""
        return next((step for step in reversed(steps) if not self._faults(step)), None)

    def _advice(self, step: int, steps: Sequence[int]) -> str:
        whole = self._newest_whole([one for one in steps if one < step])
        if whole is None:
            return f'no older step is whole: remove {self.folder} to start again'
        bad = ', '.join(str(self.folder / str(one)) for one in steps if one > whole)
        return f'step {whole} is whole: remove {bad} to go on from it'


class _Item(NamedTuple):
    """How orbax saves and restores one item of a step: a handler class and its arguments."""

    handler: Any
    save: Any
    restore: Any


@functools.cache
def _orbax() -> tuple[Any, _Item, _Item]:
    """(orbax, item of the state, item of the extra JSON); imported late, because it is slow."""
    import orbax.checkpoint as ocp

    def with_checksums(handler: Any, save: Any, restore: Any) -> _Item:
        """Writes the checksums of an item just before orbax commits it."""

        class Handler(handler):
            def finalize(self, directory: Any) -> None:
                super().finalize(directory)
                write_checksums(Path(directory))

        register = ocp.args.register_with_handler
        return _Item(
            Handler,
            register(Handler, for_save=True)(type('Save', (save,), {})),
            register(Handler, for_restore=True)(type('Restore', (restore,), {})),
        )

    args = ocp.args
    return (
        ocp,
        with_checksums(ocp.StandardCheckpointHandler, args.StandardSave, args.StandardRestore),
        with_checksums(ocp.JsonCheckpointHandler, args.JsonSave, args.JsonRestore),
    )


def _reason(error: Exception) -> str:
    """The operating system's reason if the storage quotes one, else the error's first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if quoted := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(quoted[1]))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(' [tensorstore_spec=')[0]


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return 'orbax' not in record.pathname


def _compare(where: str, saved: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless names, shapes and dtypes are the same."""
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


# --- states as flat dicts of arrays ----------------------------------------------------------


def to_plain(tree: Any) -> dict[str, Any]:
    """Returns the leaves by '/'-joined path, PRNG keys as uint32 words, scalars as 0-d arrays."""
    return {name: _plain(leaf) for name, leaf in _named(tree)}


def plain_targets(tree: Any) -> dict[str, Any]:
    """Returns what orbax restores each entry of `to_plain(tree)` into.

    A jax array becomes a ShapeDtypeStruct with a sharding (the first device if `tree` has none),
    anything else a numpy array.
    """
    return {name: _target(leaf) for name, leaf in _named(tree)}


def from_plain(tree: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `to_plain`: a tree with the structure and leaf types of `tree`."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [_like(leaf, flat[name]) for name, leaf in _named(tree)]
    )


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, 'dtype') and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_scalar(leaf: Any) -> bool:
    return not hasattr(leaf, 'dtype') or isinstance(leaf, np.generic)


def _plain(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _target(leaf: Any) -> Any:
    if _is_scalar(leaf) or isinstance(leaf, np.ndarray):
        return np.empty_like(np.asarray(leaf))
    sharding = getattr(leaf, 'sharding', None) or SingleDeviceSharding(jax.devices()[0])
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _like(leaf: Any, value: Any) -> Any:
    if _is_key(leaf):
        impl: list[Any] = []  # a ShapeDtypeStruct tells its kind of key only inside a trace
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
        return jax.random.wrap_key_data(value, impl=impl[0])
    return type(leaf)(value[()]) if _is_scalar(leaf) else value
