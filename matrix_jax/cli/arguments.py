"""What the command line may hold: recipes, whole numbers in a range, paths, places to write."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from matrix_jax.config import DEFAULT_WORLD, Run, UsageError, load

SEED = 2**63 - 1  # the largest


def recipes(given: Sequence[str], overrides: Sequence[str]) -> list[Run]:
    """The runs of RECIPE or RECIPE=WEIGHTS, each at most once; none means the bundled world.

    Args:
      given: the recipes.
      overrides: as of `config.load`; for a recipe that is alone.

    Raises:
      UsageError: what cannot be run together.
    """
    many, runs = len(given) > 1, {}
    if many and overrides:
        raise UsageError(
            f'{overrides[0].partition("=")[0]}: got {len(given)} recipes, expected '
            'one with it; RECIPE=WEIGHTS says where the weights of each are'
        )
    for one in given or [DEFAULT_WORLD]:
        name, equals, weights = one.partition('=')
        run = load(name, [*overrides, f'--weights={weights}'] if equals else overrides)
        if run.name in runs:
            raise UsageError(f'RECIPE: got {run.name} twice, expected each at most once')
        if many and not run.weights:
            raise UsageError(
                f'{run.name}: brings no weights, expected {run.name}=WEIGHTS, a '
                'folder in the released layout or a hub repository'
            )
        runs[run.name] = run
    return list(runs.values())


def whole(
    lowest: int, highest: int | None = None, what: str = 'a whole number'
) -> Callable[[str], int]:
    """The `type` of an option that is a whole number from `lowest` to `highest`."""
    wanted = (
        f'{what} of at least {lowest}'
        if highest is None
        else (f'{what} from {lowest} to {highest}')
    )

    def parse(text: str) -> int:
        shown = repr(text) if len(text) <= 40 else f"'{text[:37]}...'"
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'got {shown}, expected {wanted}') from None
        if number < lowest or highest is not None and number > highest:
            raise argparse.ArgumentTypeError(f'got {shown[1:-1]}, expected {wanted}')
        return number

    return parse


def path(text: str) -> Path:
    """The `type` of an option that is a path; no text is none."""
    if not text:
        raise argparse.ArgumentTypeError("got '', expected a path")
    return Path(text)


def check_place(option: str, path: str | Path, folder: bool = False):
    """Raises UsageError unless something can be made at a path: the nearest folder on the way to it
    takes files. Nothing is left behind.

    Args:
      option: what to call the path.
      path: what is to be made; folders on the way may be missing.
      folder: whether it is a folder, which then may be there.
    """

    def refuse(why):
        raise UsageError(f'{option}: got {str(path)!r}, expected a place to write to{why}')

    if not str(path):
        refuse('')
    place = Path(path).absolute()
    place = place if folder else place.parent
    while not os.path.lexists(place):
        place = place.parent
    if not os.path.isdir(place):
        refuse(f'; {place} is not a folder')
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError:
        refuse(f'; {place} takes no files')
