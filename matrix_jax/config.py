"""What a run is, as frozen dataclasses, and the errors that a user's wrong values raise.

`recipes` finds runs by name and changes their fields. This module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from matrix_jax.parallel.mesh import Mesh


class UsageError(ValueError):
    """The user gave something that cannot be used; the message is one line that says why."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a ValueError raised inside into a `UsageError`; for code that checks user input."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def at_least(field: str, value: float, lowest: float) -> None:
    """Raises ValueError unless value >= lowest."""
    if not value >= lowest:
        raise ValueError(f'{field}: got {value}, expected at least {lowest}')


def check_writable(option: str, path: str | Path, folder: bool = False) -> None:
    """Checks that a file or folder can be created at a path; leaves nothing behind.

    Args:
      option: name of the path in the error message.
      path: where to write; missing parent folders are fine.
      folder: whether the path is a folder, which may exist already.

    Raises:
      UsageError: the nearest existing parent is not a folder, or is not writable.
    """

    def refuse(why: str) -> NoReturn:
        raise UsageError(f'{option}: got {str(path)!r}, expected a place to write to{why}')

    if not str(path):
        refuse('')
    parent = Path(path).absolute()
    parent = parent if folder else parent.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        refuse(f'; {parent} is not a folder')
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError:
        refuse(f'; {parent} takes no files')


@contextlib.contextmanager
def lock_folder(option: str, folder: str | Path) -> Iterator[None]:
    """Holds a folder for one process at a time; the system releases it however the process ends.

    Creates the folder if it is missing; what it created is removed again if it stays empty. The
    file `.lock` is there while the folder is held.

    Args:
      option: name of the folder in the error message.
      folder: where the process writes.

    Raises:
      UsageError: another process holds the folder.
    """
    path = Path(folder).expanduser() / '.lock'
    missing = [one for one in path.parents if not one.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open('a+', encoding='utf-8')
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                file.seek(0)
                holder = file.read(20).strip() or 'of another machine'
            raise UsageError(
                f'{option}: got {str(folder)!r}, expected a folder that no other process writes '
                f'to now; process {holder} does'
            ) from error
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the process before has removed this file; lock the next one
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                for one in missing:
                    one.rmdir()


@dataclasses.dataclass(frozen=True)
class Train:
    """Settings of the training loop, the same for every stage.

    Attributes:
      steps: optimizer updates.
      batch: clips per batch.
      accumulate: batches per update, computed one after the other.
      seed: of initial weights, noise and the order of the data.
      log_every: updates between logged values.
      save_every: updates between saved states.
      keep: how many saved states stay on disk.
      shard_frozen: whether mesh.fsdp and mesh.tensor also shard parameters that do not train. False
        takes more memory, but no update has to gather them.
    """

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    keep: int = 3
    shard_frozen: bool = True

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name != 'shard_frozen':
                at_least(f'train.{name}', value, 0 if name in ('steps', 'seed') else 1)


@dataclasses.dataclass(frozen=True)
class Run:
    """A world, what to do with it, and on which devices.

    Attributes:
      world: config dataclass of a world.
      stage: config dataclass of a training stage, or None.
      mesh: devices per mesh axis, or per part of a stream.
      train: settings of the training loop.
      weights: folder in the diffusers layout, name of a bundled world, or hub repository; None
        starts from new weights.
      lora: adapter file in peft's names, or a folder with one; merged into the weights.
      lora_scale: factor of the adapter.
      data: folder of recorded clips, for training and evaluation; several separated by commas.
      out: file or folder to write; None means the default of the command.
      allow_non_finite: whether weights may have values that are infinite or not a number.
      keep_programs: whether compiled programs are kept in the user's cache folder.
      name: 'world:RECIPE'; set by `recipes.load`.
    """

    world: Any
    stage: Any = None
    mesh: Mesh = Mesh()
    train: Train = Train()
    weights: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    data: str | None = None
    out: str | None = None
    allow_non_finite: bool = False
    keep_programs: bool = True
    name: str = ''
